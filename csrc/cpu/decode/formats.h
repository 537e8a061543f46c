// Formats of weights in the decode step: float32, bfloat16, or int8 with one scale for each row.
//
// Weights, and the vectors that they multiply, are read as 32-bit words: one float, two bfloat16 or four int8
// neighbours along the summed axis. A format turns a row of weights, or a vector, into words. It multiplies a register
// of words, one row in each lane, by a word of a vector.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/core/vector_math.h"
#include "cpu/core/words.h"

namespace gpt_fast::decode {

using Word = int32_t;

// A register of kVec words, whatever the words hold.
#if defined(CPU_CAPABILITY_AVX512)

using Ints = __m512i;
inline Ints load_words(const Word* x) { return _mm512_loadu_si512(x); }
inline Ints broadcast(Word x) { return _mm512_set1_epi32(x); }
inline Vec to_floats(Ints x) { return _mm512_cvtepi32_ps(x); }
inline Vec as_floats(Ints x) { return _mm512_castsi512_ps(x); }
// Return the lower and the upper bfloat16 of each word, as floats.
inline Vec lower_halves(Ints x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Vec upper_halves(Ints x) { return _mm512_castsi512_ps(_mm512_and_si512(x, broadcast(-0x10000))); }
// Return bytes 0 and 2 of each word, and bytes 1 and 3, as 16-bit integers.
inline Ints even_bytes(Ints x) { return _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8); }
inline Ints odd_bytes(Ints x) { return _mm512_srai_epi16(x, 8); }
// Returns sum + a0 * b0 + a1 * b1, where each word holds two 16-bit integers.
inline Ints multiply_add_pairs(Ints a, Ints b, Ints sum) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(sum, a, b);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

#elif defined(CPU_CAPABILITY_AVX2)

using Ints = __m256i;
inline Ints load_words(const Word* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline Ints broadcast(Word x) { return _mm256_set1_epi32(x); }
inline Vec to_floats(Ints x) { return _mm256_cvtepi32_ps(x); }
inline Vec as_floats(Ints x) { return _mm256_castsi256_ps(x); }
inline Vec lower_halves(Ints x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Vec upper_halves(Ints x) { return _mm256_castsi256_ps(_mm256_and_si256(x, broadcast(-0x10000))); }
inline Ints even_bytes(Ints x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
inline Ints odd_bytes(Ints x) { return _mm256_srai_epi16(x, 8); }
inline Ints multiply_add_pairs(Ints a, Ints b, Ints sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

#else  // the compiler's own vectors

typedef int32_t Ints __attribute__((vector_size(4 * kVec)));
typedef int16_t Shorts __attribute__((vector_size(4 * kVec)));
inline Ints load_words(const Word* x) {
  Ints words;
  std::memcpy(&words, x, sizeof words);
  return words;
}
inline Ints broadcast(Word x) { return Ints{} + x; }
inline Vec to_floats(Ints x) {
  float values[kVec];
  for (int64_t i = 0; i < kVec; ++i) values[i] = static_cast<float>(x[i]);
  return Vec::loadu(values);
}
inline Vec as_floats(Ints x) { return Vec::loadu(&x); }
inline Vec lower_halves(Ints x) { return as_floats(x << 16); }
inline Vec upper_halves(Ints x) { return as_floats(x & -0x10000); }
inline Ints even_bytes(Ints x) { return (Ints)((Shorts)((Shorts)x << 8) >> 8); }
inline Ints odd_bytes(Ints x) { return (Ints)((Shorts)x >> 8); }
inline Ints multiply_add_pairs(Ints a, Ints b, Ints sum) {
  const Shorts x = (Shorts)a, y = (Shorts)b;
  for (int64_t i = 0; i < kVec; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
}

#endif

// Keeps an operand in a register. GCC 12 would load it again for each product, and loads limit a tile.
inline Ints in_a_register(Ints x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  asm("" : "+v"(x));
#endif
  return x;
}

inline Vec broadcast_float(const Word* x) {
  float value;
  std::memcpy(&value, x, sizeof value);
  return Vec(value);
}

inline uint16_t round_to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// Writes n values rounded to bfloat16, two in each word. `begin` is the index of the first one in `out`, in 16-bit
// halves.
inline void pack_bfloat16(const float* x, int64_t n, Word* out, int64_t begin = 0) {
  uint16_t* halves = reinterpret_cast<uint16_t*>(out) + begin;
  for (int64_t k = 0; k < n; ++k) halves[k] = round_to_bfloat16(x[k]);
}

constexpr float kLargestFloat = std::numeric_limits<float>::max();

// Returns max |x|, which is infinite or NaN if an element is. The bits are compared as integers, because the compiler
// turns that into vector code.
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

// Rounds to the nearest integer, for |x| below 2^22: the sum with 1.5 * 2^23 has the integer in its low bits.
inline int32_t rounded(float x) {
  x += 0x1.8p23f;
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits - 0x4b400000;
}

// Rounding of values up to `largest` to integers up to `most`. A value is multiplied by `inverse` and rounded; the
// integer i then stands for i * `step`. If the step is no normal number, all values become 0.
struct Quantiser {
  Quantiser(float largest, float most) : inverse(0.0f), step(largest / most) {
    if (step < std::numeric_limits<float>::min()) {
      step = 1.0f;
    } else {
      inverse = most / largest;
    }
  }
  float inverse, step;
};

// Panels of a tile (products.h). With kTileVectors vectors, a tile has as many sums as the registers hold beside the
// operands.
constexpr int kTilePanels = kVec == 16 ? 4 : 2;

// Weights stored as float32.
struct Float32 {
  static constexpr int kTileVectors = 6;
  static constexpr at::ScalarType kDtype = at::kFloat;  // dtype of stored weights
  static constexpr int64_t kPer = 1;                    // weights in a word
  static constexpr int64_t kInputWords = 1;             // words of a vector for one word of weights
  static constexpr int64_t kChain = 512;                // words that one register sums up
  static constexpr bool kScaled = false;                // true if every whole row or vector has a scale
  using Sum = Vec;
  using Weights = Vec;
  using Input = Vec;
  static Weights load(const Word* w) { return as_floats(in_a_register(load_words(w))); }
  static Input load_input(const Word* x) { return broadcast_float(x); }
  static Sum start(Word) { return Vec(0.0f); }
  static Sum multiply(Weights w, Input x, Sum sum) { return at::vec::fmadd(w, x, sum); }
  static Vec finish(Sum sum) { return sum; }

  // Writes the vector x [K] as words, with zeros up to `words`. Returns the vector's scale, by which its products are
  // multiplied.
  static float prepare(const float* x, int64_t K, int64_t words, Word* out) {
    prepare_part(x, 0, K, K, words, out);
    return 1.0f;
  }

  // Writes the values `begin` to `begin + count` of a vector [K] into its words. The call for the last values also
  // writes the zeros after them.
  static void prepare_part(const float* x, int64_t begin, int64_t count, int64_t K, int64_t words, Word* out) {
    std::memcpy(out + begin, x, count * sizeof(float));
    if (begin + count == K) std::fill(out + K, out + words, 0);
  }

  // Writes a row of weights [K] as words, with zeros up to `words`. Returns the scale of the row.
  static float pack(const float* w, int64_t K, int64_t words, Word* out) { return prepare(w, K, words, out); }
};

// Weights rounded to bfloat16. If the CPU multiplies pairs of bfloat16, the vector is rounded to bfloat16 too. Else it
// stays float32, and the two halves of the weights' words are multiplied one after the other.
struct BFloat16 {
  static constexpr at::ScalarType kDtype = at::kBFloat16;
  static constexpr int64_t kPer = 2;
  static constexpr int64_t kChain = 512;
  static constexpr bool kScaled = false;
  using Sum = Vec;
  static Sum start(Word) { return Vec(0.0f); }
  static Vec finish(Sum sum) { return sum; }

#if GPT_FAST_BF16_WORDS
  static constexpr int kTileVectors = 6;
  static constexpr int64_t kInputWords = 1;
  using Weights = Ints;
  using Input = Ints;
  static Weights load(const Word* w) { return in_a_register(load_words(w)); }
  static Input load_input(const Word* x) { return broadcast(*x); }
  static Sum multiply(Weights w, Input x, Sum sum) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
  static void prepare_part(const float* x, int64_t begin, int64_t count, int64_t K, int64_t words, Word* out) {
    if (begin + count == K) std::fill(out + K / kPer, out + words, 0);
    pack_bfloat16(x, count, out, begin);
  }
#else
  static constexpr int kTileVectors = 4;
  static constexpr int64_t kInputWords = 2;
  struct Weights {
    Vec lower, upper;
  };
  struct Input {
    Vec lower, upper;
  };
  static Weights load(const Word* w) {
    const Ints words = in_a_register(load_words(w));
    return {lower_halves(words), upper_halves(words)};
  }
  static Input load_input(const Word* x) { return {broadcast_float(x), broadcast_float(x + 1)}; }
  static Sum multiply(Weights w, Input x, Sum sum) {
    return at::vec::fmadd(w.upper, x.upper, at::vec::fmadd(w.lower, x.lower, sum));
  }
  static void prepare_part(const float* x, int64_t begin, int64_t count, int64_t K, int64_t words, Word* out) {
    Float32::prepare_part(x, begin, count, K, 2 * words, out);
  }
#endif

  static float prepare(const float* x, int64_t K, int64_t words, Word* out) {
    prepare_part(x, 0, K, K, words, out);
    return 1.0f;
  }

  static float pack(const float* w, int64_t K, int64_t words, Word* out) {
    std::fill(out + K / kPer, out + words, 0);
    pack_bfloat16(w, K, out);
    return 1.0f;
  }
};

// Weights as int8 with one scale for each row (output channel). The vector is stored as integers of BITS bits, with a
// scale of its own. Products, and their sums over a chain, are exact integers.
template <int BITS>
struct Int8 {
  static_assert(BITS == 8 || BITS == 16);
  static constexpr int kTileVectors = 4;  // with six, GCC 12 would spill the sums
  static constexpr at::ScalarType kDtype = at::kChar;
  static constexpr int64_t kPer = 4;
  static constexpr int64_t kChain = BITS == 8 ? 512 : 128;  // a chain fits int32: 512 * 127 * 32767 < 2^31
  static constexpr bool kScaled = true;
  static constexpr float kLargest = BITS == 8 ? 127.0f : 32767.0f;
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
  static constexpr bool kMultipliesBytes = BITS == 8;
#else
  static constexpr bool kMultipliesBytes = false;
#endif
  static constexpr int64_t kInputWords = kMultipliesBytes ? 1 : 2;
  using Sum = Ints;
  struct Pairs {  // 16-bit integers: elements 0 and 2 of each four, and elements 1 and 3
    Ints even, odd;
  };
  using Weights = std::conditional_t<kMultipliesBytes, Ints, Pairs>;
  using Input = std::conditional_t<kMultipliesBytes, Ints, Pairs>;

  // The instruction that multiplies bytes takes unsigned weights: they become w + 128, and sums begin at -128 sum(x).
  static Weights load(const Word* w) {
    const Ints words = in_a_register(load_words(w));
    if constexpr (kMultipliesBytes) {
      return in_a_register(words ^ broadcast(static_cast<Word>(0x80808080u)));
    } else {
      return {even_bytes(words), odd_bytes(words)};
    }
  }
  static Input load_input(const Word* x) {
    if constexpr (kMultipliesBytes) {
      return in_a_register(broadcast(*x));
    } else {
      return {broadcast(x[0]), broadcast(x[1])};
    }
  }
  static Sum start(Word sum_of_inputs) { return broadcast(kMultipliesBytes ? -128 * sum_of_inputs : 0); }
  static Sum multiply(Weights w, Input x, Sum sum) {
    if constexpr (kMultipliesBytes) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)
      return _mm512_dpbusd_epi32(sum, w, x);
#endif
    } else {
      return multiply_add_pairs(w.odd, x.odd, multiply_add_pairs(w.even, x.even, sum));
    }
  }
  static Vec finish(Sum sum) { return to_floats(sum); }

  // Writes the vector as words, and after them the sums of its integers, one for each chain.
  static float prepare(const float* x, int64_t K, int64_t words, Word* out) {
    const float largest = largest_magnitude(x, K);
    std::fill(out, out + words * kInputWords + words / kChain + 1, 0);
    if (!(largest <= kLargestFloat)) return NAN;  // a scale of NaN makes the products NaN
    const auto [inverse, step] = Quantiser(largest, kLargest);
    if constexpr (kMultipliesBytes) {
      int8_t* bytes = reinterpret_cast<int8_t*>(out);
      for (int64_t k = 0; k < K; ++k) bytes[k] = static_cast<int8_t>(rounded(x[k] * inverse));
      for (int64_t begin = 0; begin < words; begin += kChain) {
        Word sum = 0;
        for (int64_t k = begin * kPer; k < std::min(words, begin + kChain) * kPer; ++k) sum += bytes[k];
        out[words + begin / kChain] = sum;
      }
    } else {
      int16_t* halves = reinterpret_cast<int16_t*>(out);  // each four neighbours are stored in the order 0 2 1 3
      for (int64_t k = 0; k < K; ++k) {
        halves[k / 4 * 4 + k % 2 * 2 + k % 4 / 2] = static_cast<int16_t>(rounded(x[k] * inverse));
      }
    }
    return step;
  }

  static float pack(const float* w, int64_t K, int64_t words, Word* out) {
    const float largest = largest_magnitude(w, K);
    std::fill(out, out + words, 0);
    if (!(largest <= kLargestFloat)) return NAN;
    const auto [inverse, step] = Quantiser(largest, 127.0f);
    int8_t* bytes = reinterpret_cast<int8_t*>(out);
    for (int64_t k = 0; k < K; ++k) bytes[k] = static_cast<int8_t>(rounded(w[k] * inverse));
    return step;
  }
};

}  // namespace gpt_fast::decode
