// Elementary functions of vectors. They are inlined, because a call of a library function spills the registers around
// it.
#pragma once

#include <limits>

#include "cpu/core/common.h"

namespace gpt_fast {

inline Vec add(Vec a, Vec b) { return a + b; }

inline float sum_lanes(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256 lanes = x;
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
#else
  return at::vec::vec_reduce_all<float>(add, x);
#endif
}

// out[i] = sum_lanes(x[i]), with the same bits and a third of the instructions.
inline void sum_lanes_of_four(const Vec (&x)[4], float* out) {
#if defined(CPU_CAPABILITY_AVX512)
  const auto halves = [](__m512 a, __m512 b) {  // [a: 8 sums, b: 8 sums]
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 a = halves(x[0], x[1]), b = halves(x[2], x[3]);
  __m512 sum = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));  // 4 sums each
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0x4e));
  sum = _mm512_add_ps(sum, _mm512_permute_ps(sum, 0xb1));
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, sum)));
#elif defined(CPU_CAPABILITY_AVX2)
  const auto halves = [](__m256 a, __m256 b) {  // [a: 4 sums, b: 4 sums]
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
  };
  const __m256 a = halves(x[0], x[2]), b = halves(x[1], x[3]);
  __m256 sum = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));  // [0 1 0 1, 2 3 2 3]
  sum = _mm256_add_ps(sum, _mm256_permute_ps(sum, 0x4e));
  _mm_storeu_ps(out, _mm_movelh_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = sum_lanes(x[i]);
#endif
}

// Returns the largest of n values, or NaN if one of them is NaN.
inline float largest_of(const float* x, int64_t n) {
  return at::vec::reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, x, n);
}

// Return the smaller and the larger of a and b, or b if either is NaN. at::vec's own functions spend three instructions
// on NaN.
inline Vec min_or_second(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_min_ps(a, b);
#else
  return Vec::blendv(b, a, a < b);
#endif
}

inline Vec max_or_second(Vec a, Vec b) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_max_ps(a, b);
#else
  return Vec::blendv(b, a, a > b);
#endif
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// Rounds to a whole number, because the sum with 1.5 * 2^23 has no bits for a fraction.
inline Vec round_whole(Vec x) {
  const Vec shift(0x1.8p23f);
  return (x + shift) - shift;
}

// Returns 2^f for f in [-1/2, 1/2]; the polynomial has a relative error of 2e-9.
inline Vec exp2_fraction(Vec f) {
  Vec y = at::vec::fmadd(Vec(0x1.41fbbap-13f), f, Vec(0x1.5f3e54p-10f));
  y = at::vec::fmadd(y, f, Vec(0x1.3b2d4cp-7f));
  y = at::vec::fmadd(y, f, Vec(0x1.c6aee8p-5f));
  y = at::vec::fmadd(y, f, Vec(0x1.ebfbdcp-3f));
  y = at::vec::fmadd(y, f, Vec(0x1.62e430p-1f));
  return at::vec::fmadd(y, f, Vec(1.0f));
}

// Returns 2^whole y, or 0 where x is below `least`.
inline Vec scale_exp2(Vec y, Vec whole, Vec x, float least) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ), y, whole);
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, _mm256_set1_ps(least), _CMP_NLT_UQ));
#endif
}
#endif

// Returns 2^x to 1.4 units in the last place for x up to 126, and 0 for x below -125, as for -inf.
inline Vec exp2(Vec x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const Vec whole = round_whole(x);
  return scale_exp2(exp2_fraction(x - whole), whole, x, -125.0f);
#else
  return (x * Vec(0.693147180559945309f)).exp();
#endif
}

// Returns e^x to 1.2 units in the last place. The result is 0 for x below -86, and inf where e^x exceeds the largest
// float.
inline Vec exp(Vec x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  const Vec log2e(0x1.715476p+0f), whole = round_whole(x * log2e);
  // The float log2e has an error of 1.9e-8. Times x it would be 40 units in the last place of e^88: fmadd corrects it.
  const Vec f = at::vec::fmadd(x, Vec(0x1.4ae0cp-26f), at::vec::fmsub(x, log2e, whole));
  const Vec y = scale_exp2(exp2_fraction(f), whole, x, -86.0f);
  return Vec::blendv(y, Vec(std::numeric_limits<float>::infinity()), x > Vec(88.72283f));
#else
  return x.exp();
#endif
}

}  // namespace gpt_fast
