#include "state.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>

namespace fakecuda {
namespace {

struct Allocation {
  size_t bytes;
  int device;
};

struct State {
  std::recursive_mutex lock;
  std::map<uintptr_t, Allocation> allocations;
  size_t used[kMaxDevices] = {};
  uintptr_t next[kMaxDevices] = {};
  Stream legacy[kMaxDevices];
  std::vector<Stream*> capturing;  // streams that a capture began on
  std::vector<Stream*> members;    // streams that joined a capture by an event
  unsigned long long captures = 0;
  std::vector<Entry> entries;
  std::vector<std::string> refusals;

  State() {
    for (int device = 0; device < kMaxDevices; device++) legacy[device].device = device;
  }
};

State& state() {
  static State* shared = new State;  // never destroyed: PyTorch frees memory while the process ends
  return *shared;
}

int environment_int(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value && *value ? atoi(value) : otherwise;
}

const char* known_name(int capability) {
  switch (capability) {
    case 75:
      return "Tesla T4";
    case 80:
      return "NVIDIA A100-SXM4-80GB";
    case 86:
      return "NVIDIA GeForce RTX 3090";
    case 89:
      return "NVIDIA GeForce RTX 4090";
    case 90:
      return "NVIDIA H100 80GB HBM3";
    case 100:
      return "NVIDIA B200";
    case 120:
      return "NVIDIA GeForce RTX 5090";
    default:
      return "NVIDIA GPU";
  }
}

int multiprocessors(int capability) {
  switch (capability) {
    case 75:
      return 40;
    case 80:
      return 108;
    case 86:
      return 82;
    case 89:
      return 128;
    case 100:
      return 148;
    case 120:
      return 170;
    default:
      return 132;
  }
}

}  // namespace

thread_local int current_device = 0;
thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

const Settings& settings() {
  static const Settings* chosen = [] {
    auto* read = new Settings;
    read->devices = environment_int("FAKECUDA_DEVICES", 1);
    read->capability = environment_int("FAKECUDA_CAPABILITY", 90);
    read->memory = size_t(environment_int("FAKECUDA_MEMORY_GB", 80)) << 30;
    read->driver = environment_int("FAKECUDA_DRIVER", 13000);
    const char* name = getenv("FAKECUDA_NAME");
    read->name = name && *name ? name : known_name(read->capability);
    read->verbose = environment_int("FAKECUDA_VERBOSE", 0) != 0;
    return read;
  }();
  return *chosen;
}

size_t shared_memory_limit() {
  switch (settings().capability) {
    case 75:
      return 64 * 1024;
    case 80:
    case 87:
      return 163 * 1024;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 * 1024;
    default:
      return 227 * 1024;
  }
}

int device_attribute(int attribute) {
  const int capability = settings().capability;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return 1024;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 2147483647;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return 48 * 1024;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return int(shared_memory_limit());
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return int(shared_memory_limit()) + 1024;
    case cudaDevAttrTotalConstantMemory:
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      return 65536;
    case cudaDevAttrWarpSize:
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      return 32;
    case cudaDevAttrClockRate:
      return 1980000;
    case cudaDevAttrMemoryClockRate:
      return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth:
      return 5120;
    case cudaDevAttrL2CacheSize:
      return 50 << 20;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      if (capability == 75) return 1024;
      return capability == 86 || capability == 89 || capability >= 120 ? 1536 : 2048;
    case cudaDevAttrMultiProcessorCount:
      return multiprocessors(capability);
    case cudaDevAttrComputeCapabilityMajor:
      return capability / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return capability % 10;
    case cudaDevAttrAsyncEngineCount:
      return 3;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
      return 1;
    default:
      return 0;
  }
}

std::recursive_mutex& state_lock() { return state().lock; }

double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}

Stream* stream_of(const void* handle) {
  const auto value = reinterpret_cast<uintptr_t>(handle);
  // 0, cudaStreamLegacy and cudaStreamPerThread; PyTorch uses the first as its default stream.
  if (value <= 2) return &state().legacy[current_device];
  return static_cast<Stream*>(const_cast<void*>(handle));
}

Stream* new_stream() {
  auto* stream = new Stream;
  stream->device = current_device;
  return stream;
}

bool is_captured(const Stream* stream) { return stream->graph != nullptr; }

bool any_capture() {
  const std::lock_guard guard(state_lock());
  return !state().capturing.empty();
}

cudaError_t begin_capture(Stream* stream, cudaStreamCaptureMode mode) {
  const std::lock_guard guard(state_lock());
  if (stream == &state().legacy[stream->device]) {
    refuse("cudaStreamBeginCapture: the stream is the default stream; expected another one");
    return cudaErrorStreamCaptureUnsupported;
  }
  if (stream->graph) {
    refuse("cudaStreamBeginCapture: the stream captures already");
    return cudaErrorIllegalState;
  }
  stream->graph = new Graph;
  stream->origin = true;
  stream->mode = mode;
  stream->owner = pthread_self();
  stream->capture = ++state().captures;
  state().capturing.push_back(stream);
  return cudaSuccess;
}

cudaError_t end_capture(Stream* stream, Graph** graph) {
  const std::lock_guard guard(state_lock());
  *graph = nullptr;
  if (!stream->graph || !stream->origin) {
    refuse("cudaStreamEndCapture: no capture began on the stream");
    return cudaErrorIllegalState;
  }
  Graph* captured = stream->graph;
  bool unjoined = false;
  std::vector<Stream*> others;
  for (Stream* member : state().members) {
    if (member->graph != captured) {
      others.push_back(member);
      continue;
    }
    unjoined |= member->work > member->joined;
    member->graph = nullptr;
  }
  state().members = others;
  stream->graph = nullptr;
  stream->origin = false;
  std::erase(state().capturing, stream);
  if (unjoined) {
    refuse("cudaStreamEndCapture: a stream that joined the capture has work that the first stream does not wait for");
    return cudaErrorStreamCaptureUnjoined;
  }
  if (captured->invalid) return cudaErrorStreamCaptureInvalidated;
  *graph = captured;
  return cudaSuccess;
}

void wait_for(Stream* stream, const Event& event) {
  const std::lock_guard guard(state_lock());
  if (!event.graph) return;
  if (stream->graph == event.graph) {  // a join
    if (event.stream && event.stream->joined < event.work) event.stream->joined = event.work;
    return;
  }
  if (stream->graph || !any_capture()) return;
  if (stream == &state().legacy[stream->device]) {
    refuse("cudaStreamWaitEvent: the default stream waits for an event of a capture");
    return;
  }
  stream->graph = event.graph;  // a fork: the stream joins the capture
  stream->joined = stream->work;
  state().members.push_back(stream);
}

void refuse(const char* format, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const std::lock_guard guard(state_lock());
  state().refusals.emplace_back(text);
  if (settings().verbose) fprintf(stderr, "fakecuda: %s\n", text);
}

bool refuse_in_capture(const char* call) {
  const std::lock_guard guard(state_lock());
  if (capture_mode == cudaStreamCaptureModeRelaxed) return false;
  for (Stream* stream : state().capturing) {
    if (stream->mode == cudaStreamCaptureModeRelaxed) continue;
    const bool own = pthread_equal(stream->owner, pthread_self());
    const bool everywhere = stream->mode == cudaStreamCaptureModeGlobal && capture_mode == cudaStreamCaptureModeGlobal;
    if (own || everywhere) {
      stream->graph->invalid = true;
      refuse("%s: a stream captures", call);
      return true;
    }
  }
  return false;
}

void record(const char* kind, const std::string& name, dim3 grid, dim3 block, size_t shared, const void* handle) {
  const std::lock_guard guard(state_lock());
  Stream* stream = stream_of(handle);
  stream->work++;
  if (stream->graph) {
    stream->graph->nodes.push_back(std::string(kind) + " " + name);
  } else {
    for (const Stream* capturing : state().capturing) {
      if (pthread_equal(capturing->owner, pthread_self())) {
        refuse("%s %s: its stream does not capture, but this thread's capture has not ended", kind, name.c_str());
        break;
      }
    }
  }
  if (stream->device != current_device) {
    refuse("%s %s: the stream is of device %d, the current device is %d", kind, name.c_str(), stream->device,
           current_device);
  }
  state().entries.push_back(
      {kind, name, grid, block, shared, current_device, stream->graph != nullptr, reinterpret_cast<uintptr_t>(handle)});
}

void record_wait(const char* call) {
  const std::lock_guard guard(state_lock());
  state().entries.push_back({"sync", call, dim3(0, 0, 0), dim3(0, 0, 0), 0, current_device, false, 0});
}

void* allocate(size_t bytes, int device) {
  const std::lock_guard guard(state_lock());
  const size_t page = 4096, rounded = (bytes + page - 1) / page * page;
  if (state().used[device] + rounded > settings().memory) return nullptr;
  uintptr_t& next = state().next[device];
  if (next == 0) next = 0x200000000000ull + (uintptr_t(device) << 42);
  // Pages appear when they are touched, so that a model of 80 GB needs no memory of the host's. They hold zeros.
  void* place = mmap(reinterpret_cast<void*>(next), rounded, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) return nullptr;
  const auto address = reinterpret_cast<uintptr_t>(place);
  next = address + rounded + (2 << 20);  // a gap, so that a pointer past an allocation belongs to none
  state().allocations[address] = {rounded, device};
  state().used[device] += rounded;
  return place;
}

bool release(void* pointer) {
  const std::lock_guard guard(state_lock());
  const auto found = state().allocations.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == state().allocations.end() || found->second.device < 0) return false;
  state().used[found->second.device] -= found->second.bytes;
  munmap(pointer, found->second.bytes);
  state().allocations.erase(found);
  return true;
}

void pin(void* pointer, size_t bytes) {
  const std::lock_guard guard(state_lock());
  state().allocations[reinterpret_cast<uintptr_t>(pointer)] = {bytes, kHost};
}

void unpin(void* pointer) {
  const std::lock_guard guard(state_lock());
  state().allocations.erase(reinterpret_cast<uintptr_t>(pointer));
}

int device_of(uintptr_t pointer) {
  const std::lock_guard guard(state_lock());
  auto after = state().allocations.upper_bound(pointer);
  if (after == state().allocations.begin()) return kUnknown;
  --after;
  return pointer < after->first + after->second.bytes ? after->second.device : kUnknown;
}

size_t bytes_in_use(int device) {
  const std::lock_guard guard(state_lock());
  return state().used[device];
}

const char* launch_fault(dim3 grid, dim3 block) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return "the grid is empty";
  if (grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    return "the grid is larger than 2147483647 x 65535 x 65535";
  const unsigned long long threads = 1ull * block.x * block.y * block.z;
  if (threads == 0 || threads > 1024) return "a block has no thread or over 1024";
  if (block.x > 1024 || block.y > 1024 || block.z > 64) return "the block is larger than 1024 x 1024 x 64";
  return nullptr;
}

}  // namespace fakecuda

// --- what record.py calls

FAKECUDA_EXPORT void fakecuda_reset() {
  const std::lock_guard guard(fakecuda::state_lock());
  fakecuda::state().entries.clear();
  fakecuda::state().refusals.clear();
}

// Write entries and refusals, one a line with tabs between its fields, into `path`. Returns 0, or -1 where that fails.
FAKECUDA_EXPORT int fakecuda_write(const char* path) {
  const std::lock_guard guard(fakecuda::state_lock());
  FILE* file = fopen(path, "w");
  if (!file) return -1;
  for (const auto& e : fakecuda::state().entries) {
    fprintf(file, "entry\t%s\t%s\t%u,%u,%u\t%u,%u,%u\t%zu\t%d\t%d\t%zx\n", e.kind.c_str(), e.name.c_str(), e.grid.x,
            e.grid.y, e.grid.z, e.block.x, e.block.y, e.block.z, e.shared, e.device, int(e.captured), size_t(e.stream));
  }
  for (const auto& refusal : fakecuda::state().refusals) fprintf(file, "refusal\t%s\n", refusal.c_str());
  return fclose(file);
}

// Called by the stubs that build.py writes.
FAKECUDA_EXPORT void fakecuda_note(const char* kind, const char* name, const void* stream) {
  fakecuda::record(kind, name, dim3(0, 0, 0), dim3(0, 0, 0), 0, stream);
}

FAKECUDA_EXPORT int fakecuda_missing(const char* name) {
  fakecuda::refuse("%s: the stand-in does not have this function", name);
  return cudaErrorNotSupported;
}
