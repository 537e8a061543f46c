// Attention of one query over the keys and values of a cache, for the op decode_attention and for DecodeSession.
//
// out = sum over j of softmax(q K^T)[j] V[j], in float32. The scores of all keys are computed first, then their
// softmax, then the sum of the values. One thread computes a head from the first key to the last, so results do not
// depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>

#include "cpu/core/vector_math.h"

namespace gpt_fast {

// Vectors of columns in one pass over the values: as many sums as one thread keeps in registers.
constexpr int64_t kValueVectors = 64 / kVec;
constexpr int64_t kKeysAtOnce = 4;

// Returns `count` values from x on as float32, with zeros in the lanes after them.
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

// Returns the floats of memory that one thread needs: scores of up to S keys, and converted rows of D elements.
inline int64_t decode_scratch(int64_t S, int64_t D) { return S + kKeysAtOnce * D; }

// scores[r] = q . keys[r] for COUNT neighbouring keys. `rows` is memory for keys converted to float32.
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
  if constexpr (COUNT == 4) {
    sum_lanes_of_four(sum, scores);
  } else {
    for (int r = 0; r < COUNT; ++r) scores[r] = sum_lanes(sum[r]);
  }
}

// out[d] = scale * sum over j of p[j] V[j][d], for COUNT vectors of columns from `values` on. The last vector has
// `last` columns.
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

// Turns n scores into e^(score - largest score). Returns 1 / their sum, the factor that makes them a softmax.
inline float weigh_scores(float* scores, int64_t n) {
  const float largest = largest_of(scores, n);  // NaN if a score is NaN
  Vec sum(0.0f);
  for_each_vector(n, [&](int64_t i, int64_t count) {
    const Vec p = exp(Vec::loadu(scores + i, count) - Vec(largest));
    p.store(scores + i, count);
    sum = sum + (count == kVec ? p : Vec::set(Vec(0.0f), p, count));
  });
  return 1.0f / sum_lanes(sum);
}

// Attends to n >= 1 keys of a cache. q is already multiplied by the scale of the scores. Rows of the cache are stride_k
// and stride_v elements apart. `scratch` holds decode_scratch(n, D) floats.
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

// Queries of one head that attend_together computes at once, one in each lane. Fewer queries than kFewestTogether are
// not worth it. Without AVX2 or AVX-512, sum_lanes may add in another order than add_lanes, so queries are never
// computed together.
constexpr int64_t kQueriesTogether = kVec;
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kFewestTogether = kVec / 4;
#else
constexpr int64_t kFewestTogether = kQueriesTogether + 1;
#endif

// Returns the floats of memory for attend_together: scores, keys or values as float32, and the queries side by side.
inline int64_t together_scratch(int64_t S, int64_t D) {
  return kQueriesTogether * (round_up(S, kVec) + D) + round_up(S, kVec) * D;
}

// Computes dot products of the queries, one in each lane, with KEYS keys. A dot product has kVec partial sums: partial
// sum l adds the elements l, l + kVec, and so on. This call adds the partial sums LANE, LANE + STEP, and so on, in the
// order in which sum_lanes adds lanes.
template <int KEYS, int64_t LANE, int64_t STEP>
[[gnu::always_inline]] inline void add_lanes(const float* queries, const float* keys, int64_t D, Vec (&sum)[KEYS]) {
  if constexpr (STEP == kVec) {
    for (int j = 0; j < KEYS; ++j) sum[j] = Vec(0.0f);
    for (int64_t d = LANE; d < D; d += kVec) {
      const Vec query = Vec::loadu(queries + d * kQueriesTogether);
#pragma GCC unroll 4
      for (int j = 0; j < KEYS; ++j) sum[j] = at::vec::fmadd(query, Vec(keys[j * D + d]), sum[j]);
    }
  } else {
    Vec other[KEYS];
    add_lanes<KEYS, LANE, 2 * STEP>(queries, keys, D, sum);
    add_lanes<KEYS, LANE + STEP, 2 * STEP>(queries, keys, D, other);
    for (int j = 0; j < KEYS; ++j) sum[j] = sum[j] + other[j];
  }
}

// out[i][d] = sum over j of p[i][j] V[j][d], for QUERIES rows of p, `stride` apart, and VECTORS vectors of columns.
template <int QUERIES, int VECTORS>
[[gnu::noinline]] void weigh_values_together(const float* p, int64_t stride, const float* values, int64_t n, int64_t D,
                                             float* out) {
  Vec sum[QUERIES][VECTORS];
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[i][v] = Vec(0.0f);
  }
  for (int64_t j = 0; j < n; ++j) {
    Vec value[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) value[v] = in_register(Vec::loadu(values + j * D + v * kVec));
#pragma GCC unroll 8
    for (int i = 0; i < QUERIES; ++i) {
      const Vec weight(p[i * stride + j]);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = at::vec::fmadd(weight, value[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < QUERIES; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[i][v].store(out + i * D + v * kVec);
  }
}

// Computes what attend_to_cache computes, to the bit, for `count` queries of one head, at most kQueriesTogether. Query
// i starts at q + i * stride and has `first` + i keys. D is a multiple of kVec. `scratch` holds together_scratch(n, D)
// floats for the n keys of the last query.
template <typename scalar_t>
inline void attend_together(const float* q, int64_t stride, int64_t count, const scalar_t* keys, const scalar_t* values,
                            int64_t first, int64_t D, float* scratch, float* out) {
  constexpr int64_t Q = kQueriesTogether, KEYS = 4;
  constexpr int VECTORS = kVec == 16 ? 4 : 2, QUERIES = kVec == 16 ? 6 : 4;
  const int64_t n = first + count - 1, padded = round_up(n, kVec);
  float* const scores = scratch;               // [Q, padded]
  float* const queries = scores + Q * padded;  // [D, Q]
  float* const rows = queries + Q * D;         // [padded, D]
  for (int64_t d = 0; d < D; ++d) {
    for (int64_t i = 0; i < Q; ++i) queries[d * Q + i] = i < count ? q[i * stride + d] : 0.0f;
  }

  alignas(64) float tile[kVec * Q];  // [keys, queries]
  for (int64_t j = 0; j < padded; j += kVec) {
    const int64_t here = std::min(kVec, n - j);
    const float* block = here == kVec ? load_row(keys + j * D, rows, kVec * D) : rows;
    if (here < kVec) {
      at::vec::convert(keys + j * D, rows, here * D);
      std::fill(rows + here * D, rows + kVec * D, 0.0f);
    }
    for (int64_t own = 0; own < kVec; own += KEYS) {
      Vec sum[KEYS];
      add_lanes<KEYS, 0, 1>(queries, block + own * D, D, sum);
      for (int64_t key = 0; key < KEYS; ++key) sum[key].store(tile + (own + key) * Q);
    }
    at::vec::transpose_mxn<float, kVec, kVec>(tile, Q, scores + j, padded);
  }

  float scale[Q];
  for (int64_t i = 0; i < count; ++i) {
    scale[i] = weigh_scores(scores + i * padded, first + i);
    std::fill(scores + i * padded + first + i, scores + (i + 1) * padded, 0.0f);  // keys that the query does not have
  }

  const float* const value_rows = load_row(values, rows, n * D);
  for (int64_t d = 0; d < D;) {
    const auto columns = [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      int64_t i = 0;
      const auto add = [&](auto number) {
        weigh_values_together<decltype(number)::value, V>(scores + i * padded, padded, value_rows + d, n, D,
                                                          out + i * D + d);
        i += decltype(number)::value;
      };
      while (count - i >= QUERIES && count - i != 8) add(std::integral_constant<int, QUERIES>{});
      while (count - i >= 4) add(std::integral_constant<int, 4>{});
      while (count - i >= 1) add(std::integral_constant<int, 1>{});
      d += V * kVec;
    };
    if (D - d >= VECTORS * kVec) {
      columns(std::integral_constant<int, VECTORS>{});
    } else {
      columns(std::integral_constant<int, 1>{});
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    at::vec::map<float>([&](Vec x) { return x * Vec(scale[i]); }, out + i * D, out + i * D, D);
  }
}

}  // namespace gpt_fast
