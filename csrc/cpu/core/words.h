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
};
template <typename scalar_t>
using WordsOf = std::conditional_t<std::is_same_v<scalar_t, at::BFloat16>, BFloat16Words, FloatWords>;
#else
#define GPT_FAST_BF16_WORDS 0
template <typename scalar_t>
using WordsOf = FloatWords;
#endif

}  // namespace gpt_fast
