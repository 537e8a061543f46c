// Parts that both passes of attention share: packed keys and values, products that sum over keys, the store of a panel.
#pragma once

#include "cpu/attention/problem.h"

namespace gpt_fast::attention {
namespace {

// Keys and values of a segment. Each block is packed when it is first needed. Keys beyond the length, and keys that
// key_mask excludes, are packed as zeros: their weights are 0, and 0 times NaN in the padding would be NaN.
template <typename scalar_t>
struct PackedKeys {
  using Words = WordsOf<scalar_t>;
  static constexpr bool kPaired = Words::kPair == 2;

  const Options& options;
  const View<scalar_t> k, v;
  const bool backward;  // forward reads keys as rows and values as pairs; backward both as rows, and keys also as pairs
  const int64_t Dp, words;
  Buffer k_rows, v_words, k_pairs, unpaired;
  std::vector<bool> packed;
  int64_t segment = -1;

  PackedKeys(const Options& options, const Tensor& k, const Tensor& v, bool backward, int64_t longest)
      : options(options),
        k(k),
        v(v),
        backward(backward),
        Dp(options.padded_D()),
        words(Dp / Words::kPair),
        k_rows(longest * words),
        v_words(longest * words),
        k_pairs(kPaired && backward ? longest * words : 0),
        unpaired(kPaired ? kKeys * words : 0),
        packed(longest / kKeys) {}

  void select(int64_t number) {
    if (segment != number) std::fill(packed.begin(), packed.end(), false);
    segment = number;
  }

  void pack(int64_t j0) {
    if (packed[j0 / kKeys]) return;
    packed[j0 / kKeys] = true;
    const Segment& s = options.segments[segment];
    const int64_t next = std::min(j0 + kKeys, s.S), last = std::min(j0 + 2 * kKeys, s.S);
    prefetch_rows(k, s.batch, s.head, s.first + next, s.first + last, options.D);
    prefetch_rows(v, s.batch, s.head, s.first + next, s.first + last, options.D);
    pack_rows(k, s, j0, k_rows + j0 * words);
    if constexpr (kPaired) {
      if (backward) {
        pair_rows(k_rows + j0 * words, kKeys, Dp, k_pairs + j0 * words);
        pack_rows(v, s, j0, v_words + j0 * words);
      } else {
        pack_rows(v, s, j0, unpaired);
        pair_rows(unpaired, kKeys, Dp, v_words + j0 * words);
      }
    } else {
      pack_rows(v, s, j0, v_words + j0 * words);
    }
  }

  // For float words, pairs and rows are the same layout.
  const float* key_pairs() const { return kPaired ? k_pairs : k_rows; }

 private:
  void pack_rows(const View<scalar_t>& x, const Segment& s, int64_t j0, float* rows) const {
    const Tensor& flags = options.key_mask;
    for (int64_t r = 0; r < kKeys; ++r) {
      const int64_t j = s.first + j0 + r;
      const bool serves = j0 + r < s.S && (options.key_mask_data == nullptr ||
                                           options.key_mask_data[s.batch * flags.stride(0) + j * flags.stride(1)]);
      if (serves) {
        pack_row<Words>(x.row(s.batch, s.head, j), x.stride_d, options.D, Dp, rows + r * words);
      } else {
        std::fill(rows + r * words, rows + (r + 1) * words, 0.0f);
      }
    }
  }
};

int64_t longest_keys(const Options& options) {
  int64_t longest = 0;
  for (const Segment& segment : options.segments) longest = std::max(longest, round_up(segment.keys, kKeys));
  return longest;
}

// Multiplies a panel [Dp][kPanel] by factor[lane], and writes it to `count` rows of D elements.
template <typename scalar_t>
void store_panel(const float* panel, const Vec (&factor)[2], float* scaled, float* rows, int64_t D, int64_t Dp,
                 scalar_t* target, int64_t stride, int64_t count) {
  for (int64_t d = 0; d < Dp; ++d) {
    for (int v = 0; v < 2; ++v) {
      (Vec::loadu(panel + d * kPanel + v * kVec) * factor[v]).store(scaled + d * kPanel + v * kVec);
    }
  }
  transpose(scaled, kPanel, Dp, kPanel, rows, Dp);
  for (int64_t lane = 0; lane < count; ++lane) convert_row(rows + lane * Dp, target + lane * stride, D);
}

// acc [Dp][kPanel] (+)= pairsᵀ weights, summed over the rows of a block: Oᵀ += Vᵀ Pᵀ in forward, dQᵀ += Kᵀ dSᵀ in
// backward. Without `accumulate`, the sum replaces acc.
template <class Words>
void add_keys(float* acc, const float* pairs, const float* weights, int64_t Dp, const KeyBlock& block,
              bool accumulate) {
  const float* a = pairs + block.begin / Words::kPair * Dp;
  const float* b = weights + block.begin / Words::kPair * kPanel;
  const int64_t K = (block.end - block.begin) / Words::kPair;
  for (int64_t d = 0; d < Dp; d += kTileRows) {
    Vec tile[kTileRows][2];
    if (accumulate) {
      load_tile(tile, acc + d * kPanel, kPanel);
    } else {
      set_zero(tile);
    }
    multiply<Words, 2, true>(tile, a + d, Dp, b, kPanel, K);
    store_tile(tile, acc + d * kPanel, kPanel);
  }
}

}  // namespace
}  // namespace gpt_fast::attention
