// The operands of packed products: 32-bit words. A word is one float, or two bfloat16 if the CPU multiplies them.
#pragma once

#include "cpu/core/common.h"

namespace gpt_fast {

// A word is one float.
struct FloatWords {
  static constexpr int64_t kPair = 1;
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return at::vec::fmadd(a, b, sum); }
};

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define GPT_FAST_BF16_WORDS 1
// A word is two bfloat16 neighbours along the summed axis: sum + a0 * b0 + a1 * b1.
struct BFloat16Words {
  static constexpr int64_t kPair = 2;
  static Vec multiply_add(Vec a, Vec b, Vec sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh) static_cast<__m512>(a), (__m512bh) static_cast<__m512>(b));
  }

  // Rounds 2 kVec neighbours to kVec words.
  static Vec round(Vec first, Vec second) { return (__m512)_mm512_cvtne2ps_pbh(second, first); }

  // Returns kVec words, each of an element of `even` and the one below it in `odd`. float32 elements are rounded.
  template <typename source_t>
  static Vec join(const source_t* even, const source_t* odd) {
    const __m512i low = _mm512_cvtepu16_epi32(bits(even)), high = _mm512_cvtepu16_epi32(bits(odd));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

 private:
  static __m256i bits(const at::BFloat16* row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)); }
  static __m256i bits(const float* row) { return (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(row)); }
};
template <typename scalar_t>
using WordsOf = std::conditional_t<std::is_same_v<scalar_t, at::BFloat16>, BFloat16Words, FloatWords>;
#else
#define GPT_FAST_BF16_WORDS 0
template <typename scalar_t>
using WordsOf = FloatWords;
#endif

}  // namespace gpt_fast
