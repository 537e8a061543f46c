// layer_norm on CPU: a row is read from memory once, and stays in cache for its mean, its variance and its output.
#include <limits>
#include <vector>

#include "cpu/core/norm.h"

namespace gpt_fast {
namespace {

using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const optional<Tensor>& weight,
                                                      const optional<Tensor>& bias, double eps,
                                                      optional<at::ScalarType> y_dtype) {
  const Tensor y = at::empty(x.sizes(), x.options().dtype(y_dtype.value_or(x.scalar_type())));
  const auto [mean, rstd] = empty_statistics(x);
  if (x.numel() == 0) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    return {y, mean.fill_(nan), rstd.fill_(nan)};
  }
  const Rows in(x), out(y);
  const Parameter gain(weight), shift(bias);
  const int64_t N = in.N();
  float* mean_data = mean.mutable_data_ptr<float>();
  float* rstd_data = rstd.mutable_data_ptr<float>();
  parallel_for(0, in.M(), row_grain(N), [&](int64_t begin, int64_t end) {
    std::vector<float> in_buffer(N), out_buffer(N);
    for (int64_t i = begin; i < end; ++i) {
      const float* row = in.read(i, in_buffer.data());
      const Statistics statistics = row_statistics(row, N, eps);
      float* target = out.target(i, out_buffer.data());
      normalise_row(row, statistics, gain.data(), shift.data(), N, target);
      out.write(i, target);
      mean_data[i] = statistics.mean;
      rstd_data[i] = statistics.rstd;
    }
  });
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& dy, const Tensor& x,
                                                       const optional<Tensor>& weight, const Tensor& mean,
                                                       const Tensor& rstd, bool needs_weight, bool needs_bias) {
  const int64_t N = x.size(-1);
  const Tensor dx = at::empty(x.sizes(), x.options());
  const auto options = weight.has_value() ? weight->options() : x.options();
  if (x.numel() == 0) {
    return {dx, at::zeros({needs_weight ? N : 0}, options), at::zeros({needs_bias ? N : 0}, options)};
  }
  const Rows in(x), upstream(dy), out(dx);
  const Parameter gain(weight);
  const float* mean_data = mean.const_data_ptr<float>();
  const float* rstd_data = rstd.const_data_ptr<float>();
  const ParameterGradients gradients(in.M(), N, options, needs_weight, needs_bias);
  gradients.for_each_block([&](int64_t begin, int64_t end, float* dweight, float* dbias) {
    std::vector<float> in_buffer(N), upstream_buffer(N), out_buffer(N);
    for (int64_t i = begin; i < end; ++i) {
      float* target = out.target(i, out_buffer.data());
      differentiate_row(upstream.read(i, upstream_buffer.data()), in.read(i, in_buffer.data()),
                        {mean_data[i], rstd_data[i]}, gain.data(), N, target, dweight, dbias);
      out.write(i, target);
    }
  });
  return {dx, gradients.dweight(), gradients.dbias()};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("layer_norm_forward", layer_norm_forward);
  m.impl("layer_norm_backward", layer_norm_backward);
}

}  // namespace gpt_fast
