// attention on CPU: blocks of keys against panels of queries, with an online softmax. No buffer has T x S elements.
//
// Forward, for each query: s = scale q k, m = max s, l = sum of e^(s - m), out = sum of e^(s - m) keep v / l,
// lse = m + ln(l), or +inf without keys. `keep` is the dropout factor: 0 or the dropout scale. Backward:
// p = e^(s - lse), delta = sum of dout * out, ds = p * (keep * (dout v) - delta), dv = sum of p keep dout,
// dq = scale sum of ds k, dk = scale sum of ds q.
//
// Sums and statistics are float32. Where the CPU multiplies bfloat16 (words.h), probabilities and ds of bfloat16 inputs
// are rounded to bfloat16 before their products. float16 is computed in float32. One task computes an output element
// and adds its terms in a fixed order, so results do not depend on the number of threads.
#include <tuple>

#include "cpu/attention/backward.h"
#include "cpu/attention/forward.h"

namespace gpt_fast::attention {
namespace {

// Returns the number of tasks into which a segment is cut, so that all threads stay busy to the end. Each task packs
// the keys that it needs.
int64_t chunks_of(const Options& options, int64_t pieces) {
  const int64_t segments = static_cast<int64_t>(options.segments.size());
  const int64_t wanted = 16 * at::get_num_threads();
  return at::get_num_threads() == 1 ? 1
                                    : std::clamp<int64_t>(ceil_div(wanted, segments), 1, std::max<int64_t>(pieces, 1));
}

Tensor empty_like_heads(const Tensor& x) {
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                             const optional<Tensor>& lengths, const optional<Tensor>& key_mask,
                                             const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens,
                                             bool causal, optional<int64_t> window, double dropout_p,
                                             const optional<Tensor>& seed, int64_t site, double scale) {
  const Options options =
      make_options(q, k, v, lengths, key_mask, mask, cu_seqlens, causal, window, dropout_p, seed, site, scale);
  const Tensor out = empty_like_heads(q);
  const Tensor lse = at::empty({options.B, options.H, options.T}, q.options().dtype(at::kFloat));
  struct Task {
    int64_t segment, begin, end;
  };
  std::vector<Task> tasks;
  for (int64_t n = 0; n < static_cast<int64_t>(options.segments.size()); ++n) {
    const int64_t panels = ceil_div(options.segments[n].T, kPanel);
    const int64_t chunks = chunks_of(options, panels);
    // The last queries come first, because under causality they have the most keys.
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      tasks.push_back({n, chunk * panels / chunks, (chunk + 1) * panels / chunks});
    }
  }
  GPT_FAST_DISPATCH(q.scalar_type(), "gpt_fast::attention_forward", [&] {
    const int64_t longest = longest_keys(options);
    run_tasks(
        static_cast<int64_t>(tasks.size()), [&] { return Forward<scalar_t>(options, q, k, v, out, lse, longest); },
        [&](auto& worker, int64_t task) { worker.panels(tasks[task].segment, tasks[task].begin, tasks[task].end); });
  });
  return {out, lse};
}

// Returns the tasks of backward. One pass over a segment computes its scores once. If the segments are too few to keep
// all threads busy, each gets a pass for dq and another for dk and dv. Both are cut into chunks and compute the scores.
std::vector<BackwardTask> backward_tasks(const Options& options) {
  std::vector<BackwardTask> tasks;
  const int64_t threads = at::get_num_threads();
  const int64_t segments = static_cast<int64_t>(options.segments.size());
  const bool one_pass = threads == 1 || segments >= 4 * threads;
  for (int64_t n = 0; n < segments; ++n) {
    const Segment& segment = options.segments[n];
    const int64_t groups = ceil_div(segment.T, kPanels * kPanel);
    const int64_t blocks = ceil_div(segment.keys, kKeys);
    if (one_pass) {
      tasks.push_back({n, 0, groups, 0, blocks * kKeys, true, true});
      continue;
    }
    const int64_t dq_chunks = chunks_of(options, groups), dkv_chunks = chunks_of(options, blocks);
    for (int64_t chunk = 0; chunk < dkv_chunks; ++chunk) {  // the first keys have the most queries
      tasks.push_back(
          {n, 0, groups, chunk * blocks / dkv_chunks * kKeys, (chunk + 1) * blocks / dkv_chunks * kKeys, false, true});
    }
    for (int64_t chunk = dq_chunks - 1; chunk >= 0; --chunk) {
      tasks.push_back(
          {n, chunk * groups / dq_chunks, (chunk + 1) * groups / dq_chunks, 0, blocks * kKeys, true, false});
    }
  }
  return tasks;
}

void backward_into(const Options& options, const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& out, const Tensor& lse, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  const std::vector<BackwardTask> tasks = backward_tasks(options);
  const Tensor rows_lse = lse.contiguous();
  GPT_FAST_DISPATCH(q.scalar_type(), "gpt_fast::attention_backward", [&] {
    const int64_t longest = longest_keys(options);
    run_tasks(
        static_cast<int64_t>(tasks.size()),
        [&] { return Backward<scalar_t>(options, dout, q, k, v, out, rows_lse, dq, dk, dv, longest); },
        [&](auto& worker, int64_t task) { worker.run(tasks[task]); });
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      const optional<Tensor>& lengths, const optional<Tensor>& key_mask,
                                                      const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens,
                                                      bool causal, optional<int64_t> window, double dropout_p,
                                                      const optional<Tensor>& seed, int64_t site, double scale) {
  const Options options =
      make_options(q, k, v, lengths, key_mask, mask, cu_seqlens, causal, window, dropout_p, seed, site, scale);
  const Tensor dq = empty_like_heads(q), dk = empty_like_heads(k), dv = empty_like_heads(v);
  backward_into(options, dout, q, k, v, out, lse, dq, dk, dv);
  return {dq, dk, dv};
}

// [B, T, 3C] -> views q, k, v [B, H, T, D].
std::vector<Tensor> split_heads(const Tensor& qkv, int64_t num_heads) {
  return qkv.unflatten(2, {3, num_heads, qkv.size(2) / (3 * num_heads)}).permute({2, 0, 3, 1, 4}).unbind(0);
}

Tensor attention_qkv_backward(const Tensor& dout, const Tensor& qkv, int64_t num_heads, const Tensor& out,
                              const Tensor& lse, const optional<Tensor>& lengths, const optional<Tensor>& key_mask,
                              const optional<Tensor>& mask, const optional<Tensor>& cu_seqlens, bool causal,
                              optional<int64_t> window, double dropout_p, const optional<Tensor>& seed, int64_t site,
                              double scale) {
  const std::vector<Tensor> x = split_heads(qkv, num_heads);
  const Options options =
      make_options(x[0], x[1], x[2], lengths, key_mask, mask, cu_seqlens, causal, window, dropout_p, seed, site, scale);
  const Tensor dqkv = at::empty(qkv.sizes(), qkv.options());
  const std::vector<Tensor> dx = split_heads(dqkv, num_heads);
  backward_into(options, dout, x[0], x[1], x[2], out, lse, dx[0], dx[1], dx[2]);
  return dqkv;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("attention_forward", attention_forward);
  m.impl("attention_backward", attention_backward);
  m.impl("attention_qkv_backward", attention_qkv_backward);
}

}  // namespace gpt_fast::attention
