// Matrix products with cuBLASLt's epilogues, as csrc/cuda/mlp.cpp calls them: raw pointers and a stream, no torch.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace gpt_fast {

constexpr int64_t kAlignment = 16;        // bytes; every pointer is a multiple of it
constexpr int64_t kMaskBits = 128;        // bits; cuBLASLt requires that a row of relu's mask is a multiple of it
constexpr size_t kWorkspace = 32u << 20;  // bytes; NVIDIA recommends this size for sm_90

// A matrix stored by rows: the elements of a row are neighbours, and rows start `ld` elements apart. If `transposed`,
// the matrix is stored by columns in the same way. If every size and `ld` is a multiple of 8, rows of 16-bit elements
// keep their alignment.
struct Matrix {
  void* data;
  int64_t ld;
  bool transposed;
};

inline Matrix transpose(Matrix x) { return {x.data, x.ld, !x.transposed}; }

// Function that is applied to a tile of float32 sums before they are rounded and stored.
enum class Epilogue {
  kNone,          // + bias [N]
  kRelu,          // + bias, relu; aux, if given, becomes its mask
  kGelu,          // + bias, gelu's tanh form; aux, if given, becomes its argument
  kReluGradient,  // times relu's derivative by the mask in aux; bias, if given, becomes the sum over the rows
  kGeluGradient,  // times gelu's derivative at aux; bias, if given, becomes the sum over the rows
  kSumA,          // bias [M], if given, becomes the sum of a over K
};

struct Product {
  Matrix a, b, out;   // out [M, N] = a [M, K] b [N, K]ᵀ; transposed only with kSumA, or with kNone without bias
  int64_t M, N, K;    // none of them 0
  cudaDataType type;  // CUDA_R_16BF or CUDA_R_16F, of matrices, bias and gelu's argument
  Epilogue epilogue;
  void* bias;
  // gelu's argument [M, N], whose rows are `ld_aux` elements apart, a multiple of 8. Or relu's mask, one bit for each
  // element in an order that cuBLASLt chooses, whose rows are `ld_aux` bits apart, a multiple of kMaskBits.
  void* aux;
  int64_t ld_aux;
  void* workspace;  // kWorkspace bytes
};

// Enqueues the product on a stream of the current device. cuBLASLt's heuristic chooses the algorithm once for each
// problem, and the choice is kept. No algorithm that it may choose rounds a partial sum to 16 bits or depends on
// timing. The first product on a device allocates memory, so it must not be captured in a CUDA graph.
cublasStatus_t product(const Product& problem, cudaStream_t stream);

}  // namespace gpt_fast
