// Attention of one query over the keys and values of a cache: for the op decode_attention and for DecodeSession.
//
// out = sum over j of softmax(q K^T)[j] V[j], in float32: the scores of all keys first, then their softmax, then the
// values. A head is one thread's work from the first key to the last, so the number of threads changes no bit.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/core/vector_math.h"

namespace gpt_fast {

// Values per pass over the keys: as many as one thread keeps in registers.
constexpr int64_t kValueVectors = 64 / kVec;
constexpr int64_t kKeysAtOnce = 4;

// `count` values from x on as float32, zeros after them.
template <typename scalar_t>
inline Vec load_floats(const scalar_t* x, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return count == kVec ? Vec::loadu(x) : Vec::loadu(x, count);
  } else {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
    if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
      if (count == kVec) {
#if defined(CPU_CAPABILITY_AVX512)
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#else
        const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#endif
      }
    }
#endif
    float values[kVec];
    at::vec::convert(x, values, count);
    return Vec::loadu(values, count);
  }
}

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

// Turns n scores into e^(score - the largest); returns what their sum is to be multiplied by to be 1.
inline float weigh_scores(float* scores, int64_t n) {
  const float largest = largest_of(scores, n);  // NaN passes on
  Vec sum(0.0f);
  for_each_vector(n, [&](int64_t i, int64_t count) {
    const Vec p = (Vec::loadu(scores + i, count) - Vec(largest)).exp();
    p.store(scores + i, count);
    sum = sum + (count == kVec ? p : Vec::set(Vec(0.0f), p, count));
  });
  return 1.0f / sum_lanes(sum);
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

  const float scale = weigh_scores(scores, n);

  int64_t d = 0;
  for (; d + kValueVectors * kVec <= D; d += kValueVectors * kVec) {
    weigh_values<kValueVectors>(scores, values + d, stride_v, n, kVec, scale, out + d);
  }
  for (; d < D; d += kVec) {
    weigh_values<1>(scores, values + d, stride_v, n, std::min(kVec, D - d), scale, out + d);
  }
}

// How many queries of one head are attended together: each key and value is then loaded once for all of them.
constexpr int kQueriesTogether = 4;

// As attend_to_cache, to the bit, for kQueriesTogether queries of one head of a float32 or bfloat16 cache, of which
// query i, D floats from q[i] on, has n[i] keys. `scratch` holds kQueriesTogether * decode_scratch(max n, D) floats.
template <typename scalar_t>
inline void attend_together(const float* const (&q)[kQueriesTogether], const scalar_t* keys, const scalar_t* values,
                            const int64_t (&n)[kQueriesTogether], int64_t D, float* scratch, float* out) {
  constexpr int Q = kQueriesTogether;
  static_assert(kKeysAtOnce == 4 && Q == 4);
  const int64_t most = *std::max_element(n, n + Q);
  float* rows = scratch + Q * most;  // for the last keys
  const auto scores_of = [&](int i) { return scratch + i * most; };
  int64_t j = 0;
  for (; j + kKeysAtOnce <= most; j += kKeysAtOnce) {
    Vec sum[Q][kKeysAtOnce];
#pragma GCC unroll 4
    for (int r = 0; r < kKeysAtOnce; ++r) {
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) sum[i][r] = Vec(0.0f);
    }
    for_each_vector(D, [&](int64_t d, int64_t count) {
      const bool whole = count == kVec;
      Vec x[Q];
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) x[i] = whole ? Vec::loadu(q[i] + d) : Vec::loadu(q[i] + d, count);
#pragma GCC unroll 4
      for (int r = 0; r < kKeysAtOnce; ++r) {
        const Vec key = load_floats(keys + (j + r) * D + d, count);
#pragma GCC unroll 4
        for (int i = 0; i < Q; ++i) sum[i][r] = at::vec::fmadd(x[i], key, sum[i][r]);
      }
    });
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) sum_lanes_of_four(sum[i], scores_of(i) + j);
  }
  for (; j < most; ++j) {
    for (int i = 0; i < Q; ++i) score_keys<1>(q[i], keys + j * D, D, D, rows, scores_of(i) + j);
  }

  float scale[Q];
  for (int i = 0; i < Q; ++i) {
    scale[i] = weigh_scores(scores_of(i), n[i]);
    std::fill(scores_of(i) + n[i], scores_of(i) + most, 0.0f);  // keys that the query does not have
  }
  for (int64_t d = 0; d < D; d += kVec) {
    const int64_t count = std::min(kVec, D - d);
    Vec sum[Q];
    for (int i = 0; i < Q; ++i) sum[i] = Vec(0.0f);
    for (j = 0; j < most; ++j) {
      const Vec value = load_floats(values + j * D + d, count);
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) sum[i] = at::vec::fmadd(Vec(scores_of(i)[j]), value, sum[i]);
    }
    for (int i = 0; i < Q; ++i) (sum[i] * Vec(scale[i])).store(out + i * D + d, count);
  }
}

}  // namespace gpt_fast
