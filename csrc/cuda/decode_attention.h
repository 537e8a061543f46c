// decode_attention in CUDA C++, as csrc/cuda/bind.cpp calls it: raw pointers and a stream, no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace gpt_fast {

enum class Element { kFloat32, kBFloat16, kFloat16 };

struct DecodeAttention {
  const void *q, *k, *v;    // q [B, H, D]; k and v [B, H, S, D]
  const int64_t* lengths;   // [B]
  void* out;                // [B, H, D], contiguous
  float *acc, *statistics;  // workspace: [B * H, splits, D] and [B * H, splits, 2]
  int64_t B, H, S, D;
  int64_t stride_q[3], stride_k[4], stride_v[4];  // in elements
  float scale;
  Element element;
};

constexpr int64_t kDecodeSplit = 256;  // keys of a block

inline int64_t decode_splits(int64_t S) { return (S + kDecodeSplit - 1) / kDecodeSplit; }

cudaError_t decode_attention(const DecodeAttention& problem, cudaStream_t stream);

}  // namespace gpt_fast
