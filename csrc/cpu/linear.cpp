// linear on CPU: y = x W' + b; backward dx = dy W, dW = dy' x, db = sum of dy.
#include <tuple>

#include "cpu/core/linear.h"

namespace gpt_fast {
namespace {

Tensor linear_forward(const Tensor& x, const Tensor& weight, const optional<Tensor>& bias) {
  const int64_t C = weight.size(1), N = weight.size(0);
  const Tensor y = at::empty(with_last(x, N), x.options());
  const Tensor rows = as_rows(x), y_rows = y.view({rows.size(0), N}), shift = padded_parameter(bias, N);
  GPT_FAST_DISPATCH(x.scalar_type(), "gpt_fast::linear_forward", [&] {
    for (int64_t first = 0; first < rows.size(0); first += kChunk) {
      const int64_t M = std::min(kChunk, rows.size(0) - first);
      const PackedRows<scalar_t> packed_x(rows_of<scalar_t>(rows.narrow(0, first, M)), M, C);
      multiply_into(packed_x, rows_of<scalar_t>(weight), N, C, shift.const_data_ptr<float>(),
                    y_rows.mutable_data_ptr<scalar_t>() + first * N, N);
    }
  });
  return y;
}

// dW (+)= dy' x, a block of columns of x at a time.
template <typename scalar_t>
void add_weight_gradient(const Tensor& dy, const Tensor& x, const WeightGradient& gradient, bool accumulate) {
  const int64_t M = x.size(0), C = x.size(1), N = dy.size(1);
  const PackedRows<scalar_t> dy_t(columns_of<scalar_t>(dy), N, M);
  const Operand<scalar_t> columns = columns_of<scalar_t>(x);
  const int64_t blocks = ceil_div(C, kBlock), pieces = row_pieces(N, blocks);
  const int64_t piece_rows = round_up(ceil_div(N, pieces), kRows);
  parallel_for(0, blocks * pieces, 1, [&](int64_t begin, int64_t end) {
    const BlockProduct product;
    const Buffer sums(round_up(piece_rows, kVec) * kBlock);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / pieces * kBlock, width = std::min(kBlock, C - column);
      const int64_t first = std::min(N, task % pieces * piece_rows), last = std::min(N, first + piece_rows);
      product(dy_t, first, last, columns.from(column, 0), width, M, sums.data());
      gradient.template add<scalar_t>(sums.data(), last - first, width, gradient.stride(0), gradient.stride(1), first,
                                      column, accumulate);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   bool needs_x, bool needs_weight, bool needs_bias) {
  const int64_t C = weight.size(1), N = weight.size(0);
  const Tensor nothing = at::empty({0}, x.options());
  const Tensor dx = needs_x ? at::empty(x.sizes(), x.options()) : nothing;
  const Tensor dweight = needs_weight ? at::empty_like(weight) : nothing;
  const Tensor dbias = at::zeros({needs_bias ? N : 0}, x.options().dtype(at::kFloat));
  const Tensor rows = as_rows(x), dy_rows = as_rows(dy);
  const int64_t total = rows.size(0);
  if (total == 0) dweight.zero_();
  const WeightGradient gradient(dweight, needs_weight, ceil_div(total, kChunk));
  GPT_FAST_DISPATCH(x.scalar_type(), "gpt_fast::linear_backward", [&] {
    for (int64_t first = 0; first < total; first += kChunk) {
      const int64_t M = std::min(kChunk, total - first);
      const Tensor dy_chunk = dy_rows.narrow(0, first, M);
      if (needs_x) {
        const PackedRows<scalar_t> packed_dy(rows_of<scalar_t>(dy_chunk), M, N);
        multiply_into(packed_dy, columns_of<scalar_t>(weight), C, N, nullptr,
                      dx.mutable_data_ptr<scalar_t>() + first * C, C);
      }
      if (needs_weight) add_weight_gradient<scalar_t>(dy_chunk, rows.narrow(0, first, M), gradient, first > 0);
      if (needs_bias) add_column_sums<scalar_t>(dy_chunk, dbias.mutable_data_ptr<float>());
    }
  });
  gradient.finish();
  return {dx, dweight, dbias.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("linear_forward", linear_forward);
  m.impl("linear_backward", linear_backward);
}

}  // namespace gpt_fast
