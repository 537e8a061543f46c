// libcudart's entry points, as PyTorch and the C++ extension call them.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "state.h"

// The headers rename these two for older programs.
#undef cudaGetDeviceProperties
#undef cudaStreamGetCaptureInfo

namespace fakecuda {
namespace {

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fail(cudaError_t error) {
  last_error = error;
  return error;
}

std::unordered_map<const void*, std::string>& kernel_names() {
  static auto* names = new std::unordered_map<const void*, std::string>;
  return *names;
}

bool is_device(const void* pointer) { return device_of(reinterpret_cast<uintptr_t>(pointer)) >= 0; }

// "host to device, pageable" and the like; for pageable memory a copy makes the host wait.
std::string copy_name(const void* to, const void* from) {
  const bool device_to = is_device(to), device_from = is_device(from);
  if (device_to && device_from) return "device to device";
  if (!device_to && !device_from) return "host to host";
  const bool pinned = device_of(reinterpret_cast<uintptr_t>(device_to ? from : to)) == kHost;
  return std::string(device_to ? "host to device" : "device to host") + (pinned ? ", pinned" : ", pageable");
}

// Small values are moved; large ones would only cost time.
constexpr size_t kMoved = 1 << 20;

// No kernel has computed what a device holds, so the host reads zeros: whatever it decides by them, it decides it
// again.
void move(void* to, const void* from, size_t bytes) {
  if (is_device(from) && !is_device(to)) {
    memset(to, 0, bytes);
  } else if (bytes <= kMoved) {
    memmove(to, from, bytes);
  }
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, size_t shared, const void* stream) {
  std::string name = "unknown";
  {
    const std::lock_guard guard(state_lock());
    const auto found = kernel_names().find(function);
    if (found != kernel_names().end()) name = found->second;
  }
  if (const char* fault = launch_fault(grid, block)) {
    refuse("kernel %s: %s: grid %u %u %u, block %u %u %u", name.c_str(), fault, grid.x, grid.y, grid.z, block.x,
           block.y, block.z);
    return fail(cudaErrorInvalidConfiguration);
  }
  if (shared > shared_memory_limit()) {
    refuse("kernel %s: %zu bytes of shared memory, the device has %zu", name.c_str(), shared, shared_memory_limit());
    return fail(cudaErrorInvalidValue);
  }
  record("kernel", name, grid, block, shared, stream);
  return cudaSuccess;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

struct Executable {
  size_t nodes;
};

}  // namespace
}  // namespace fakecuda

using namespace fakecuda;  // NOLINT: every function below is CUDA's

// --- devices

FAKECUDA_EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  if (settings().driver / 1000 < CUDART_VERSION / 1000) return fail(cudaErrorInsufficientDriver);
  *count = settings().devices;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= settings().devices) return fail(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = settings().driver;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = device_attribute(attribute);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", settings().name.c_str());
  p->totalGlobalMem = settings().memory;
  p->sharedMemPerBlock = size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlock));
  p->sharedMemPerBlockOptin = shared_memory_limit();
  p->sharedMemPerMultiprocessor = size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor));
  p->regsPerBlock = p->regsPerMultiprocessor = device_attribute(cudaDevAttrMaxRegistersPerBlock);
  p->warpSize = device_attribute(cudaDevAttrWarpSize);
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = device_attribute(cudaDevAttrMaxGridDimX);
  p->maxGridSize[1] = p->maxGridSize[2] = device_attribute(cudaDevAttrMaxGridDimY);
  p->totalConstMem = size_t(device_attribute(cudaDevAttrTotalConstantMemory));
  p->major = settings().capability / 10;
  p->minor = settings().capability % 10;
  p->multiProcessorCount = device_attribute(cudaDevAttrMultiProcessorCount);
  p->maxThreadsPerMultiProcessor = device_attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = device_attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->l2CacheSize = device_attribute(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = device_attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->asyncEngineCount = device_attribute(cudaDevAttrAsyncEngineCount);
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
  p->uuid.bytes[0] = char(device + 1);
  p->pciBusID = device + 1;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 1;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
FAKECUDA_EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int device) {
  snprintf(text, size_t(size), "0000:%02x:00.0", device + 1);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaDeviceSynchronize() {
  if (refuse_in_capture("cudaDeviceSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
  record_wait("cudaDeviceSynchronize");
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode);
  return cudaSuccess;
}
FAKECUDA_EXPORT const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorStreamCaptureUnsupported:
      return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated:
      return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureUnjoined:
      return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "another CUDA error";
  }
}
FAKECUDA_EXPORT const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    default:
      return cudaGetErrorName(error);
  }
}
FAKECUDA_EXPORT cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
FAKECUDA_EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
FAKECUDA_EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
FAKECUDA_EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }

// --- memory

FAKECUDA_EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  if (refuse_in_capture("cudaMalloc")) return fail(cudaErrorStreamCaptureUnsupported);
  *pointer = bytes ? allocate(bytes, current_device) : nullptr;
  return *pointer || !bytes ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
FAKECUDA_EXPORT cudaError_t cudaFree(void* pointer) {
  if (!pointer) return cudaSuccess;
  if (refuse_in_capture("cudaFree")) return fail(cudaErrorStreamCaptureUnsupported);
  return release(pointer) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
FAKECUDA_EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  if (refuse_in_capture("cudaHostAlloc")) return fail(cudaErrorStreamCaptureUnsupported);
  *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  pin(*pointer, bytes);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaFreeHost(void* pointer) {
  unpin(pointer);
  free(pointer);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  pin(pointer, bytes);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaHostUnregister(void* pointer) {
  unpin(pointer);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  const size_t context = size_t(500) << 20, used = bytes_in_use(current_device) + context;
  *total = settings().memory;
  *free_bytes = *total > used ? *total - used : 0;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  const int device = device_of(reinterpret_cast<uintptr_t>(pointer));
  if (device == kUnknown) {
    attributes->type = cudaMemoryTypeUnregistered;
    return cudaSuccess;
  }
  attributes->type = device == kHost ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->device = device == kHost ? 0 : device;
  attributes->devicePointer = const_cast<void*>(pointer);
  if (device == kHost) attributes->hostPointer = const_cast<void*>(pointer);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (refuse_in_capture("cudaMemcpy")) return fail(cudaErrorStreamCaptureUnsupported);
  record("copy", copy_name(to, from), dim3(0, 0, 0), dim3(0, 0, 0), 0, nullptr);
  record_wait("cudaMemcpy");
  move(to, from, bytes);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                            cudaStream_t stream) {
  const std::string name = copy_name(to, from);
  if (is_captured(stream_of(stream)) && name.ends_with("pageable")) {
    refuse("cudaMemcpyAsync: %s memory in a capture", name.c_str());
    stream_of(stream)->graph->invalid = true;
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  record("copy", name, dim3(0, 0, 0), dim3(0, 0, 0), 0, stream);
  // From pageable memory the host waits until the driver has staged the data, to pageable memory until they are there.
  if (name.ends_with("pageable")) record_wait("cudaMemcpyAsync of pageable memory");
  move(to, from, bytes);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t, const void* from, size_t, size_t, size_t,
                                              cudaMemcpyKind, cudaStream_t stream) {
  record("copy", copy_name(to, from), dim3(0, 0, 0), dim3(0, 0, 0), 0, stream);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                                cudaStream_t stream) {
  record("copy", "device to another device", dim3(0, 0, 0), dim3(0, 0, 0), 0, stream);
  move(to, from, bytes);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  if (refuse_in_capture("cudaMemset")) return fail(cudaErrorStreamCaptureUnsupported);
  record("fill", "cudaMemset", dim3(0, 0, 0), dim3(0, 0, 0), 0, nullptr);
  if (bytes <= kMoved) memset(pointer, value, bytes);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
  record("fill", "cudaMemsetAsync", dim3(0, 0, 0), dim3(0, 0, 0), 0, stream);
  if (bytes <= kMoved) memset(pointer, value, bytes);
  return cudaSuccess;
}

// --- streams, events, graphs

FAKECUDA_EXPORT cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = reinterpret_cast<cudaStream_t>(new_stream());
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return cudaStreamCreate(stream);
}
FAKECUDA_EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }  // events may still point at it
FAKECUDA_EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (is_captured(stream_of(stream))) refuse("cudaStreamQuery: the stream captures");
  if (is_captured(stream_of(stream)) || refuse_in_capture("cudaStreamQuery")) {
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (is_captured(stream_of(stream))) refuse("cudaStreamSynchronize: the stream captures");
  if (is_captured(stream_of(stream)) || refuse_in_capture("cudaStreamSynchronize")) {
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  record_wait("cudaStreamSynchronize");
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  wait_for(stream_of(stream), *reinterpret_cast<Event*>(event));
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_captured(stream_of(stream)) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                                     unsigned long long* id, cudaGraph_t* graph,
                                                     const cudaGraphNode_t** dependencies,
                                                     const cudaGraphEdgeData** edges, size_t* count) {
  const Stream* found = stream_of(stream);
  *status = is_captured(found) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = found->capture;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(found->graph);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  const cudaError_t error = begin_capture(stream_of(stream), mode);
  return error ? fail(error) : error;
}
FAKECUDA_EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const cudaError_t error = end_capture(stream_of(stream), reinterpret_cast<Graph**>(graph));
  return error ? fail(error) : error;
}
FAKECUDA_EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph,
                                                          unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Executable{reinterpret_cast<Graph*>(graph)->nodes.size()});
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const size_t nodes = reinterpret_cast<Executable*>(executable)->nodes;
  record("graph", std::to_string(nodes) + " nodes", dim3(unsigned(nodes)), dim3(0, 0, 0), 0, stream);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }  // streams may still point at it
FAKECUDA_EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete reinterpret_cast<Executable*>(executable);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = reinterpret_cast<Graph*>(graph)->nodes.size();
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new Event);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
FAKECUDA_EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event*>(event);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const std::lock_guard guard(state_lock());
  auto* recorded = reinterpret_cast<Event*>(event);
  recorded->stream = stream_of(stream);
  recorded->graph = recorded->stream->graph;
  recorded->work = recorded->stream->work;
  recorded->time = now();
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}
FAKECUDA_EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (reinterpret_cast<Event*>(event)->graph && any_capture()) {
    refuse("cudaEventQuery: the event is of a capture");
    return fail(cudaErrorCapturedEvent);
  }
  return refuse_in_capture("cudaEventQuery") ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t) {
  if (refuse_in_capture("cudaEventSynchronize")) return fail(cudaErrorStreamCaptureUnsupported);
  record_wait("cudaEventSynchronize");
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  // The host's time between two records: it is no time of a device, but it is not 0 either.
  const double seconds = reinterpret_cast<Event*>(end)->time - reinterpret_cast<Event*>(begin)->time;
  *milliseconds = float(seconds > 1e-7 ? 1e3 * seconds : 1e-4);
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  record("callback", "cudaLaunchHostFunc", dim3(0, 0, 0), dim3(0, 0, 0), 0, stream);
  function(data);
  return cudaSuccess;
}

// --- kernels that a compiler has built into a library

FAKECUDA_EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
FAKECUDA_EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
FAKECUDA_EXPORT void __cudaUnregisterFatBinary(void**) {}
FAKECUDA_EXPORT char __cudaInitModule(void**) { return 1; }
FAKECUDA_EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
FAKECUDA_EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                                            void*, int*) {
  const std::lock_guard guard(state_lock());
  kernel_names()[host] = name;
}
FAKECUDA_EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
FAKECUDA_EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void**, size_t shared,
                                             cudaStream_t stream) {
  return launch(function, grid, block, shared, stream);
}
FAKECUDA_EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                                               cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
FAKECUDA_EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
FAKECUDA_EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* function, dim3 grid, dim3 block, void**,
                                                        size_t shared, cudaStream_t stream) {
  return launch(function, grid, block, shared, stream);
}
FAKECUDA_EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = settings().capability;
  attributes->maxDynamicSharedSizeBytes = int(shared_memory_limit());
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && size_t(value) > shared_memory_limit()) {
    refuse("cudaFuncSetAttribute: %d bytes of shared memory, the device has %zu", value, shared_memory_limit());
    return fail(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                                   int threads, size_t, unsigned) {
  *blocks = threads > 0 ? 2048 / threads : 1;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* function,
                                                                          int threads, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, function, threads, shared, 0);
}
FAKECUDA_EXPORT cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char symbol[1 << 20];
  *pointer = symbol;
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}
FAKECUDA_EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                             unsigned long long,
                                                             cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return *function ? cudaSuccess : fail(cudaErrorSymbolNotFound);
}
