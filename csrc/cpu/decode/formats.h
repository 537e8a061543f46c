// How the decode step stores weights: float32, bfloat16 or int8 with one scale a row.
//
// A format says how a row of weights is packed, how a vector is prepared for the products with it, and how one register
// of weights is multiplied and its products are summed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/core/vector_math.h"
#include "cpu/core/words.h"

namespace gpt_fast::decode {

// kVec words, each an int32, two int16 or two bfloat16.
#if defined(CPU_CAPABILITY_AVX512)

using Ints = __m512i;
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints load_ints(const void* x) { return _mm512_loadu_si512(x); }
inline Vec to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
// The lower and the upper bfloat16 of each word, as floats.
inline Vec lower_halves(Ints x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Vec upper_halves(Ints x) {
  return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline Ints widen_bytes(const int8_t* x) {
  return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
}
// sum + products of 16-bit integers, two neighbours at a time.
inline Ints multiply_add_pairs(Ints a, Ints b, Ints sum) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

#elif defined(CPU_CAPABILITY_AVX2)

using Ints = __m256i;
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Ints load_ints(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
inline Vec to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Vec lower_halves(Ints x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Vec upper_halves(Ints x) {
  return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline Ints widen_bytes(const int8_t* x) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
}
inline Ints multiply_add_pairs(Ints a, Ints b, Ints sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

#else  // the compiler's own vectors

typedef int32_t Ints __attribute__((vector_size(4 * kVec)));
typedef int16_t Shorts __attribute__((vector_size(4 * kVec)));
typedef int8_t Bytes __attribute__((vector_size(2 * kVec)));
template <typename T>
inline T load_as(const void* x) {
  T value;
  std::memcpy(&value, x, sizeof value);
  return value;
}
inline Ints zero_ints() { return Ints{}; }
inline Ints load_ints(const void* x) { return load_as<Ints>(x); }
inline Vec to_floats(Ints x) {
  float values[kVec];
  for (int64_t i = 0; i < kVec; ++i) values[i] = static_cast<float>(x[i]);
  return Vec::loadu(values);
}
inline Vec lower_halves(Ints x) {
  x = x << 16;
  return Vec::loadu(&x);
}
inline Vec upper_halves(Ints x) {
  x = x & static_cast<int32_t>(0xffff0000u);
  return Vec::loadu(&x);
}
inline Ints widen_bytes(const int8_t* x) { return (Ints) __builtin_convertvector(load_as<Bytes>(x), Shorts); }
inline Ints multiply_add_pairs(Ints a, Ints b, Ints sum) {
  const Shorts x = (Shorts)a, y = (Shorts)b;
  for (int64_t i = 0; i < kVec; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}

#endif

// Keeps a loaded operand in a register: left alone, GCC 12 loads it again for each product, and loads limit a tile.
template <typename T>
inline T in_a_register(T x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  asm("" : "+v"(x));
#endif
  return x;
}
inline Vec in_a_register(Vec x) {
#if defined(CPU_CAPABILITY_AVX512)
  return in_a_register(static_cast<__m512>(x));
#elif defined(CPU_CAPABILITY_AVX2)
  return in_a_register(static_cast<__m256>(x));
#else
  return x;
#endif
}

inline uint16_t round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

constexpr float kLargestFloat = std::numeric_limits<float>::max();

// max |x|, infinite or NaN if any is. As integers, which the compiler turns into vectors.
inline float largest_magnitude(const float* x, int64_t n) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  float result;
  std::memcpy(&result, &largest, sizeof result);
  return result;
}

// To the nearest integer, for |x| below 2^22: adding 1.5 * 2^23 leaves it in the low bits.
inline int32_t rounded(float x) {
  x += 0x1.8p23f;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits - 0x4b400000;
}

// Vectors of a tile (products.h): with its four rows of weights, as many sums as the registers hold beside operands.
constexpr int kMostVectors = kVec == 16 ? 6 : 3;

// Weights as they are, float32.
struct Float32 {
  static constexpr int kTileVectors = kMostVectors;
  static constexpr at::ScalarType kDtype = at::kFloat;  // of stored weights
  using weight_t = float;
  using input_t = float;
  using Sum = Vec;
  static constexpr int64_t kStep = kVec;  // weights that one step multiplies
  static constexpr int64_t kChain = int64_t{1} << 40;
  using Weights = Vec;
  using Inputs = Vec;
  static Weights load(const weight_t* w) { return in_a_register(Vec::loadu(w)); }
  static Inputs load_inputs(const input_t* x) { return in_a_register(Vec::loadu(x)); }
  static Sum zero() { return Vec(0.0f); }
  static Sum multiply(Weights w, Inputs x, Sum sum) { return at::vec::fmadd(w, x, sum); }
  static Vec finish(Sum sum) { return sum; }

  // Writes x [K], zeros up to `padded`, as `multiply` wants it; returns what the products are to be multiplied by.
  static float prepare(const float* x, int64_t K, int64_t padded, input_t* out) {
    std::memcpy(out, x, K * sizeof(float));
    std::fill(out + K, out + padded, 0.0f);
    return 1.0f;
  }

  // Writes one row of weights, zeros up to `padded`; returns the scale of the row.
  static float pack(const float* w, int64_t K, int64_t padded, weight_t* out) { return prepare(w, K, padded, out); }
};

// Weights rounded to bfloat16. Where the CPU multiplies pairs of bfloat16 the vector is rounded to bfloat16 too, else
// it stays float32, and the lower and upper halves of the weights' words are taken in turn.
struct BFloat16 {
  static constexpr int kTileVectors = kMostVectors;
  static constexpr at::ScalarType kDtype = at::kBFloat16;  // of stored weights
  using weight_t = uint16_t;
  using Sum = Vec;
  static constexpr int64_t kStep = 2 * kVec;
  static constexpr int64_t kChain = int64_t{1} << 40;
  static Sum zero() { return Vec(0.0f); }
  static Vec finish(Sum sum) { return sum; }

#if GPT_FAST_BF16_WORDS
  using input_t = uint16_t;
  using Weights = Ints;
  using Inputs = Ints;
  static Weights load(const weight_t* w) { return in_a_register(load_ints(w)); }
  static Inputs load_inputs(const input_t* x) { return in_a_register(load_ints(x)); }
  static Sum multiply(Weights w, Inputs x, Sum sum) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
  static float prepare(const float* x, int64_t K, int64_t padded, input_t* out) {
    for (int64_t k = 0; k < K; ++k) out[k] = round_to_bfloat16(x[k]);
    std::fill(out + K, out + padded, input_t(0));
    return 1.0f;
  }
#else
  struct Halves {
    Vec lower, upper;
  };
  using input_t = float;
  using Weights = Halves;
  using Inputs = Halves;
  static Weights load(const weight_t* w) {
    const Ints words = load_ints(w);
    return {lower_halves(words), upper_halves(words)};
  }
  static Inputs load_inputs(const input_t* x) { return {Vec::loadu(x), Vec::loadu(x + kVec)}; }
  static Sum multiply(Weights w, Inputs x, Sum sum) {
    return at::vec::fmadd(w.upper, x.upper, at::vec::fmadd(w.lower, x.lower, sum));
  }
  static float prepare(const float* x, int64_t K, int64_t padded, input_t* out) {
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) {
      for (int64_t i = 0; i < kVec; ++i) {
        out[k + i] = x[k + 2 * i];
        out[k + kVec + i] = x[k + 2 * i + 1];
      }
    }
    std::fill(out + k, out + padded, 0.0f);
    for (int64_t i = 0; k + i < K; ++i) out[k + i / 2 + i % 2 * kVec] = x[k + i];
    return 1.0f;
  }
#endif

  static float pack(const float* w, int64_t K, int64_t padded, weight_t* out) {
    for (int64_t k = 0; k < K; ++k) out[k] = round_to_bfloat16(w[k]);
    std::fill(out + K, out + padded, weight_t(0));
    return 1.0f;
  }
};

// Weights as int8 with one scale for a row (an output channel); the vector as int16 with one scale of its own, 2^-16 of
// its largest value at most from what it was. Products and sums are exact integers.
struct Int8 {
  static constexpr int kTileVectors = std::min(kMostVectors, 4);  // GCC 12 spills the sums of six
  static constexpr at::ScalarType kDtype = at::kChar;             // of stored weights
  using weight_t = int8_t;
  using input_t = int16_t;
  using Sum = Ints;
  static constexpr int64_t kStep = 2 * kVec;
  static constexpr int64_t kChain = 256 * kStep;  // 256 * 2 * 127 * 32767 < 2^31
  using Weights = Ints;
  using Inputs = Ints;
  static Weights load(const weight_t* w) { return in_a_register(widen_bytes(w)); }
  static Inputs load_inputs(const input_t* x) { return in_a_register(load_ints(x)); }
  static Sum zero() { return zero_ints(); }
  static Sum multiply(Weights w, Inputs x, Sum sum) { return multiply_add_pairs(w, x, sum); }
  static Vec finish(Sum sum) { return to_floats(sum); }

  static float prepare(const float* x, int64_t K, int64_t padded, input_t* out) {
    const float largest = largest_magnitude(x, K);
    if (!(largest <= kLargestFloat)) {  // the products become NaN by their scale
      std::fill(out, out + padded, input_t(1));
      return NAN;
    }
    const float inverse = largest > 0.0f ? 32767.0f / largest : 0.0f;
    for (int64_t k = 0; k < K; ++k) out[k] = static_cast<input_t>(rounded(x[k] * inverse));
    std::fill(out + K, out + padded, input_t(0));
    return largest / 32767.0f;
  }

  static float pack(const float* w, int64_t K, int64_t padded, weight_t* out) {
    const float largest = largest_magnitude(w, K);
    std::fill(out, out + padded, weight_t(0));
    if (!(largest <= kLargestFloat)) return NAN;
    const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    for (int64_t k = 0; k < K; ++k) out[k] = static_cast<weight_t>(rounded(w[k] * inverse));
    return largest / 127.0f;
  }
};

}  // namespace gpt_fast::decode
