// The backward pass of attention. It computes the probabilities again from q, k and lse, then the three gradients.
#pragma once

#include "cpu/attention/keys.h"

namespace gpt_fast::attention {
namespace {

// Task of backward: some queries of a segment against a range of its keys. Neither the gradients that a task computes
// nor the cut of a segment into tasks changes a bit. dq adds blocks of keys, and dk and dv add groups of panels, always
// in ascending order.
struct BackwardTask {
  int64_t segment;
  int64_t group_begin, group_end;  // queries, in groups of kPanels panels
  int64_t key_begin, key_end;      // keys, multiples of kKeys
  bool dq, dkv;
};

template <typename scalar_t>
class Backward {
  using Words = WordsOf<scalar_t>;
  static constexpr bool kPaired = Words::kPair == 2;
  static constexpr int64_t kPanelWords = kPanel / Words::kPair;

 public:
  Backward(const Options& options, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
           const Tensor& out, const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv, int64_t longest)
      : options_(options),
        dout_(dout),
        q_(q),
        out_(out),
        dq_(dq),
        dk_(dk),
        dv_(dv),
        lse_(lse.const_data_ptr<float>()),
        Dp_(options.padded_D()),
        words_(Dp_ / Words::kPair),
        sums_(round_up(options.D, Words::kPair) / Words::kPair),
        keys_(options, k, v, true, longest),
        dk_sums_(longest * Dp_),
        dv_sums_(longest * Dp_),
        rows_(kPanel * Dp_),
        out_panel_(words_ * kPanel),
        limits_(kKeys * kPanel),
        factors_(kKeys * kPanel) {
    for (int64_t p = 0; p < kPanels; ++p) panels_.emplace_back(Dp_);
  }

  void run(const BackwardTask& task) {
    const Segment& segment = options_.segments[task.segment];
    keys_.select(task.segment);
    if (task.dkv) {
      std::fill(dk_sums_ + task.key_begin * Dp_, dk_sums_ + task.key_end * Dp_, 0.0f);
      std::fill(dv_sums_ + task.key_begin * Dp_, dv_sums_ + task.key_end * Dp_, 0.0f);
    }
    for (int64_t group = task.group_begin; group < task.group_end; ++group) run_group(segment, task, group);
    if (task.dkv) {
      const Vec scale(options_.scale);
      for (int64_t j = task.key_begin; j < std::min(task.key_end, segment.keys); ++j) {
        float* dk = dk_sums_ + j * Dp_;
        for (int64_t d = 0; d < Dp_; d += kVec) (Vec::loadu(dk + d) * scale).store(dk + d);
        convert_row(dk, dk_.row(segment.batch, segment.head, segment.first + j), options_.D);
        convert_row(dv_sums_ + j * Dp_, dv_.row(segment.batch, segment.head, segment.first + j), options_.D);
      }
    }
  }

 private:
  // A panel of queries, its gradient, and its weights and ds for the current block of keys.
  struct Queries {
    Buffer q_panel, dout_panel;    // [words][kPanel], for the products that sum over a head's elements
    Buffer q_pairs, dout_pairs;    // [kPanel / kPair][Dp], for the products that sum over queries
    Buffer ds_pairs;               // [kKeys / kPair][kPanel], for dq
    Buffer ds_rows, weights_rows;  // [kKeys][kPanel / kPair], for dk and dv; float words use ds_pairs as ds_rows
    Buffer dq_panel;               // [Dp][kPanel]
    Vec lse[2], delta[2];
    Panel panel;
    KeyBlock block;

    explicit Queries(int64_t Dp)
        : q_panel(Dp * kPanel),
          dout_panel(Dp * kPanel),
          q_pairs(Dp * kPanel),
          dout_pairs(Dp * kPanel),
          ds_pairs(kKeys * kPanel),
          ds_rows(kPaired ? kKeys * kPanel : 0),
          weights_rows(kKeys * kPanel),
          dq_panel(Dp * kPanel) {}
    const float* ds_as_rows() const { return kPaired ? ds_rows : ds_pairs; }
  };

  void run_group(const Segment& segment, const BackwardTask& task, int64_t group) {
    int64_t count = 0, begin = task.key_end, end = task.key_begin;
    for (; count < kPanels && (group * kPanels + count) * kPanel < segment.T; ++count) {
      Panel& panel = panels_[count].panel;
      panel = Panel(options_, segment, (group * kPanels + count) * kPanel);
      panel.begin = std::max(panel.begin, task.key_begin);
      panel.end = std::min(panel.end, task.key_end);
      if (panel.begin < panel.end) {
        begin = std::min(begin, panel.begin);
        end = std::max(end, panel.end);
      }
    }
    if (begin < end) {
      for (int64_t p = 0; p < count; ++p) pack_queries(segment, panels_[p]);
      const int64_t next = std::min((group + 1) * kPanels * kPanel, segment.T);
      const int64_t last = std::min(next + kPanels * kPanel, segment.T);
      for (const View<scalar_t>* x : {&q_, &dout_, &out_}) {
        prefetch_rows(*x, segment.batch, segment.head, segment.first + next, segment.first + last, options_.D);
      }
    }
    for (int64_t p = 0; p < count && task.dq; ++p) {
      std::fill(panels_[p].dq_panel + 0, panels_[p].dq_panel + Dp_ * kPanel, 0.0f);
    }
    for (int64_t j0 = begin / kKeys * kKeys; j0 < end; j0 += kKeys) {
      bool any = false;
      for (int64_t p = 0; p < count; ++p) {
        Queries& queries = panels_[p];
        queries.block = block_of(options_, segment, queries.panel, j0, limits_);
        if (queries.block.empty()) continue;
        any = true;
        keys_.pack(j0);
        differentiate(segment, queries, j0);
        if (task.dq) {
          add_keys<Words>(queries.dq_panel, keys_.key_pairs() + j0 * words_, queries.ds_pairs, Dp_, queries.block,
                          true);
        }
      }
      if (any && task.dkv) {
        add_queries(
            count, dv_sums_ + j0 * Dp_, [](const Queries& x) { return +x.weights_rows; },
            [](const Queries& x) { return +x.dout_pairs; });
        add_queries(
            count, dk_sums_ + j0 * Dp_, [](const Queries& x) { return x.ds_as_rows(); },
            [](const Queries& x) { return +x.q_pairs; });
      }
    }
    for (int64_t p = 0; p < count && task.dq; ++p) {
      const Panel& panel = panels_[p].panel;
      const Vec scale[2] = {Vec(options_.scale), Vec(options_.scale)};
      store_panel(panels_[p].dq_panel, scale, panels_[p].dq_panel, rows_, options_.D, Dp_,
                  dq_.row(segment.batch, segment.head, segment.first + panel.i0), dq_.stride_t, panel.count);
    }
  }

  void pack_queries(const Segment& segment, Queries& queries) {
    const Panel& panel = queries.panel;
    float lse[kPanel];
    const auto pack = [&](const View<scalar_t>& x, float* panel_words, float* pairs) {
      float* rows = kPaired ? +rows_ : pairs;
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        // Lanes past the last query repeat that query and get weights of zero. Lanes of zeros would give NaN where a
        // key is infinite.
        const int64_t query = std::min(lane, panel.count - 1);
        if (lse[query] == kInf) {  // the query has no keys
          std::fill(rows + lane * words_, rows + (lane + 1) * words_, 0.0f);
        } else {
          pack_row<Words>(x.row(segment.batch, segment.head, segment.first + panel.i0 + query), x.stride_d, options_.D,
                          Dp_, rows + lane * words_);
        }
      }
      transpose(rows, words_, kPanel, words_, panel_words, kPanel);
      if constexpr (kPaired) pair_rows(rows, kPanel, Dp_, pairs);
    };
    const float* saved = lse_ + (segment.batch * options_.H + segment.head) * options_.T + segment.first + panel.i0;
    for (int64_t lane = 0; lane < kPanel; ++lane) lse[lane] = lane < panel.count ? saved[lane] : kInf;
    pack(q_, queries.q_panel, queries.q_pairs);
    pack(out_, out_panel_, queries.dout_pairs);  // the pairs of dout overwrite these pairs
    pack(dout_, queries.dout_panel, queries.dout_pairs);
    for (int v = 0; v < 2; ++v) {
      queries.lse[v] = Vec::loadu(lse + v * kVec);
      // delta is summed in the order of the products of dout and v, so that ds is exactly 0 for a query with one key.
      Vec delta(0.0f);
      for (int64_t k = 0; k < sums_; ++k) {
        const int64_t at = k * kPanel + v * kVec;
        delta = Words::multiply_add(Vec::loadu(out_panel_ + at), Vec::loadu(queries.dout_panel + at), delta);
      }
      queries.delta[v] = delta;
    }
  }

  void differentiate(const Segment& segment, Queries& queries, int64_t j0) {
    if (options_.dropout) {
      dropout_tile(*options_.dropout, segment.dropout_b, queries.panel.i0, j0, queries.block.begin, queries.block.end,
                   factors_);
      queries.block.masked ? differentiate<true, true>(queries, j0) : differentiate<false, true>(queries, j0);
    } else {
      queries.block.masked ? differentiate<true, false>(queries, j0) : differentiate<false, false>(queries, j0);
    }
  }

  // Computes the weights and ds of the block, and stores them in the layouts of the products that read them.
  template <bool MASKED, bool DROPOUT>
  void differentiate(Queries& queries, int64_t j0) {
    const Vec scale(options_.scale), log2e(kLog2E);
    const Vec lse[2] = {queries.lse[0], queries.lse[1]}, delta[2] = {queries.delta[0], queries.delta[1]};
    alignas(64) float weights[kTileRows * kPanel];
    for (int64_t r0 = queries.block.begin; r0 < queries.block.end; r0 += kTileRows) {
      Vec tile[kTileRows][2];
      set_zero(tile);
      multiply<Words, 2, false>(tile, keys_.k_rows + (j0 + r0) * words_, words_, queries.q_panel, kPanel, sums_);
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          Vec s = tile[r][v] * scale;
          if constexpr (MASKED) s = min_or_second(s, Vec::loadu(limits_ + (r0 + r) * kPanel + v * kVec));
          exp2((s - lse[v]) * log2e).store(weights + r * kPanel + v * kVec);
        }
      }
      set_zero(tile);
      multiply<Words, 2, false>(tile, keys_.v_words + (j0 + r0) * words_, words_, queries.dout_panel, kPanel, sums_);
      // Turns tile[r][v] into ds in place. Returns the weight after dropout.
      const auto finish = [&](int r, int v) {
        Vec p = Vec::loadu(weights + r * kPanel + v * kVec);
        if constexpr (DROPOUT) {
          const Vec factor = Vec::loadu(factors_ + (r0 + r) * kPanel + v * kVec);
          tile[r][v] = p * (tile[r][v] * factor - delta[v]);
          p = p * factor;
        } else {
          tile[r][v] = p * (tile[r][v] - delta[v]);
        }
        return p;
      };
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
        const Vec low = finish(r, 0), high = finish(r, 1);
        float* weights_row = queries.weights_rows + (r0 + r) * kPanelWords;
        if constexpr (kPaired) {
#if GPT_FAST_BF16_WORDS
          Vec(pair_neighbours(low, high)).store(weights_row);
          Vec(pair_neighbours(tile[r][0], tile[r][1])).store(queries.ds_rows + (r0 + r) * kPanelWords);
          if (r % 2 == 1) {
            float* pairs = queries.ds_pairs + (r0 + r) / 2 * kPanel;
            for (int v = 0; v < 2; ++v) Vec(pair_vectors(tile[r - 1][v], tile[r][v])).store(pairs + v * kVec);
          }
#endif
        } else {
          low.store(weights_row);
          high.store(weights_row + kVec);
          for (int v = 0; v < 2; ++v) tile[r][v].store(queries.ds_pairs + (r0 + r) * kPanel + v * kVec);
        }
      }
    }
  }

  // sums[key][d] += sum over queries of weights[key][query] * rows[query][d], over all panels that use the block of
  // keys.
  template <class Weights, class Rows>
  void add_queries(int64_t count, float* sums, const Weights& weights, const Rows& rows) {
    int64_t begin = kKeys, end = 0;
    for (int64_t p = 0; p < count; ++p) {
      if (panels_[p].block.empty()) continue;
      begin = std::min(begin, panels_[p].block.begin);
      end = std::max(end, panels_[p].block.end);
    }
    const auto add = [&]<int NV>(std::integral_constant<int, NV>, int64_t r0, int64_t d) {
      Vec tile[kTileRows][NV];  // apart from the sums so far: adding small terms to large sums loses more bits
      set_zero(tile);
      for (int64_t p = 0; p < count; ++p) {
        const KeyBlock& block = panels_[p].block;
        if (r0 < block.begin || r0 >= block.end) continue;
        multiply<Words, NV, false>(tile, weights(panels_[p]) + r0 * kPanelWords, kPanelWords, rows(panels_[p]) + d, Dp_,
                                   kPanelWords);
      }
      add_tile(tile, sums + r0 * Dp_ + d, Dp_);
    };
    for (int64_t r0 = begin; r0 < end; r0 += kTileRows) {
      int64_t d = 0;
      for (; d + 2 * kVec <= Dp_; d += 2 * kVec) add(std::integral_constant<int, 2>(), r0, d);
      if (d < Dp_) add(std::integral_constant<int, 1>(), r0, d);
    }
  }

  const Options& options_;
  const View<scalar_t> dout_, q_, out_, dq_, dk_, dv_;
  const float* const lse_;
  const int64_t Dp_, words_, sums_;  // sums_: words of a row without its padding
  PackedKeys<scalar_t> keys_;
  Buffer dk_sums_, dv_sums_, rows_, out_panel_, limits_, factors_;
  std::vector<Queries> panels_;
};

}  // namespace
}  // namespace gpt_fast::attention
