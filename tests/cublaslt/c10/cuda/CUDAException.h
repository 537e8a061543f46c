// Stand-in for PyTorch's header, which a PyTorch without CUDA lacks. The host is the device.
#pragma once

#include <c10/util/Exception.h>
#include <cuda_runtime_api.h>

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess, "CUDA")
