// The dropout generator: philox4x32-7 of Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
//
// An element's 16 random bits depend on seed, site and coordinates alone; gpt_fast/reference.py states the rule.
// `philox` works on kLanes neighbouring counters at once, in loops that the compiler turns into vector code.
// PhiloxEight does the same for eight counters with AVX2 instructions.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace gpt_fast {

constexpr int kLanes = 16;
constexpr int kPhiloxRounds = 7;

struct PhiloxKey {
  uint32_t k0, k1;
  explicit PhiloxKey(int64_t seed)
      : k0(static_cast<uint32_t>(seed)), k1(static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)) {}
};

// words[w][l] is word w at the counter (c0 + l, c1, c2, c3).
inline void philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, PhiloxKey key, uint32_t words[4][kLanes]) {
  uint32_t x0[kLanes], x1[kLanes], x2[kLanes], x3[kLanes];
  for (int l = 0; l < kLanes; ++l) {
    x0[l] = c0 + static_cast<uint32_t>(l);
    x1[l] = c1;
    x2[l] = c2;
    x3[l] = c3;
  }
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t p0 = static_cast<uint64_t>(x0[l]) * 0xD2511F53u;
      const uint64_t p1 = static_cast<uint64_t>(x2[l]) * 0xCD9E8D57u;
      x0[l] = static_cast<uint32_t>(p1 >> 32) ^ x1[l] ^ key.k0;
      x2[l] = static_cast<uint32_t>(p0 >> 32) ^ x3[l] ^ key.k1;
      x1[l] = static_cast<uint32_t>(p1);
      x3[l] = static_cast<uint32_t>(p0);
    }
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  std::memcpy(words[0], x0, sizeof x0);
  std::memcpy(words[1], x1, sizeof x1);
  std::memcpy(words[2], x2, sizeof x2);
  std::memcpy(words[3], x3, sizeof x3);
}

#if defined(__AVX2__)
enum class Along { kC0, kC1 };

// Philox words at eight neighbouring counters. ALONG names the counter word, c0 or c1, that counts up from the given
// value.
template <Along ALONG>
class PhiloxEight {
 public:
  PhiloxEight(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, PhiloxKey key) {
    const __m256i steps[2] = {_mm256_set_epi64x(5, 4, 1, 0), _mm256_set_epi64x(7, 6, 3, 2)};
    const __m256i m0 = _mm256_set1_epi64x(0xD2511F53), m1 = _mm256_set1_epi64x(0xCD9E8D57);
    __m256i k0 = _mm256_set1_epi32(static_cast<int>(key.k0)), k1 = _mm256_set1_epi32(static_cast<int>(key.k1));
    for (int half = 0; half < 2; ++half) {
      const __m256i zero = _mm256_setzero_si256();
      x_[0][half] = _mm256_add_epi64(_mm256_set1_epi64x(c0), ALONG == Along::kC0 ? steps[half] : zero);
      x_[1][half] = _mm256_add_epi64(_mm256_set1_epi64x(c1), ALONG == Along::kC1 ? steps[half] : zero);
      x_[2][half] = _mm256_set1_epi64x(c2);
      x_[3][half] = _mm256_set1_epi64x(c3);
    }
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int half = 0; half < 2; ++half) {
        const __m256i p0 = _mm256_mul_epu32(x_[0][half], m0), p1 = _mm256_mul_epu32(x_[2][half], m1);
        x_[0][half] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(x_[1][half], k0));
        x_[2][half] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(x_[3][half], k1));
        x_[1][half] = p1;
        x_[3][half] = p0;
      }
      k0 = _mm256_add_epi32(k0, _mm256_set1_epi32(static_cast<int>(0x9E3779B9)));
      k1 = _mm256_add_epi32(k1, _mm256_set1_epi32(static_cast<int>(0xBB67AE85)));
    }
  }

  // Returns word w of the eight counters, in their order.
  __m256i words(int w) const {
    return _mm256_castps_si256(_mm256_shuffle_ps(_mm256_castsi256_ps(x_[w][0]), _mm256_castsi256_ps(x_[w][1]), 0x88));
  }

  // Returns words w and w + 1 side by side, for four counters: 0, 1, 4 and 5 in half 0, or 2, 3, 6 and 7 in half 1.
  __m256i pair(int w, int half) const {
    return _mm256_blend_epi32(x_[w][half], _mm256_slli_epi64(x_[w + 1][half], 32), 0xaa);
  }

 private:
  // Each vector holds four counters in the lower halves of 64-bit lanes. The upper halves hold garbage, which the
  // multiplication does not read. The halves hold counters 0, 1, 4, 5 and 2, 3, 6, 7, so that words() has to shuffle
  // within 128 bits only.
  __m256i x_[4][2];
};

// Factors of sixteen 16-bit numbers, eight in either half of a vector: `scale` if the number is at least the threshold,
// else 0.
class KeepSixteen {
 public:
  KeepSixteen(uint32_t threshold, float scale)
      : threshold_(_mm256_set1_epi16(static_cast<int16_t>(threshold < 65536 ? threshold : 65535))),
        scale_(_mm256_castps_si256(_mm256_set1_ps(scale))) {}

  void store(__m256i bits, float* lower, float* upper) const {
    const __m256i kept = _mm256_cmpeq_epi16(_mm256_max_epu16(bits, threshold_), bits);
    put(_mm256_castsi256_si128(kept), lower);
    put(_mm256_extracti128_si256(kept, 1), upper);
  }

 private:
  void put(__m128i kept, float* factors) const {
    const __m256i chosen = _mm256_and_si256(_mm256_cvtepi16_epi32(kept), scale_);
    _mm256_storeu_ps(factors, _mm256_castsi256_ps(chosen));
  }

  __m256i threshold_, scale_;
};
#endif

// Dropout at one site. It decides which elements are dropped, and holds the factor of the elements that are kept.
struct Dropout {
  PhiloxKey key;
  uint32_t site;
  uint32_t threshold;  // an element is dropped if its 16 bits are below it
  float scale;

  Dropout(double p, int64_t seed, int64_t site_number)
      : key(seed),
        site(static_cast<uint32_t>(site_number)),
        threshold(static_cast<uint32_t>(std::floor(p * 65536 + 0.5))),
        scale(threshold == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536 - threshold))) {}

  // Row sites (embedding, add_layer_norm): writes factors[j], `scale` or 0, for the n columns of row i.
  void row(int64_t i, int64_t n, float* factors) const {
#if defined(__AVX2__)
    const KeepSixteen keep(threshold, scale);
    alignas(32) float tail[64];
    for (int64_t j = 0; j < n; j += 64) {
      const PhiloxEight<Along::kC0> at(static_cast<uint32_t>(j / 8), static_cast<uint32_t>(i), 0, site, key);
      float* out = n - j < 64 ? tail : factors + j;
      for (int half = 0; half < 2; ++half) {
        // The four words of a counter are the bits of eight columns. The first store writes the half's counters in
        // lanes 0 and 2, the second store those in lanes 1 and 3.
        const __m256i low = at.pair(0, half), high = at.pair(2, half);
        keep.store(_mm256_unpacklo_epi64(low, high), out + 16 * half, out + 16 * half + 32);
        keep.store(_mm256_unpackhi_epi64(low, high), out + 16 * half + 8, out + 16 * half + 40);
      }
      if (out == tail) std::memcpy(factors + j, tail, (n - j) * sizeof(float));
    }
#else
    uint32_t words[4][kLanes];
    uint32_t ordered[4 * kLanes];  // in the order of columns: column j is a half of word j / 2 % 4 at counter j / 8
    for (int64_t j = 0; j < n; j += 8 * kLanes) {
      philox(static_cast<uint32_t>(j / 8), static_cast<uint32_t>(i), 0, site, key, words);
      for (int l = 0; l < kLanes; ++l) {
        for (int w = 0; w < 4; ++w) ordered[4 * l + w] = words[w][l];
      }
      uint16_t bits[8 * kLanes];
      std::memcpy(bits, ordered, sizeof bits);
      const int64_t count = n - j < 8 * kLanes ? n - j : 8 * kLanes;
      for (int64_t c = 0; c < count; ++c) factors[j + c] = bits[c] >= threshold ? scale : 0.0f;
    }
#endif
  }

  // Matrix sites (attention, mlp): writes the random bits of rows i and i + 8, where i % 16 < 8, for 64 * blocks
  // columns from j on. j is a multiple of 16. Element (i, j) is kept if bits >= threshold.
  void row_pair(int64_t b, int64_t i, int64_t j, int64_t blocks, uint16_t* upper, uint16_t* lower) const {
    const uint32_t c1 = static_cast<uint32_t>((i / 16) * 8 + i % 8);
#if defined(__AVX2__)
    for (int64_t column = 0; column < 64 * blocks; column += 32) {
      const PhiloxEight<Along::kC0> at(static_cast<uint32_t>(j / 16 * 4 + column / 4), c1, static_cast<uint32_t>(b),
                                       site, key);
      // Four counters, half of a vector of words, are eight columns in word 0 and the next eight in word 1. The lower
      // row has words 2 and 3.
      for (int row = 0; row < 2; ++row) {
        const __m256i first = at.words(2 * row), second = at.words(2 * row + 1);
        __m256i* out = reinterpret_cast<__m256i*>((row == 0 ? upper : lower) + column);
        _mm256_storeu_si256(out, _mm256_permute2x128_si256(first, second, 0x20));
        _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(first, second, 0x31));
      }
    }
#else
    uint32_t words[4][kLanes];
    for (int64_t block = 0; block < blocks; ++block) {
      philox(static_cast<uint32_t>(j / 16 * 4 + block * kLanes), c1, static_cast<uint32_t>(b), site, key, words);
      // Four counters give 16 columns of either row: 8 from the row's first word, then 8 from its second word.
      for (int group = 0; group < kLanes / 4; ++group) {
        const int64_t column = block * 4 * kLanes + group * 16;
        std::memcpy(upper + column, words[0] + 4 * group, 16);
        std::memcpy(upper + column + 8, words[1] + 4 * group, 16);
        std::memcpy(lower + column, words[2] + 4 * group, 16);
        std::memcpy(lower + column + 8, words[3] + 4 * group, 16);
      }
    }
#endif
  }
};

}  // namespace gpt_fast
