// embedding on CPU: token row + position row and dropout, in one pass.
//
// For each row of a table, backward sums the rows of dout that used it, in their order. A stable counting sort groups
// these rows, and one thread owns each table row, so the result does not depend on the number of threads.
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros_like.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/core/common.h"

namespace gpt_fast {
namespace {

using at::Tensor;
using std::optional;

// Returns the table row of each of M output rows. `given` is repeated if it has fewer than M ids.
std::vector<int64_t> indices(const char* name, const Tensor& given, int64_t M, int64_t table_rows) {
  const Tensor ids = as_int64("embedding", name, given);
  const int64_t* data = ids.const_data_ptr<int64_t>();
  const int64_t count = ids.numel();
  std::vector<int64_t> result(M);
  for (int64_t i = 0; i < M; ++i) {
    const int64_t id = data[i % count];
    TORCH_CHECK_VALUE(id >= 0 && id < table_rows, "gpt_fast.embedding: ", name, " holds ", id,
                      "; expected values in [0, ", table_rows, ")");
    result[i] = id;
  }
  return result;
}

Tensor embedding_forward(const Tensor& tokens, const Tensor& token_weight, const Tensor& position_weight,
                         const Tensor& positions, double dropout_p, const optional<Tensor>& seed, int64_t site) {
  auto shape = tokens.sizes().vec();
  shape.push_back(token_weight.size(1));
  const Tensor out = at::empty(shape, token_weight.options());
  const int64_t M = tokens.numel(), C = token_weight.size(1);
  const auto token_of = indices("tokens", tokens, M, token_weight.size(0));
  const auto position_of = indices("positions", positions, M, position_weight.size(0));
  if (out.numel() == 0) return out;
  const Rows token_rows(token_weight), position_rows(position_weight), out_rows(out);
  const optional<Dropout> dropout = make_dropout("embedding", dropout_p, seed, site);
  parallel_for(0, M, row_grain(C), [&](int64_t begin, int64_t end) {
    std::vector<float> token_buffer(C), position_buffer(C), out_buffer(C), factors(C);
    for (int64_t i = begin; i < end; ++i) {
      const float* token = token_rows.read(token_of[i], token_buffer.data());
      const float* position = position_rows.read(position_of[i], position_buffer.data());
      float* target = out_rows.target(i, out_buffer.data());
      at::vec::map2<float>([](Vec a, Vec b) { return a + b; }, target, token, position, C);
      if (dropout) {
        dropout->row(i, C, factors.data());
        at::vec::map2<float>([](Vec a, Vec b) { return a * b; }, target, target, factors.data(), C);
      }
      out_rows.write(i, target);
    }
  });
  return out;
}

// Returns zeros like x. If x is dense and large, they are fresh pages of the system, which are zero without being
// written. The rows of a table that no token used then cost nothing here, and little where they are read.
Tensor untouched_zeros_like(const Tensor& x) {
#ifdef __linux__
  constexpr size_t kLarge = 4 << 20;  // bytes
  const size_t bytes = x.nbytes();
  if (bytes >= kLarge && x.is_non_overlapping_and_dense()) {
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages != MAP_FAILED) {
      return at::from_blob(pages, x.sizes(), x.strides(), [bytes](void* data) { munmap(data, bytes); }, x.options());
    }
  }
#endif
  return at::zeros_like(x);
}

// Returns the gradient of a table, where output row i used the table row table_row_of[i].
Tensor table_gradient(const Rows& upstream, const Tensor& table, const std::vector<int64_t>& table_row_of,
                      const optional<Dropout>& dropout) {
  const Tensor gradient = untouched_zeros_like(table);
  const int64_t M = static_cast<int64_t>(table_row_of.size()), C = table.size(1), table_rows = table.size(0);
  std::vector<int64_t> first(table_rows + 1, 0), order(M);  // uses of table row k: order[first[k]..first[k + 1])
  for (const int64_t k : table_row_of) ++first[k + 1];
  for (int64_t k = 0; k < table_rows; ++k) first[k + 1] += first[k];
  std::vector<int64_t> next(first.begin(), first.end() - 1), used;
  for (int64_t i = 0; i < M; ++i) order[next[table_row_of[i]]++] = i;
  for (int64_t k = 0; k < table_rows; ++k) {
    if (first[k] < first[k + 1]) used.push_back(k);
  }

  // The gradient has the strides of the table. If these are not by rows, the sums are made in `target` and copied.
  const bool by_rows = C == 1 || gradient.stride(1) == 1;
  const Tensor target = by_rows ? gradient : at::zeros({table_rows, C}, table.options());
  const Rows out(target);
  parallel_for(0, static_cast<int64_t>(used.size()), row_grain(C), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(C), sum(C), factors(C);
    for (int64_t u = begin; u < end; ++u) {
      const int64_t k = used[u];
      float* total = out.target(k, sum.data());
      std::fill(total, total + C, 0.0f);
      for (int64_t n = first[k]; n < first[k + 1]; ++n) {
        const float* row = upstream.read(order[n], buffer.data());
        if (dropout) {
          dropout->row(order[n], C, factors.data());
          at::vec::map3<float>([](Vec t, Vec a, Vec f) { return t + a * f; }, total, total, row, factors.data(), C);
        } else {
          at::vec::map2<float>([](Vec t, Vec a) { return t + a; }, total, total, row, C);
        }
      }
      out.write(k, total);
    }
  });
  if (!by_rows) gradient.copy_(target);
  return gradient;
}

std::tuple<Tensor, Tensor> embedding_backward(const Tensor& dout, const Tensor& tokens, const Tensor& token_weight,
                                              const Tensor& position_weight, const Tensor& positions, double dropout_p,
                                              const optional<Tensor>& seed, int64_t site, bool needs_token,
                                              bool needs_position) {
  const Tensor nothing = at::empty({0}, token_weight.options());
  if (dout.numel() == 0) {
    return {needs_token ? at::zeros_like(token_weight) : nothing,
            needs_position ? at::zeros_like(position_weight) : at::empty_like(nothing)};
  }
  const Rows upstream(dout);
  const optional<Dropout> dropout = make_dropout("embedding", dropout_p, seed, site);
  const int64_t M = tokens.numel();
  const auto gradient = [&](bool needed, const char* name, const Tensor& given, const Tensor& table) {
    return needed ? table_gradient(upstream, table, indices(name, given, M, table.size(0)), dropout)
                  : at::empty_like(nothing);
  };
  return {gradient(needs_token, "tokens", tokens, token_weight),
          gradient(needs_position, "positions", positions, position_weight)};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("embedding_forward", embedding_forward);
  m.impl("embedding_backward", embedding_backward);
}

}  // namespace gpt_fast
