// Matrix products with cuBLASLt's epilogues, as csrc/cuda/mlp.cpp calls them: raw pointers and a stream, no torch.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace gpt_fast {

constexpr int64_t kAlignment = 16;        // bytes, of every pointer
constexpr int64_t kMaskBits = 128;        // a row of relu's mask is a multiple of it: cuBLASLt's condition
constexpr size_t kWorkspace = 32u << 20;  // bytes; what NVIDIA recommends for sm_90

// Rows of neighbouring elements, `ld` elements from one row to the next; transposed: the same of its columns. Where
// every size and `ld` is a multiple of 8, rows of 16 bits keep their alignment.
struct Matrix {
  void* data;
  int64_t ld;
  bool transposed;
};

inline Matrix transpose(Matrix x) { return {x.data, x.ld, !x.transposed}; }

// Function of a tile of float32 sums before it is rounded and stored.
enum class Epilogue {
  kNone,          // + bias [N]
  kRelu,          // + bias, relu; aux, if given, becomes its mask
  kGelu,          // + bias, gelu's tanh form; aux, if given, becomes its argument
  kReluGradient,  // times relu's derivative by the mask in aux; bias, if given, becomes the sum over the rows
  kGeluGradient,  // times gelu's derivative at aux; bias likewise
  kSumA,          // bias becomes the sum of a over K [M]
};

struct Product {
  Matrix a, b, out;   // out [M, N] = a [M, K] b [N, K]ᵀ; only without an epilogue, or with kSumA, may out be transposed
  int64_t M, N, K;    // none of them 0
  cudaDataType type;  // CUDA_R_16BF or CUDA_R_16F, of matrices, bias and gelu's argument
  Epilogue epilogue;
  void* bias;
  // gelu's argument [M, N], `ld_aux` elements from row to row, a multiple of 8; or relu's mask, one bit an element in
  // an order that is cuBLASLt's own, `ld_aux` bits from row to row, a multiple of kMaskBits.
  void* aux;
  int64_t ld_aux;
  void* workspace;  // kWorkspace bytes
};

// Enqueues the product on a stream of the current device. The algorithm is what cuBLASLt's heuristic prefers, asked
// once for a problem and kept; none of those it may choose from rounds a partial sum to 16 bits or depends on timing.
// The first product on a device allocates, so it must not be captured in a CUDA graph.
cublasStatus_t product(const Product& problem, cudaStream_t stream);

}  // namespace gpt_fast
