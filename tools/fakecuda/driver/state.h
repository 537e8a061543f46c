// State that the stand-in's entry points share: devices, memory, streams, graphs, and the record of what was called.
//
// Invariant: every access to the state below holds `state_lock()`. `current_device`, the capture mode and the last
// error belong to a thread, as in CUDA.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#define FAKECUDA_EXPORT extern "C" __attribute__((visibility("default")))

namespace fakecuda {

constexpr int kMaxDevices = 8;
constexpr int kHost = -1;     // device_of(): pinned host memory
constexpr int kUnknown = -2;  // device_of(): memory that the stand-in did not allocate

// What FAKECUDA_* chooses. It is read once, when the library is loaded.
struct Settings {
  int devices;
  int capability;  // times ten
  size_t memory;   // bytes of each device
  int driver;      // CUDA version that the driver serves, as in 13000
  std::string name;
  bool verbose;
};
const Settings& settings();
int device_attribute(int attribute);
size_t shared_memory_limit();  // bytes that a program may opt in to

struct Graph {
  std::vector<std::string> nodes;
  bool invalid = false;  // a call in its capture was refused
};

struct Stream {
  int device = 0;
  Graph* graph = nullptr;  // that the stream captures into
  bool origin = false;     // the capture began on this stream
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  pthread_t owner{};
  unsigned long long capture = 0;
  unsigned long long work = 0;    // operations so far
  unsigned long long joined = 0;  // operations that another stream of the capture waits for
};

struct Event {
  Stream* stream = nullptr;
  Graph* graph = nullptr;  // of the capture that the event was recorded in
  unsigned long long work = 0;
  double time = 0;
};

// One thing that a device was asked to do, or that the host waited for.
struct Entry {
  std::string kind;  // kernel, triton, cublas, copy, fill, graph, callback, sync
  std::string name;
  dim3 grid, block;
  size_t shared = 0;
  int device = 0;
  bool captured = false;
  uintptr_t stream = 0;
};

std::recursive_mutex& state_lock();
extern thread_local int current_device;
extern thread_local cudaStreamCaptureMode capture_mode;

Stream* stream_of(const void* handle);  // of this device where the handle is a default stream
Stream* new_stream();
cudaError_t begin_capture(Stream* stream, cudaStreamCaptureMode mode);
cudaError_t end_capture(Stream* stream, Graph** graph);
void wait_for(Stream* stream, const Event& event);
bool is_captured(const Stream* stream);
bool any_capture();

// Record a refusal: CUDA would have returned an error.
void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
// Refuse a call that is illegal now because of a capture. Returns true if the call must fail.
bool refuse_in_capture(const char* call);
// Record work for the stream, or refuse it if the stream belongs to another device than the current one.
void record(const char* kind, const std::string& name, dim3 grid, dim3 block, size_t shared, const void* stream);
void record_wait(const char* call);  // the host waits for a device

void* allocate(size_t bytes, int device);  // nullptr where the device has no room for it
bool release(void* pointer);
void pin(void* pointer, size_t bytes);
void unpin(void* pointer);
int device_of(uintptr_t pointer);
size_t bytes_in_use(int device);
double now();

// Why CUDA would refuse a grid and a block, or nullptr.
const char* launch_fault(dim3 grid, dim3 block);

// What the image of a compiled kernel says about it.
struct KernelImage {
  std::vector<std::pair<unsigned, unsigned>> parameters;  // offset and size in bytes, by position
  unsigned registers = 0;                                 // of a thread; 0 where the image does not say
};
// Read a cubin. Returns its architecture times ten, or 0 for an image that is no cubin.
int cubin_architecture(const void* image);
KernelImage read_kernel(const void* image, const std::string& name);

}  // namespace fakecuda
