// Attention of one query over the keys and values of a cache: for the op decode_attention and for DecodeSession.
//
// out = sum over j of softmax(q K^T)[j] V[j], in float32: the scores of all keys first, then their softmax, then the
// values. A head is one thread's work from the first key to the last, so the number of threads changes no bit.
#pragma once

#include <cmath>

#include "cpu/core/vector_math.h"

namespace gpt_fast {

// Values per pass over the keys: as many as one thread keeps in registers.
constexpr int64_t kValueVectors = 64 / kVec;
constexpr int64_t kKeysAtOnce = 4;

// Memory for one thread: scores of up to S keys, and rows of D elements converted to float32.
inline int64_t decode_scratch(int64_t S, int64_t D) { return S + kKeysAtOnce * D; }

// scores[r] = q . keys[r], for `count` of at most kKeysAtOnce neighbouring keys.
template <int COUNT, typename scalar_t>
inline void score_keys(const float* q, const scalar_t* keys, int64_t stride, int64_t D, float* rows, float* scores) {
  const float* row[COUNT];
  Vec sum[COUNT];
  for (int r = 0; r < COUNT; ++r) {
    row[r] = load_row(keys + r * stride, rows + r * D, D);
    sum[r] = Vec(0.0f);
  }
  for_each_vector(D, [&](int64_t d, int64_t count) {
    const Vec x = Vec::loadu(q + d, count);
    for (int r = 0; r < COUNT; ++r) sum[r] = at::vec::fmadd(x, Vec::loadu(row[r] + d, count), sum[r]);
  });
  for (int r = 0; r < COUNT; ++r) scores[r] = sum_lanes(sum[r]);
}

// out[d] = scale * sum over j of p[j] V[j][d], for COUNT vectors of columns from `values` on; `last` columns of the
// last.
template <int COUNT, typename scalar_t>
inline void weigh_values(const float* p, const scalar_t* values, int64_t stride, int64_t n, int64_t last, float scale,
                         float* out) {
  Vec sum[COUNT];
  for (int v = 0; v < COUNT; ++v) sum[v] = Vec(0.0f);
  const int64_t columns = (COUNT - 1) * kVec + last;
  float buffer[COUNT * kVec];
  for (int64_t j = 0; j < n; ++j) {
    const float* row = load_row(values + j * stride, buffer, columns);
    const Vec weight(p[j]);
    for (int v = 0; v < COUNT; ++v) {
      const Vec x = v + 1 < COUNT || last == kVec ? Vec::loadu(row + v * kVec) : Vec::loadu(row + v * kVec, last);
      sum[v] = at::vec::fmadd(weight, x, sum[v]);
    }
  }
  for (int v = 0; v < COUNT; ++v) {
    (sum[v] * Vec(scale)).store(out + v * kVec, v + 1 < COUNT ? kVec : last);
  }
}

// q holds the scale of the scores already; n keys, 1 or more; rows of the cache lie a stride apart. `scratch` holds
// decode_scratch(n, D) floats.
template <typename scalar_t>
inline void attend_to_cache(const float* q, const scalar_t* keys, int64_t stride_k, const scalar_t* values,
                            int64_t stride_v, int64_t n, int64_t D, float* scratch, float* out) {
  float* scores = scratch;
  float* rows = scratch + n;
  int64_t j = 0;
  for (; j + kKeysAtOnce <= n; j += kKeysAtOnce) {
    score_keys<kKeysAtOnce>(q, keys + j * stride_k, stride_k, D, rows, scores + j);
  }
  for (; j < n; ++j) score_keys<1>(q, keys + j * stride_k, stride_k, D, rows, scores + j);

  const float largest = largest_of(scores, n);  // NaN passes on
  Vec sum(0.0f);
  for_each_vector(n, [&](int64_t i, int64_t count) {
    const Vec p = (Vec::loadu(scores + i, count) - Vec(largest)).exp();
    p.store(scores + i, count);
    sum = sum + (count == kVec ? p : Vec::set(Vec(0.0f), p, count));
  });
  const float scale = 1.0f / sum_lanes(sum);

  int64_t d = 0;
  for (; d + kValueVectors * kVec <= D; d += kValueVectors * kVec) {
    weigh_values<kValueVectors>(scores, values + d, stride_v, n, kVec, scale, out + d);
  }
  for (; d < D; d += kVec) {
    weigh_values<1>(scores, values + d, stride_v, n, std::min(kVec, D - d), scale, out + d);
  }
}

}  // namespace gpt_fast
