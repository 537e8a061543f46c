// Stand-in for PyTorch's header, which a PyTorch without CUDA lacks. The host is the device.
#pragma once

#include <c10/core/Device.h>

namespace c10::cuda {

struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};

}  // namespace c10::cuda
