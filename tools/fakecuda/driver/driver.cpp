// libcuda's entry points, as Triton, NVRTC's users and PyTorch's static launcher call them.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace fakecuda {
namespace {

struct Module {
  const void* image;
};

struct Function {
  std::string name;
  KernelImage image;
  int shared_allowed = 48 * 1024;
};

CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(uintptr_t(0x100 + device)); }

CUresult load(CUmodule* module, const void* image) {
  if (refuse_in_capture("cuModuleLoadData")) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const int architecture = cubin_architecture(image), capability = settings().capability;
  // Machine code runs on devices of its major version that are not older.
  if (architecture && (architecture / 10 != capability / 10 || architecture > capability)) {
    refuse("cuModuleLoadData: the image is for sm_%d, the device is sm_%d", architecture, capability);
    return CUDA_ERROR_NO_BINARY_FOR_GPU;
  }
  *module = reinterpret_cast<CUmodule>(new Module{image});
  return CUDA_SUCCESS;
}

// Refuse a kernel whose pointers are of another device than the current one.
void check_pointers(const Function& function, void** arguments) {
  if (!arguments) return;
  for (size_t i = 0; i < function.image.parameters.size(); i++) {
    const unsigned size = function.image.parameters[i].second;
    if (size != sizeof(uintptr_t) && size != sizeof(CUtensorMap)) continue;  // a tensor map begins with its address
    uintptr_t value;
    memcpy(&value, arguments[i], sizeof value);
    const int device = device_of(value);
    if (device >= 0 && device != current_device) {
      refuse("triton %s: argument %zu is of device %d, the current device is %d", function.name.c_str(), i, device,
             current_device);
    }
  }
}

CUresult launch(const Function& function, dim3 grid, dim3 block, size_t shared, const void* stream, void** arguments) {
  const char* name = function.name.c_str();
  if (const char* fault = launch_fault(grid, block)) {
    refuse("triton %s: %s: grid %u %u %u, block %u %u %u", name, fault, grid.x, grid.y, grid.z, block.x, block.y,
           block.z);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (shared > size_t(function.shared_allowed)) {
    refuse("triton %s: %zu bytes of shared memory, the kernel may use %d", name, shared, function.shared_allowed);
    return CUDA_ERROR_INVALID_VALUE;
  }
  const unsigned threads = block.x * block.y * block.z, registers = (function.image.registers + 7) / 8 * 8;
  if (registers * threads > 65536) {
    refuse("triton %s: %u threads of %u registers, a multiprocessor has 65536", name, threads, registers);
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  }
  check_pointers(function, arguments);
  record("triton", function.name, grid, block, shared, stream);
  return CUDA_SUCCESS;
}

// Why CUDA would refuse a tensor map, or nullptr.
const char* tensor_map_fault(CUtensorMapDataType type, cuuint32_t rank, uintptr_t address, const cuuint64_t* sizes,
                             const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                             CUtensorMapSwizzle swizzle) {
  static constexpr size_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  static constexpr size_t kSwizzled[] = {1 << 20, 32, 64, 128};
  if (rank < 1 || rank > 5) return "its rank is not 1 to 5";
  if (type >= std::size(kBytes)) return "the stand-in does not know its type";
  const size_t bytes = kBytes[type];
  if (address % 16) return "its address is no multiple of 16 bytes";
  for (unsigned i = 0; i < rank; i++) {
    if (sizes[i] == 0 || sizes[i] > (1ull << 32)) return "a size is 0 or over 2^32";
    if (box[i] == 0 || box[i] > 256) return "a side of the box is 0 or over 256";
    if (steps[i] < 1 || steps[i] > 8) return "an element stride is not 1 to 8";
  }
  for (unsigned i = 0; i + 1 < rank; i++) {
    if (strides[i] % 16 || strides[i] >= (1ull << 40)) return "a stride is no multiple of 16 bytes or over 2^40";
  }
  if (box[0] * bytes % 16) return "the box's inner side is no multiple of 16 bytes";
  if (swizzle < std::size(kSwizzled) && box[0] * bytes > kSwizzled[swizzle]) {
    return "the box's inner side is wider than the swizzle";
  }
  const int device = device_of(address);
  if (device < 0) return "its address is no device memory";
  size_t last = (sizes[0] - 1) * bytes;
  for (unsigned i = 1; i < rank; i++) last += (sizes[i] - 1) * strides[i - 1];
  return device_of(address + last) == device ? nullptr : "its end is outside of an allocation";
}

}  // namespace
}  // namespace fakecuda

using namespace fakecuda;  // NOLINT: every function below is CUDA's

FAKECUDA_EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
FAKECUDA_EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = settings().driver;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuGetErrorString(CUresult error, const char** text) {
  switch (error) {
    case CUDA_SUCCESS:
      *text = "no error";
      break;
    case CUDA_ERROR_INVALID_VALUE:
      *text = "invalid argument";
      break;
    case CUDA_ERROR_NO_BINARY_FOR_GPU:
      *text = "no kernel image is available for execution on the device";
      break;
    case CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES:
      *text = "too many resources requested for launch";
      break;
    case CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED:
      *text = "operation not permitted when stream is capturing";
      break;
    default:
      *text = "another CUDA error";
  }
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }

// --- devices and contexts

FAKECUDA_EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuDeviceGetCount(int* count) {
  *count = settings().devices;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuDeviceGetName(char* text, int size, CUdevice) {
  snprintf(text, size_t(size), "%s", settings().name.c_str());
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = device_attribute(attribute);  // the runtime's numbers are the driver's
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = context_of(current_device);
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  current_device = int(reinterpret_cast<uintptr_t>(context) - 0x100);
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 0;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
FAKECUDA_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = context_of(device);
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  const int device = device_of(pointer);
  if (device == kUnknown) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      memcpy(value, &pointer, sizeof pointer);
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: {
      const unsigned type = device == kHost ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
      memcpy(value, &type, sizeof type);
      return CUDA_SUCCESS;
    }
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      memcpy(value, &device, sizeof device);
      return CUDA_SUCCESS;
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

// --- modules and functions

FAKECUDA_EXPORT CUresult cuModuleLoadData(CUmodule* module, const void* image) { return load(module, image); }
FAKECUDA_EXPORT CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return load(module, image);
}
FAKECUDA_EXPORT CUresult cuModuleLoad(CUmodule* module, const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  fseek(file, 0, SEEK_END);
  const auto size = size_t(ftell(file));
  rewind(file);
  void* image = malloc(size);  // functions read it as long as the process runs
  const bool whole = fread(image, 1, size, file) == size;
  fclose(file);
  return whole ? load(module, image) : CUDA_ERROR_INVALID_IMAGE;
}
FAKECUDA_EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
FAKECUDA_EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  auto* made = new Function{.name = name, .image = read_kernel(reinterpret_cast<Module*>(module)->image, name)};
  *function = reinterpret_cast<CUfunction>(made);
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, CUmodule, const char*) {
  return CUDA_ERROR_NOT_FOUND;
}
FAKECUDA_EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  const KernelImage& image = reinterpret_cast<Function*>(function)->image;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : attribute == CU_FUNC_ATTRIBUTE_NUM_REGS            ? int(image.registers)
                                                                : 0;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  auto* function = reinterpret_cast<Function*>(handle);
  if (size_t(value) > shared_memory_limit()) {
    refuse("cuFuncSetAttribute %s: %d bytes of shared memory, the device has %zu", function->name.c_str(), value,
           shared_memory_limit());
    return CUDA_ERROR_INVALID_VALUE;
  }
  function->shared_allowed = value;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
FAKECUDA_EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction, int threads, size_t) {
  *blocks = threads > 0 ? 2048 / threads : 1;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 1;
  return CUDA_SUCCESS;
}
FAKECUDA_EXPORT CUresult cuLinkCreate_v2(unsigned, CUjit_option*, void**, CUlinkState*) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
FAKECUDA_EXPORT CUresult cuLinkAddData_v2(CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned,
                                          CUjit_option*, void**) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
FAKECUDA_EXPORT CUresult cuLinkComplete(CUlinkState, void**, size_t*) { return CUDA_ERROR_NOT_SUPPORTED; }

// --- launches and tensor maps

FAKECUDA_EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                        unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                                        CUstream stream, void** arguments, void**) {
  return launch(*reinterpret_cast<Function*>(function), dim3(grid_x, grid_y, grid_z), dim3(block_x, block_y, block_z),
                shared, stream, arguments);
}
FAKECUDA_EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  return launch(*reinterpret_cast<Function*>(function), dim3(config->gridDimX, config->gridDimY, config->gridDimZ),
                dim3(config->blockDimX, config->blockDimY, config->blockDimZ), config->sharedMemBytes, config->hStream,
                arguments);
}
FAKECUDA_EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned grid_x, unsigned grid_y,
                                                   unsigned grid_z, unsigned block_x, unsigned block_y,
                                                   unsigned block_z, unsigned shared, CUstream stream,
                                                   void** arguments) {
  return cuLaunchKernel(function, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream, arguments,
                        nullptr);
}
FAKECUDA_EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                                const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave,
                                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                                CUtensorMapFloatOOBfill) {
  const auto value = reinterpret_cast<uintptr_t>(address);
  if (const char* fault = tensor_map_fault(type, rank, value, sizes, strides, box, steps, swizzle)) {
    refuse("cuTensorMapEncodeTiled: %s (rank %u, box %u x %u)", fault, rank, box[0], rank > 1 ? box[1] : 0);
    return CUDA_ERROR_INVALID_VALUE;
  }
  memset(map, 0, sizeof *map);
  memcpy(map, &value, sizeof value);  // check_pointers() reads it
  return CUDA_SUCCESS;
}
