// The forward pass of attention. It takes one panel of queries at a time, against the blocks of keys that they attend
// to.
#pragma once

#include "cpu/attention/keys.h"

namespace gpt_fast::attention {
namespace {

template <typename scalar_t>
class Forward {
  using Words = WordsOf<scalar_t>;

 public:
  Forward(const Options& options, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
          const Tensor& lse, int64_t longest)
      : options_(options),
        q_(q),
        out_(out),
        lse_(lse.mutable_data_ptr<float>()),
        Dp_(options.padded_D()),
        words_(Dp_ / Words::kPair),
        sums_(round_up(options.D, Words::kPair) / Words::kPair),
        keys_(options, k, v, false, longest),
        q_rows_(kPanel * Dp_),
        q_panel_(words_ * kPanel),
        scores_(kKeys * kPanel),
        limits_(kKeys * kPanel),
        factors_(kKeys * kPanel),
        out_panel_(Dp_ * kPanel) {}

  void panels(int64_t number, int64_t begin, int64_t end) {
    keys_.select(number);
    for (int64_t p = begin; p < end; ++p) panel(options_.segments[number], p * kPanel);
  }

 private:
  void panel(const Segment& segment, int64_t i0) {
    const Panel panel(options_, segment, i0);
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t i = segment.first + i0 + std::min(lane, panel.count - 1);
      pack_row<Words>(q_.row(segment.batch, segment.head, i), q_.stride_d, options_.D, Dp_, q_rows_ + lane * words_);
    }
    transpose(q_rows_, words_, kPanel, words_, q_panel_, kPanel);
    const int64_t next = std::min(i0 + kPanel, segment.T), last = std::min(i0 + 2 * kPanel, segment.T);
    prefetch_rows(q_, segment.batch, segment.head, segment.first + next, segment.first + last, options_.D);
    top_[0] = top_[1] = Vec(-kInf);
    sum_[0] = sum_[1] = Vec(0.0f);
    bool started = false;
    for (int64_t j0 = panel.begin / kKeys * kKeys; j0 < panel.end; j0 += kKeys) {
      const KeyBlock block = block_of(options_, segment, panel, j0, limits_);
      if (block.empty()) continue;
      keys_.pack(j0);
      Vec top[2] = {top_[0], top_[1]};
      if (block.masked) {
        scores<true>(block, j0, top);
      } else {
        scores<false>(block, j0, top);
      }
      move_top(top, started);
      if (options_.dropout) {
        dropout_tile(*options_.dropout, segment.dropout_b, i0, j0, block.begin, block.end, factors_);
        weights<true>(block);
      } else {
        weights<false>(block);
      }
      add_keys<Words>(out_panel_, keys_.v_words + j0 * words_, scores_, Dp_, block, started);
      started = true;
    }
    if (!started) std::fill(out_panel_ + 0, out_panel_ + Dp_ * kPanel, 0.0f);
    finish(segment, panel);
  }

  // Computes the scores of the block, and raises `top` to the largest score so far.
  template <bool MASKED>
  void scores(const KeyBlock& block, int64_t j0, Vec (&top)[2]) {
    const Vec scale(options_.scale);
    for (int64_t r0 = block.begin; r0 < block.end; r0 += kTileRows) {
      Vec tile[kTileRows][2];
      set_zero(tile);
      multiply<Words, 2, false>(tile, keys_.k_rows + (j0 + r0) * words_, words_, q_panel_, kPanel, sums_);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const int64_t at = (r0 + r) * kPanel + v * kVec;
          Vec s = tile[r][v] * scale;
          if constexpr (MASKED) s = min_or_second(s, Vec::loadu(limits_ + at));
          top[v] = max_or_second(top[v], s);
          s.store(scores_ + at);
        }
      }
    }
  }

  // Scales sums and output to the new maximum.
  void move_top(const Vec (&top)[2], bool started) {
    bool same = true;
    Vec factor[2];
    for (int v = 0; v < 2; ++v) {
      // A query without keys so far subtracts 0 instead of -inf: its weights stay 0.
      base_[v] = Vec::blendv(top[v], Vec(0.0f), top[v] == Vec(-kInf));
      factor[v] = exp2((top_[v] - base_[v]) * Vec(kLog2E));
      sum_[v] = sum_[v] * factor[v];
      top_[v] = top[v];
      same = same && (factor[v] - Vec(1.0f)).zero_mask() == (1 << kVec) - 1;
    }
    if (!started || same) return;
    for (int64_t d = 0; d < Dp_; ++d) {
      for (int v = 0; v < 2; ++v) {
        float* x = out_panel_ + d * kPanel + v * kVec;
        (Vec::loadu(x) * factor[v]).store(x);
      }
    }
  }

  // Turns scores into the weights e^(score - top) of the output, in the layout of the product with v. Scores and lse
  // are natural, not scaled by log2(e). That factor would round large scores once more, and lse too, before they cancel
  // here and in backward.
  template <bool DROPOUT>
  void weights(const KeyBlock& block) {
    for (int v = 0; v < 2; ++v) {
      Vec sum(0.0f);
      const auto weight = [&](int64_t r) {
        const int64_t at = r * kPanel + v * kVec;
        Vec p = exp2((Vec::loadu(scores_ + at) - base_[v]) * Vec(kLog2E));
        sum = sum + p;
        if constexpr (DROPOUT) p = p * Vec::loadu(factors_ + at);
        return p;
      };
      for (int64_t r = block.begin; r < block.end; r += Words::kPair) {
        const Vec first = weight(r);
        float* target = scores_ + r / Words::kPair * kPanel + v * kVec;
        if constexpr (Words::kPair == 2) {
#if GPT_FAST_BF16_WORDS
          // This store overwrites row r / 2. Rows from r + 2 on are still to be read.
          Vec(pair_vectors(first, weight(r + 1))).store(target);
#endif
        } else {
          first.store(target);
        }
      }
      sum_[v] = sum_[v] + sum;
    }
  }

  void finish(const Segment& segment, const Panel& panel) {
    float top[kPanel], sum[kPanel];
    Vec inverse[2];
    for (int v = 0; v < 2; ++v) {
      top_[v].store(top + v * kVec);
      sum_[v].store(sum + v * kVec);
      inverse[v] = Vec::blendv(Vec(1.0f) / sum_[v], Vec(0.0f), sum_[v] == Vec(0.0f));
    }
    const int64_t i = segment.first + panel.i0;
    float* lse = lse_ + (segment.batch * options_.H + segment.head) * options_.T + i;
    bool spoiled = false;
    for (int64_t lane = 0; lane < panel.count; ++lane) {
      lse[lane] = static_cast<float>(top[lane] + std::log(static_cast<double>(sum[lane])));
      if (sum[lane] == 0.0f) {
        // Without keys the output is 0; with keys whose scores are all -inf it is NaN, as in PyTorch.
        const bool nan = has_key(options_, segment, panel, lane);
        lse[lane] = nan ? kNan : kInf;
        spoiled = spoiled || nan;
      }
    }
    if (spoiled) {
      float factor[kPanel];
      for (int v = 0; v < 2; ++v) inverse[v].store(factor + v * kVec);
      for (int64_t lane = 0; lane < panel.count; ++lane) {
        if (std::isnan(lse[lane])) factor[lane] = kNan;
      }
      for (int v = 0; v < 2; ++v) inverse[v] = Vec::loadu(factor + v * kVec);
    }
    store_panel(out_panel_, inverse, out_panel_, q_rows_, options_.D, Dp_, out_.row(segment.batch, segment.head, i),
                out_.stride_t, panel.count);
  }

  const Options& options_;
  const View<scalar_t> q_, out_;
  float* const lse_;
  const int64_t Dp_, words_, sums_;  // sums_: words of a row without its padding
  PackedKeys<scalar_t> keys_;
  Buffer q_rows_, q_panel_, scores_, limits_, factors_, out_panel_;
  Vec top_[2], sum_[2], base_[2];
};

}  // namespace
}  // namespace gpt_fast::attention
