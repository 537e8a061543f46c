// decode_attention in CUDA C++: one query of each sequence attends to its cache, which is split over keys.
//
// A block takes kDecodeSplit neighbouring keys of one head. Each of its groups of lanes reads one key's row at a time,
// 16 bytes a lane, and keeps a running maximum, a sum of exponentials and an unnormalised row. The groups are merged
// through shared memory in their order, and a second kernel merges the splits in their order. All arithmetic is
// float32, with one rounding on store. The result is deterministic, because the keys that a block and a group read
// depend on positions alone. Lengths are clamped to [0, S].
#include "decode_attention.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace gpt_fast {
namespace {

constexpr int kThreads = 128;
constexpr float kLog2E = 1.44269504088896341f;

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ void store(float* out, float x) { *out = x; }
__device__ void store(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ void store(__half* out, float x) { *out = __float2half_rn(x); }

__device__ int64_t clamped(int64_t n, int64_t S) { return n < 0 ? 0 : n > S ? S : n; }

// 16 bytes of a row from element d on, as floats. Elements past D are 0.
template <typename T>
struct Chunk {
  static constexpr int kElements = 16 / sizeof(T);
  float x[kElements];

  __device__ void load(const T* row, int64_t stride, int64_t d, int64_t D, bool aligned) {
    if (aligned) {
      const uint4 words = __ldg(reinterpret_cast<const uint4*>(row + d));
      const T* values = reinterpret_cast<const T*>(&words);
#pragma unroll
      for (int e = 0; e < kElements; ++e) x[e] = to_float(values[e]);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) x[e] = d + e < D ? to_float(row[(d + e) * stride]) : 0.0f;
    }
  }
};

// Division of a row, padded to WIDTH elements, among the lanes of a group.
template <typename T, int WIDTH>
struct Layout {
  static constexpr int kElements = Chunk<T>::kElements;
  static constexpr int kLanes = WIDTH / kElements < 32 ? WIDTH / kElements : 32;  // lanes of a group
  static constexpr int kChunks = WIDTH / (kLanes * kElements);                    // chunks of a lane
  static constexpr int kGroups = kThreads / kLanes;
};

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads) attend_kernel(DecodeAttention p, bool aligned) {
  using L = Layout<T, WIDTH>;
  __shared__ float shared_m[L::kGroups], shared_l[L::kGroups], shared_acc[L::kGroups][WIDTH];
  const int64_t row = blockIdx.x, b = row / p.H, h = row % p.H, split = blockIdx.y, splits = gridDim.y;
  const int64_t n = clamped(p.lengths[b], p.S), begin = split * kDecodeSplit;
  if (begin >= n) return;  // ends the whole block; merge_kernel does not read its part
  const int64_t end = begin + kDecodeSplit < n ? begin + kDecodeSplit : n;
  const int group = threadIdx.x / L::kLanes, lane = threadIdx.x % L::kLanes;

  const T* q = static_cast<const T*>(p.q) + b * p.stride_q[0] + h * p.stride_q[1];
  const T* k = static_cast<const T*>(p.k) + b * p.stride_k[0] + h * p.stride_k[1];
  const T* v = static_cast<const T*>(p.v) + b * p.stride_v[0] + h * p.stride_v[1];
  float query[L::kChunks][L::kElements], acc[L::kChunks][L::kElements];
#pragma unroll
  for (int c = 0; c < L::kChunks; ++c) {
#pragma unroll
    for (int e = 0; e < L::kElements; ++e) {
      const int64_t d = (c * L::kLanes + lane) * L::kElements + e;
      query[c][e] = d < p.D ? to_float(q[d * p.stride_q[2]]) * p.scale * kLog2E : 0.0f;
      acc[c][e] = 0.0f;
    }
  }

  float m = -INFINITY, l = 0.0f;
  // All lanes of a warp take the same number of turns, because the shuffles below name them all.
  for (int64_t first = begin; first < end; first += L::kGroups) {
    const int64_t j = first + group;
    const bool there = j < end;
    const T* key = k + (there ? j : begin) * p.stride_k[2];
    const T* value = v + (there ? j : begin) * p.stride_v[2];
    Chunk<T> keys[L::kChunks], values[L::kChunks];
#pragma unroll
    for (int c = 0; c < L::kChunks; ++c) {
      const int64_t d = (c * L::kLanes + lane) * L::kElements;
      keys[c].load(key, p.stride_k[3], d, p.D, aligned);
      values[c].load(value, p.stride_v[3], d, p.D, aligned);
    }
    float s = 0.0f;
#pragma unroll
    for (int c = 0; c < L::kChunks; ++c) {
#pragma unroll
      for (int e = 0; e < L::kElements; ++e) s = fmaf(query[c][e], keys[c].x[e], s);
    }
#pragma unroll
    for (int offset = L::kLanes / 2; offset > 0; offset /= 2) s += __shfl_xor_sync(0xffffffffu, s, offset);
    if (there) {
      const float m_new = fmaxf(m, s), shrink = exp2f(m - m_new), weight = exp2f(s - m_new);
      l = fmaf(l, shrink, weight);
#pragma unroll
      for (int c = 0; c < L::kChunks; ++c) {
#pragma unroll
        for (int e = 0; e < L::kElements; ++e) acc[c][e] = fmaf(acc[c][e], shrink, weight * values[c].x[e]);
      }
      m = m_new;
    }
  }

  if (lane == 0) {
    shared_m[group] = m;
    shared_l[group] = l;
  }
#pragma unroll
  for (int c = 0; c < L::kChunks; ++c) {
#pragma unroll
    for (int e = 0; e < L::kElements; ++e) shared_acc[group][(c * L::kLanes + lane) * L::kElements + e] = acc[c][e];
  }
  __syncthreads();
  float largest = -INFINITY;
  for (int g = 0; g < L::kGroups; ++g) largest = fmaxf(largest, shared_m[g]);
  const int64_t part = row * splits + split;
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
    float sum = 0.0f;
    for (int g = 0; g < L::kGroups; ++g) sum = fmaf(shared_acc[g][d], exp2f(shared_m[g] - largest), sum);
    p.acc[part * p.D + d] = sum;
  }
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int g = 0; g < L::kGroups; ++g) sum = fmaf(shared_l[g], exp2f(shared_m[g] - largest), sum);
    p.statistics[2 * part] = largest;
    p.statistics[2 * part + 1] = sum;
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(DecodeAttention p, int64_t splits) {
  const int64_t row = blockIdx.x, n = clamped(p.lengths[row / p.H], p.S), used = (n + kDecodeSplit - 1) / kDecodeSplit;
  const float* statistics = p.statistics + 2 * row * splits;
  float largest = -INFINITY, l = 0.0f;
  for (int64_t s = 0; s < used; ++s) largest = fmaxf(largest, statistics[2 * s]);
  for (int64_t s = 0; s < used; ++s) l = fmaf(statistics[2 * s + 1], exp2f(statistics[2 * s] - largest), l);
  for (int64_t d = threadIdx.x; d < p.D; d += kThreads) {
    float sum = 0.0f;
    for (int64_t s = 0; s < used; ++s) {
      sum = fmaf(p.acc[(row * splits + s) * p.D + d], exp2f(statistics[2 * s] - largest), sum);
    }
    store(static_cast<T*>(p.out) + row * p.D + d, used > 0 ? sum / l : 0.0f);
  }
}

// Returns true if rows can be read 16 bytes at a time: whole chunks, at aligned addresses.
template <typename T, int WIDTH>
bool is_aligned(const DecodeAttention& p) {
  bool aligned = p.D == WIDTH;
  for (const auto* cache : {&p.k, &p.v}) aligned = aligned && reinterpret_cast<uintptr_t>(*cache) % 16 == 0;
  for (const auto* strides : {&p.stride_k, &p.stride_v}) {
    aligned = aligned && (*strides)[3] == 1;
    for (int i = 0; i < 3; ++i) aligned = aligned && (*strides)[i] % Chunk<T>::kElements == 0;
  }
  return aligned;
}

template <typename T, int WIDTH>
void launch(const DecodeAttention& p, cudaStream_t stream) {
  const int64_t splits = decode_splits(p.S);
  const dim3 grid(static_cast<unsigned>(p.B * p.H), static_cast<unsigned>(splits));
  if (splits > 0) attend_kernel<T, WIDTH><<<grid, kThreads, 0, stream>>>(p, is_aligned<T, WIDTH>(p));
  merge_kernel<T><<<grid.x, kThreads, 0, stream>>>(p, splits);
}

template <typename T>
void launch(const DecodeAttention& p, cudaStream_t stream) {
  if (p.D <= 32) return launch<T, 32>(p, stream);
  if (p.D <= 64) return launch<T, 64>(p, stream);
  if (p.D <= 128) return launch<T, 128>(p, stream);
  launch<T, 256>(p, stream);
}

}  // namespace

cudaError_t decode_attention(const DecodeAttention& p, cudaStream_t stream) {
  switch (p.element) {
    case Element::kFloat32:
      launch<float>(p, stream);
      break;
    case Element::kBFloat16:
      launch<__nv_bfloat16>(p, stream);
      break;
    case Element::kFloat16:
      launch<__half>(p, stream);
      break;
  }
  return cudaGetLastError();
}

}  // namespace gpt_fast
