// The work of attention's passes: the keys that each query may attend to, cut into segments, panels and blocks.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "cpu/attention/tiles.h"

namespace gpt_fast::attention {
namespace {

using at::Tensor;
using std::optional;

// One head of one sequence: T queries and S keys, which both start at token `first` of the tensors. Each packed
// sequence has segments of its own, so the passes do not deal with packing. S leaves out keys beyond a length. Query i
// is at the position of key i + offset.
struct Segment {
  int64_t batch, head;
  int64_t first;  // token at which the segment starts, in queries and keys
  int64_t T, S;   // queries, and keys that they may attend to
  int64_t keys;   // keys whose gradients are written; the gradients are zero from key S on
  int64_t offset;
  int64_t dropout_b;  // number of the matrix in the dropout rule (b in philox.h)
};

struct Options {
  bool causal;
  int64_t window;  // 0: no window
  optional<Dropout> dropout;
  float scale;
  Tensor key_mask, mask;  // [B, S] and [B, H, T, S] (expanded), or undefined
  const bool* key_mask_data = nullptr;
  const bool* mask_data = nullptr;
  int64_t B, H, T, S, D;
  std::vector<Segment> segments;

  int64_t padded_D() const { return round_up(D, kVec); }
};

std::vector<int64_t> values_of(const char* name, const Tensor& tensor) {
  const Tensor values = as_int64("attention", name, tensor);
  return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel()};
}

Options make_options(const Tensor& q, const Tensor& k, const Tensor& v, const optional<Tensor>& lengths,
                     const optional<Tensor>& key_mask, const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens,
                     bool causal, optional<int64_t> window, double dropout_p, const optional<Tensor>& seed,
                     int64_t site, double scale) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), S = k.size(2), D = q.size(3);
  Options options{
      .causal = causal, .window = 0, .scale = static_cast<float>(scale), .B = B, .H = H, .T = T, .S = S, .D = D};
  options.dropout = make_dropout("attention", dropout_p, seed, site);
  if (window.has_value()) {
    options.window = std::min(*window, T + S + 1);  // so that a position plus a window does not overflow
  }
  if (key_mask.has_value()) {
    options.key_mask = *key_mask;
    options.key_mask_data = key_mask->const_data_ptr<bool>();
  }
  if (mask.has_value()) {
    options.mask = mask->expand({B, H, T, S});
    options.mask_data = mask->const_data_ptr<bool>();
  }
  std::vector<int64_t> limits(B, S);
  if (lengths.has_value()) {
    limits = values_of("lengths", *lengths);
    for (const int64_t limit : limits) {
      TORCH_CHECK_VALUE(0 <= limit && limit <= S, "gpt_fast.attention: lengths holds ", limit,
                        "; expected values in [0, ", S + 1, ")");
    }
  }
  if (!cu_seqlens.has_value()) {
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < H; ++h) options.segments.push_back({b, h, 0, T, limits[b], S, S - T, b * H + h});
    }
    return options;
  }
  std::vector<int64_t> starts = values_of("cu_seqlens", *cu_seqlens);
  TORCH_CHECK_VALUE(starts[0] == 0, "gpt_fast.attention: cu_seqlens starts at ", starts[0], "; expected 0");
  const int64_t sequences = static_cast<int64_t>(starts.size()) - 1;
  for (int64_t n = 0; n < sequences; ++n) {
    TORCH_CHECK_VALUE(starts[n] <= starts[n + 1] && starts[n + 1] <= T, "gpt_fast.attention: cu_seqlens holds ",
                      starts[n + 1], " after ", starts[n], "; expected values that never fall and are at most ", T);
  }
  starts.push_back(T);  // tokens after the last sequence are queries without keys
  for (int64_t n = 0; n <= sequences; ++n) {
    const int64_t first = starts[n], count = starts[n + 1] - first;
    const int64_t keys = n < sequences ? std::clamp<int64_t>(limits[0] - first, 0, count) : 0;
    for (int64_t h = 0; h < H && count > 0; ++h) {
      options.segments.push_back({0, h, first, count, keys, count, 0, n * H + h});
    }
  }
  return options;
}

// Keys [lo, hi) that causality, window and length leave to each query of a panel. Lanes past the last query repeat it,
// so they need no masking of their own. Their results are never read.
struct Panel {
  int64_t i0, count;
  int64_t lo[kPanel], hi[kPanel];
  int64_t begin, end;      // keys that at least one query may attend to
  int64_t all_lo, all_hi;  // keys that every query may attend to

  Panel() = default;
  Panel(const Options& options, const Segment& segment, int64_t first) : i0(first) {
    count = std::min(kPanel, segment.T - first);
    begin = segment.S;
    end = all_lo = 0;
    all_hi = segment.S;
    for (int64_t lane = 0; lane < kPanel; ++lane) {
      const int64_t position = i0 + std::min(lane, count - 1) + segment.offset;
      int64_t from = 0, to = segment.S;
      if (options.causal) to = std::min(to, position + 1);
      if (options.window > 0) {
        from = std::max<int64_t>(0, position - options.window + 1);
        if (!options.causal) to = std::min(to, position + options.window);
      }
      if (from >= to) from = to = 0;
      if (from < to) {
        begin = std::min(begin, from);
        end = std::max(end, to);
      }
      lo[lane] = from;
      hi[lane] = to;
      all_lo = std::max(all_lo, from);
      all_hi = std::min(all_hi, to);
    }
    begin = std::min(begin, end);
  }
};

// Returns whether the query in a lane may attend to any key. It reads the flags of all keys of the query, so callers
// use it for rare rows only.
bool has_key(const Options& options, const Segment& segment, const Panel& panel, int64_t lane) {
  const int64_t b = segment.batch, h = segment.head, i = segment.first + panel.i0 + lane;
  for (int64_t j = segment.first + panel.lo[lane]; j < segment.first + panel.hi[lane]; ++j) {
    bool allowed = true;
    if (const Tensor& x = options.key_mask; options.key_mask_data != nullptr) {
      allowed = options.key_mask_data[b * x.stride(0) + j * x.stride(1)];
    }
    if (const Tensor& x = options.mask; options.mask_data != nullptr) {
      allowed = allowed && options.mask_data[b * x.stride(0) + h * x.stride(1) + i * x.stride(2) + j * x.stride(3)];
    }
    if (allowed) return true;
  }
  return false;
}

// The rows of a block of keys that a panel needs, in whole register tiles, and whether they need a mask.
struct KeyBlock {
  int64_t begin = 0, end = 0;
  bool masked = false;
  bool empty() const { return begin == end; }
};

enum class Allowed { kNone, kSome, kAll };

// Returns whether none, some or all of `rows` x `columns` flags are true.
Allowed allowed_of(const bool* flags, int64_t rows, int64_t stride_row, int64_t columns, int64_t stride_column) {
  if (stride_row == 0) rows = std::min<int64_t>(rows, 1);
  int64_t count = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const bool* row = flags + r * stride_row;
    if (stride_column == 1) {
      for (int64_t c = 0; c < columns; ++c) count += row[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) count += row[c * stride_column];
    }
  }
  return count == 0 ? Allowed::kNone : count == rows * columns ? Allowed::kAll : Allowed::kSome;
}

// Returns the rows that a panel needs of keys j0 to j0 + kKeys. If not all pairs are allowed, the block is masked, and
// limits[row][lane] is +inf for an allowed pair, else -inf.
KeyBlock block_of(const Options& options, const Segment& segment, const Panel& panel, int64_t j0, float* limits) {
  const int64_t first = std::max(panel.begin, j0), last = std::min(panel.end, j0 + kKeys);
  if (first >= last) return {};
  KeyBlock block{(first - j0) / kTileRows * kTileRows, round_up(last - j0, kTileRows), false};
  block.masked = panel.all_lo > j0 + block.begin || panel.all_hi < j0 + block.end;

  const bool* key_flags = nullptr;
  int64_t key_stride = 0;
  if (options.key_mask_data != nullptr) {
    key_stride = options.key_mask.stride(1);
    key_flags = options.key_mask_data + segment.batch * options.key_mask.stride(0) + segment.first * key_stride;
    const Allowed allowed = allowed_of(key_flags + first * key_stride, 1, 0, last - first, key_stride);
    if (allowed == Allowed::kNone) return {};
    if (allowed == Allowed::kAll) key_flags = nullptr;
  }
  const bool* flags = nullptr;
  int64_t stride_t = 0, stride_s = 0;
  if (options.mask_data != nullptr) {
    stride_t = options.mask.stride(2);
    stride_s = options.mask.stride(3);
    flags = options.mask_data + segment.batch * options.mask.stride(0) + segment.head * options.mask.stride(1) +
            (segment.first + panel.i0) * stride_t + segment.first * stride_s;
    const Allowed allowed = allowed_of(flags + first * stride_s, panel.count, stride_t, last - first, stride_s);
    if (allowed == Allowed::kNone) return {};
    if (allowed == Allowed::kAll) flags = nullptr;
  }
  block.masked = block.masked || key_flags != nullptr || flags != nullptr;
  if (!block.masked) return block;

  int32_t lo[kPanel], hi[kPanel];
  for (int64_t lane = 0; lane < kPanel; ++lane) {
    lo[lane] = static_cast<int32_t>(std::clamp<int64_t>(panel.lo[lane] - j0, 0, kKeys));
    hi[lane] = static_cast<int32_t>(std::clamp<int64_t>(panel.hi[lane] - j0, 0, kKeys));
  }
  for (int64_t r = block.begin; r < block.end; ++r) {
    float* row = limits + r * kPanel;
    const int32_t key = static_cast<int32_t>(r);
    // No query attends to rows outside [first, last), and the masks may end before them: their flags must not be read.
    const bool dropped =
        j0 + r < first || j0 + r >= last || (key_flags != nullptr && !key_flags[(j0 + r) * key_stride]);
    if (dropped) {
      std::fill(row, row + kPanel, -kInf);
      continue;
    }
    for (int64_t lane = 0; lane < kPanel; ++lane) row[lane] = lo[lane] <= key && key < hi[lane] ? kInf : -kInf;
    if (flags != nullptr) {
      const bool* column = flags + (j0 + r) * stride_s;
      for (int64_t lane = 0; lane < panel.count; ++lane) {
        if (!column[lane * stride_t]) row[lane] = -kInf;
      }
      // Lanes past the last query repeat that query, so they need its mask too. Without it, NaN in a key that the mask
      // excludes would reach the gradients.
      if (!column[(panel.count - 1) * stride_t]) std::fill(row + panel.count, row + kPanel, -kInf);
    }
  }
  return block;
}

// Runs work(worker, task) for each task below `count`. A thread that is free takes the next task. The result of a task
// does not depend on the thread that runs it.
template <class MakeWorker, class Work>
void run_tasks(int64_t count, const MakeWorker& make_worker, const Work& work) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      if (next.load(std::memory_order_relaxed) >= count) return;
      auto worker = make_worker();
      for (int64_t task = next++; task < count; task = next++) work(worker, task);
    }
  });
}

}  // namespace
}  // namespace gpt_fast::attention
