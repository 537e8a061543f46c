// layer_norm on CPU: a row is read from memory once and stays in cache for its mean, its variance and its output.
#include <limits>
#include <vector>

#include "cpu/core/norm.h"
#include "norm_autograd.h"

namespace gpt_fast {
namespace {

using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor, Tensor> layer_norm_forward(const Tensor& x, const optional<Tensor>& weight,
                                                      const optional<Tensor>& bias, double eps) {
  const Tensor y = at::empty(x.sizes(), x.options());
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
  at::parallel_for(0, in.M(), row_grain(N), [&](int64_t begin, int64_t end) {
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

struct LayerNorm : Function<LayerNorm> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const optional<Tensor>& weight,
                        const optional<Tensor>& bias, double eps) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const optional<Tensor>&, const optional<Tensor>&, double)>("gpt_fast::layer_norm_forward");
    const auto [y, mean, rstd] = op.call(x, weight, bias, eps);
    ctx->save_for_backward({x, weight.value_or(Tensor()), mean, rstd});
    ctx->saved_data["has_bias"] = bias.has_value();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&, bool, bool)>(
        "gpt_fast::layer_norm_backward");
    const variable_list saved = ctx->get_saved_variables();
    const Needs needs(ctx, 1, saved[1].defined(), ctx->saved_data["has_bias"].toBool());
    at::AutoDispatchBelowADInplaceOrView below;
    const auto [dx, dweight, dbias] =
        op.call(upstream[0], saved[0], given(saved[1]), saved[2], saved[3], needs.weight, needs.bias);
    variable_list grads = {dx, where(needs.weight, dweight), where(needs.bias, dbias), Tensor()};
    return differentiated_once("layer_norm", std::move(grads), {upstream[0], saved[0], saved[1]});
  }
};

Tensor layer_norm(const Tensor& x, const optional<Tensor>& weight, const optional<Tensor>& bias, double eps) {
  TORCH_CHECK_VALUE(plainly_valid(x, weight, bias, eps), "gpt_fast.layer_norm: not plainly valid arguments");
  return LayerNorm::apply(x, weight, bias, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("layer_norm_forward", layer_norm_forward);
  m.impl("layer_norm_backward", layer_norm_backward);
}

TORCH_LIBRARY_IMPL(gpt_fast, CompositeImplicitAutograd, m) { m.impl("layer_norm", layer_norm); }

}  // namespace gpt_fast
