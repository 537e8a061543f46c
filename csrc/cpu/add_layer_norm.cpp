// add_layer_norm on CPU: dropout, residual addition and norm of a row, all while the row is in cache.
//
// summed = residual + x * factor, where the dropout rule makes `factor` either `scale` or 0. normed is the norm of
// `summed` as it was rounded and stored. Backward: d = d(norm) + dsummed, dresidual = d, dx = d * factor.
#include <limits>
#include <optional>
#include <vector>

#include "cpu/core/norm.h"

namespace gpt_fast {
namespace {

using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                                  const optional<Tensor>& weight,
                                                                  const optional<Tensor>& bias, double eps,
                                                                  double dropout_p, const optional<Tensor>& seed,
                                                                  int64_t site, optional<at::ScalarType> normed_dtype) {
  const at::ScalarType dtype = c10::promoteTypes(x.scalar_type(), residual.scalar_type());
  const Tensor summed = at::empty(x.sizes(), x.options().dtype(dtype));
  const Tensor normed = at::empty(x.sizes(), x.options().dtype(normed_dtype.value_or(dtype)));
  const auto [mean, rstd] = empty_statistics(x);
  if (x.numel() == 0) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    return {normed, summed, mean.fill_(nan), rstd.fill_(nan)};
  }
  const Rows branch(x), stream(residual), sum(summed), out(normed);
  const Parameter gain(weight), shift(bias);
  const optional<Dropout> dropout = make_dropout("add_layer_norm", dropout_p, seed, site);
  const int64_t N = branch.N();
  float* mean_data = mean.mutable_data_ptr<float>();
  float* rstd_data = rstd.mutable_data_ptr<float>();
  parallel_for(0, branch.M(), row_grain(N), [&](int64_t begin, int64_t end) {
    std::vector<float> branch_buffer(N), stream_buffer(N), sum_buffer(N), out_buffer(N), factors(N, 1.0f);
    for (int64_t i = begin; i < end; ++i) {
      const float* branch_row = branch.read(i, branch_buffer.data());
      const float* stream_row = stream.read(i, stream_buffer.data());
      if (dropout) dropout->row(i, N, factors.data());
      float* sum_row = sum.target(i, sum_buffer.data());
      for_each_vector(N, [&](int64_t j, int64_t count) {
        const Vec kept = Vec::loadu(branch_row + j, count) * Vec::loadu(factors.data() + j, count);
        (Vec::loadu(stream_row + j, count) + kept).store(sum_row + j, count);
      });
      sum.write(i, sum_row);
      const float* stored = sum.read(i, sum_buffer.data());
      const Statistics statistics = row_statistics(stored, N, eps);
      float* target = out.target(i, out_buffer.data());
      normalise_row(stored, statistics, gain.data(), shift.data(), N, target);
      out.write(i, target);
      mean_data[i] = statistics.mean;
      rstd_data[i] = statistics.rstd;
    }
  });
  return {normed, summed, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& dnormed, const optional<Tensor>& dsummed, const Tensor& summed, const optional<Tensor>& weight,
    const Tensor& mean, const Tensor& rstd, at::ScalarType x_dtype, at::ScalarType residual_dtype, double dropout_p,
    const optional<Tensor>& seed, int64_t site, bool needs_weight, bool needs_bias) {
  const int64_t N = summed.size(-1);
  const auto options = weight.has_value() ? weight->options() : summed.options();
  const optional<Dropout> dropout = make_dropout("add_layer_norm", dropout_p, seed, site);
  const bool own_dx = dropout || x_dtype != residual_dtype;  // else dx equals dresidual, and the dx returned is empty
  const Tensor dresidual = at::empty(summed.sizes(), summed.options().dtype(residual_dtype));
  const Tensor dx = own_dx ? at::empty(summed.sizes(), summed.options().dtype(x_dtype))
                           : at::empty({0}, summed.options().dtype(x_dtype));
  if (summed.numel() == 0) {
    return {dx, dresidual, at::zeros({needs_weight ? N : 0}, options), at::zeros({needs_bias ? N : 0}, options)};
  }
  const Rows sum(summed), upstream(dnormed), stream_out(dresidual);
  const optional<Rows> carried = dsummed.has_value() ? optional<Rows>(Rows(*dsummed)) : std::nullopt;
  const optional<Rows> branch_out = own_dx ? optional<Rows>(Rows(dx)) : std::nullopt;
  const Parameter gain(weight);
  const float* mean_data = mean.const_data_ptr<float>();
  const float* rstd_data = rstd.const_data_ptr<float>();
  const ParameterGradients gradients(sum.M(), N, options, needs_weight, needs_bias);
  gradients.for_each_block([&](int64_t begin, int64_t end, float* dweight, float* dbias) {
    std::vector<float> sum_buffer(N), upstream_buffer(N), carried_buffer(N), stream_buffer(N), branch_buffer(N);
    std::vector<float> factors(N, 1.0f);
    for (int64_t i = begin; i < end; ++i) {
      float* total = stream_out.target(i, stream_buffer.data());
      differentiate_row(upstream.read(i, upstream_buffer.data()), sum.read(i, sum_buffer.data()),
                        {mean_data[i], rstd_data[i]}, gain.data(), N, total, dweight, dbias);
      if (carried) {
        const float* carried_row = carried->read(i, carried_buffer.data());
        at::vec::map2<float>(add, total, total, carried_row, N);
      }
      stream_out.write(i, total);
      if (branch_out) {
        if (dropout) dropout->row(i, N, factors.data());
        float* target = branch_out->target(i, branch_buffer.data());
        at::vec::map2<float>([](Vec a, Vec b) { return a * b; }, target, total, factors.data(), N);
        branch_out->write(i, target);
      }
    }
  });
  return {dx, dresidual, gradients.dweight(), gradients.dbias()};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("add_layer_norm_forward", add_layer_norm_forward);
  m.impl("add_layer_norm_backward", add_layer_norm_backward);
}

}  // namespace gpt_fast
