// Products of one call of an operator: tensors in layouts that cuBLASLt takes, and one workspace and stream for all.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAStream.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "cublaslt.h"

namespace gpt_fast {

inline bool is_aligned(const at::Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0;
}

// Returns x in a layout that a product takes: rows or columns of neighbours, 16 bytes apart or a multiple of it. Other
// layouts are copied.
inline at::Tensor usable(const at::Tensor& x) {
  const auto lies = [&](int64_t inner, int64_t outer) {
    return x.stride(inner) == 1 && x.stride(outer) % 8 == 0 && x.stride(outer) >= x.size(inner);
  };
  return is_aligned(x) && (lies(1, 0) || lies(0, 1)) ? x : x.clone(at::MemoryFormat::Contiguous);
}

inline at::Tensor usable_vector(const at::Tensor& x) {
  return is_aligned(x) && x.is_contiguous() ? x : x.clone(at::MemoryFormat::Contiguous);
}

inline Matrix matrix(const at::Tensor& x) {
  const bool by_rows = x.stride(1) == 1 && x.stride(0) >= x.size(1);
  return {const_cast<void*>(x.const_data_ptr()), by_rows ? x.stride(0) : x.stride(1), !by_rows};
}

// Returns x [..., C] as rows [M, C].
inline at::Tensor rows_of(const at::Tensor& x) {
  const int64_t C = x.size(-1);
  return usable(x.reshape({x.numel() / C, C}));
}

// Returns how many bits a row of relu's mask takes.
inline int64_t mask_bits(int64_t F) { return (F + kMaskBits - 1) / kMaskBits * kMaskBits; }

// The products of one call: they share operands' type, workspace and stream, and run one after the other.
class Products {
 public:
  // `op` is the name in errors. `x` gives type and device.
  Products(const char* op, const at::Tensor& x)
      : op_(op),
        type_(x.scalar_type() == at::kHalf ? CUDA_R_16F : CUDA_R_16BF),
        workspace_(at::empty({static_cast<int64_t>(kWorkspace)}, x.options().dtype(at::kByte))),
        stream_(c10::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, "gpt_fast.", op, ": x is ",
                      x.scalar_type(), ", cuBLASLt serves bfloat16 and float16");
  }

  // out = a bᵀ, with K columns each. `bias` may be undefined; `aux` is nullptr, or what the epilogue writes or reads.
  void run(Matrix a, Matrix b, const at::Tensor& out, int64_t K, Epilogue epilogue, const at::Tensor& bias,
           const at::Tensor* aux = nullptr) const {
    const bool has_mask = epilogue == Epilogue::kRelu || epilogue == Epilogue::kReluGradient;
    const Product problem{
        .a = a,
        .b = b,
        .out = matrix(out),
        .M = out.size(0),
        .N = out.size(1),
        .K = K,
        .type = type_,
        .epilogue = epilogue,
        .bias = bias.defined() ? bias.mutable_data_ptr() : nullptr,
        .aux = aux == nullptr ? nullptr : aux->mutable_data_ptr(),
        .ld_aux = aux == nullptr ? 0 : (has_mask ? mask_bits(out.size(1)) : out.size(1)),
        .workspace = workspace_.mutable_data_ptr(),
    };
    const cublasStatus_t status = product(problem, stream_);
    TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "gpt_fast.", op_, ": cuBLASLt: ", cublasLtGetStatusString(status),
                " for a product of ", problem.M, " x ", problem.N, " x ", problem.K);
  }

 private:
  const char* op_;
  cudaDataType type_;
  at::Tensor workspace_;
  cudaStream_t stream_;
};

// The products take every operand for one of x's dtype.
inline void check_dtypes(const char* op, const at::Tensor& x, std::initializer_list<std::optional<at::Tensor>> others) {
  for (const std::optional<at::Tensor>& other : others) {
    TORCH_CHECK_VALUE(!other.has_value() || other->scalar_type() == x.scalar_type(), "gpt_fast.", op,
                      ": an operand has dtype ", other->scalar_type(), "; expected ", x.scalar_type(), ", as x");
  }
}

}  // namespace gpt_fast
