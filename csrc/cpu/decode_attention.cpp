// decode_attention on CPU: one query of each sequence attends to the cache of that sequence.
#include "cpu/decode/attention.h"

#include <vector>

namespace gpt_fast {
namespace {

using at::Tensor;

// Returns x with the elements of a row side by side: x itself, or a copy if they are apart.
Tensor with_rows(const Tensor& x) { return x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous(); }

Tensor decode_attention_forward(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& lengths) {
  const int64_t B = q.size(0), H = q.size(1), D = q.size(2), S = k_cache.size(2);
  const Tensor out = at::empty({B, H, D}, q.options());
  const Tensor counts = as_int64("decode_attention", "lengths", lengths);
  const int64_t* n = counts.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < B; ++b) {
    TORCH_CHECK_VALUE(n[b] >= 0 && n[b] <= S, "gpt_fast.decode_attention: lengths holds ", n[b],
                      "; expected values in [0, ", S + 1, ")");
  }
  if (out.numel() == 0) return out;
  const Tensor queries = with_rows(q), keys = with_rows(k_cache), values = with_rows(v_cache);
  const float scale = 1.0f / std::sqrt(static_cast<float>(D));
  GPT_FAST_DISPATCH(q.scalar_type(), "decode_attention", [&] {
    const scalar_t* q_data = queries.const_data_ptr<scalar_t>();
    const scalar_t* k_data = keys.const_data_ptr<scalar_t>();
    const scalar_t* v_data = values.const_data_ptr<scalar_t>();
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    parallel_for(0, B * H, std::max<int64_t>(1, kGrain / ((S + 1) * D)), [&](int64_t begin, int64_t end) {
      std::vector<float> query(D), result(D), scratch(decode_scratch(S, D));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / H, h = i % H;
        std::fill(result.begin(), result.end(), 0.0f);
        if (n[b] > 0) {
          const scalar_t* row = q_data + b * queries.stride(0) + h * queries.stride(1);
          for (int64_t d = 0; d < D; ++d) query[d] = static_cast<float>(row[d]) * scale;
          attend_to_cache(query.data(), k_data + b * keys.stride(0) + h * keys.stride(1), keys.stride(2),
                          v_data + b * values.stride(0) + h * values.stride(1), values.stride(2), n[b], D,
                          scratch.data(), result.data());
        }
        at::vec::convert(result.data(), out_data + i * D, D);
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) { m.impl("decode_attention_forward", decode_attention_forward); }

}  // namespace gpt_fast
