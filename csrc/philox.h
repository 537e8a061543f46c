// The dropout generator: philox4x32-7 of Salmon et al. (2011), "Parallel Random Numbers: As Easy as 1, 2, 3".
//
// An element's 16 random bits depend on seed, site and coordinates alone; gpt_fast/reference.py states the rule.
// Everything here works on kLanes neighbouring counters at once, in loops the compiler turns into vector code.
#pragma once

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

// A dropout site: which elements it drops, and the factor for those it keeps.
struct Dropout {
  PhiloxKey key;
  uint32_t site;
  uint32_t threshold;  // dropped where the 16 bits are below it
  float scale;

  Dropout(double p, int64_t seed, int64_t site_number)
      : key(seed),
        site(static_cast<uint32_t>(site_number)),
        threshold(static_cast<uint32_t>(std::floor(p * 65536 + 0.5))),
        scale(threshold == 65536 ? 0.0f : static_cast<float>(65536.0 / (65536 - threshold))) {}

  // Row sites (embedding, add_layer_norm): factors[j] = scale or 0 for the n columns of row i.
  void row(int64_t i, int64_t n, float* factors) const {
    uint32_t words[4][kLanes];
    uint32_t ordered[4 * kLanes];  // as the columns: 16-bit halves of word j / 2 % 4 at counter j / 8
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
  }

  // Matrix sites (attention, mlp): the random bits of rows i and i + 8, where i % 16 < 8, at columns j to
  // j + 16 kLanes / 4 * blocks, j a multiple of 16: 64 columns a block. Element (i, j) is kept where bits >= threshold.
  void row_pair(int64_t b, int64_t i, int64_t j, int64_t blocks, uint16_t* upper, uint16_t* lower) const {
    uint32_t words[4][kLanes];
    const uint32_t c1 = static_cast<uint32_t>((i / 16) * 8 + i % 8);
    for (int64_t block = 0; block < blocks; ++block) {
      philox(static_cast<uint32_t>(j / 16 * 4 + block * kLanes), c1, static_cast<uint32_t>(b), site, key, words);
      // Four counters give 16 columns of either row: 8 from the word of j / 8 % 2 = 0, then 8 from that of 1.
      for (int group = 0; group < kLanes / 4; ++group) {
        const int64_t column = block * 4 * kLanes + group * 16;
        std::memcpy(upper + column, words[0] + 4 * group, 16);
        std::memcpy(upper + column + 8, words[1] + 4 * group, 16);
        std::memcpy(lower + column, words[2] + 4 * group, 16);
        std::memcpy(lower + column + 8, words[3] + 4 * group, 16);
      }
    }
  }
};

}  // namespace gpt_fast
