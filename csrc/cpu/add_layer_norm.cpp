// add_layer_norm on CPU: dropout, residual addition and norm of a row while it is in cache.
//
// summed = residual + x * factor, factor = scale or 0 of the dropout rule; normed is the norm of `summed` as stored.
// Backward: d = d(norm) + dsummed, dresidual = d, dx = d * factor.
#include <limits>
#include <optional>
#include <vector>

#include "cpu/core/norm.h"
#include "norm_autograd.h"

namespace gpt_fast {
namespace {

using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& x, const Tensor& residual,
                                                                  const optional<Tensor>& weight,
                                                                  const optional<Tensor>& bias, double eps,
                                                                  double dropout_p, const optional<Tensor>& seed,
                                                                  int64_t site) {
  const auto options = x.options().dtype(at::promote_types(x.scalar_type(), residual.scalar_type()));
  const Tensor normed = at::empty(x.sizes(), options), summed = at::empty(x.sizes(), options);
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
  at::parallel_for(0, branch.M(), row_grain(N), [&](int64_t begin, int64_t end) {
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
  const bool own_dx = dropout || x_dtype != residual_dtype;  // else dx is dresidual, and stays empty
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

struct AddLayerNorm : Function<AddLayerNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual,
                               const optional<Tensor>& weight, const optional<Tensor>& bias, double eps,
                               double dropout_p, const optional<Tensor>& seed, int64_t site) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const optional<Tensor>&, const optional<Tensor>&, double, double,
        const optional<Tensor>&, int64_t)>("gpt_fast::add_layer_norm_forward");
    const auto [normed, summed, mean, rstd] = op.call(x, residual, weight, bias, eps, dropout_p, seed, site);
    ctx->save_for_backward({summed, weight.value_or(Tensor()), mean, rstd, seed.value_or(Tensor())});
    ctx->saved_data["has_bias"] = bias.has_value();
    ctx->saved_data["x_dtype"] = x.scalar_type();
    ctx->saved_data["residual_dtype"] = residual.scalar_type();
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["site"] = site;
    ctx->set_materialize_grads(false);
    return {normed, summed};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& upstream) {
    static const auto op = find_operator<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const optional<Tensor>&, const Tensor&, const optional<Tensor>&, const Tensor&, const Tensor&,
        at::ScalarType, at::ScalarType, double, const optional<Tensor>&, int64_t, bool, bool)>(
        "gpt_fast::add_layer_norm_backward");
    if (!upstream[0].defined() && !upstream[1].defined()) return variable_list(8);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &summed = saved[0], &weight = saved[1];
    const Needs needs(ctx, 2, weight.defined(), ctx->saved_data["has_bias"].toBool());
    const auto x_dtype = ctx->saved_data["x_dtype"].toScalarType();
    const auto residual_dtype = ctx->saved_data["residual_dtype"].toScalarType();
    const double dropout_p = ctx->saved_data["dropout_p"].toDouble();
    at::AutoDispatchBelowADInplaceOrView below;
    const Tensor dnormed = upstream[0].defined() ? upstream[0] : at::zeros_like(summed);
    const auto [dx, dresidual, dweight, dbias] =
        op.call(dnormed, given(upstream[1]), summed, given(weight), saved[2], saved[3], x_dtype, residual_dtype,
                dropout_p, given(saved[4]), ctx->saved_data["site"].toInt(), needs.weight, needs.bias);
    const bool own_dx = dropout_p > 0 || x_dtype != residual_dtype;
    variable_list grads(8);
    grads[0] = own_dx ? dx : dresidual;
    grads[1] = dresidual;
    grads[2] = where(needs.weight, dweight);
    grads[3] = where(needs.bias, dbias);
    return differentiated_once("add_layer_norm", std::move(grads), {upstream[0], upstream[1], summed, weight});
  }
};

std::tuple<Tensor, Tensor> add_layer_norm(const Tensor& x, const Tensor& residual, const optional<Tensor>& weight,
                                          const optional<Tensor>& bias, double eps, double dropout_p,
                                          const optional<Tensor>& seed, int64_t site) {
  const bool valid = plainly_valid(x, weight, bias, eps) && has_kernel(residual) && residual.sizes() == x.sizes() &&
                     dropout_p >= 0 && dropout_p < 1 && (dropout_p == 0 || seed.has_value()) &&
                     (!seed.has_value() || (seed->is_cpu() && seed->scalar_type() == at::kLong && seed->numel() == 1));
  TORCH_CHECK_VALUE(valid, "gpt_fast.add_layer_norm: not plainly valid arguments");
  const variable_list outputs = AddLayerNorm::apply(x, residual, weight, bias, eps, dropout_p, seed, site);
  return {outputs[0], outputs[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("add_layer_norm_forward", add_layer_norm_forward);
  m.impl("add_layer_norm_backward", add_layer_norm_backward);
}

TORCH_LIBRARY_IMPL(gpt_fast, CompositeImplicitAutograd, m) { m.impl("add_layer_norm", add_layer_norm); }

}  // namespace gpt_fast
