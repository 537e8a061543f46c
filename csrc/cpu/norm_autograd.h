// Autograd of layer_norm and add_layer_norm in C++. At 128 × 768 a norm recorded for backward takes 50 µs so, and 75
// with checks and autograd in Python; around the other ops that is lost in the work.
//
// These are composite operators: whatever traces an operator sees the two that lie below, `<op>_forward` and
// `<op>_backward`. They serve plainly valid arguments and raise ValueError on any other: then the checks in
// gpt_fast/ops tell what is wrong.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <utility>

namespace gpt_fast {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// The gradients, which depend on the sources, but differentiating them raises.
struct DifferentiatedOnce : Function<DifferentiatedOnce> {
  static variable_list forward(AutogradContext* ctx, std::string op, at::TensorList grads, at::TensorList sources) {
    ctx->saved_data["op"] = op;
    return grads.vec();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    C10_THROW_ERROR(NotImplementedError, "gpt_fast." + ctx->saved_data["op"].toStringRef() +
                                             ": double backward is not implemented; run forward and backward under "
                                             "gpt_fast.use_reference(), which can be differentiated twice");
  }
};

inline variable_list differentiated_once(const char* op, variable_list grads, const variable_list& sources) {
  if (!at::GradMode::is_enabled()) return grads;
  variable_list present, known;
  for (const at::Tensor& grad : grads) {
    if (grad.defined()) present.push_back(grad);
  }
  for (const at::Tensor& source : sources) {
    if (source.defined()) known.push_back(source);
  }
  const variable_list marked =
      DifferentiatedOnce::apply(std::string(op), at::TensorList(present), at::TensorList(known));
  auto next = marked.begin();
  for (at::Tensor& grad : grads) {
    if (grad.defined()) grad = *next++;
  }
  return grads;
}

// What backward is asked for beside the gradient of its first `activations` inputs. Absent parameters have no number.
struct Needs {
  Needs(const AutogradContext* ctx, size_t activations, bool has_weight, bool has_bias)
      : weight(has_weight && ctx->needs_input_grad(activations)),
        bias(has_bias && ctx->needs_input_grad(activations + 1)) {}
  bool weight, bias;
};

inline at::Tensor where(bool needed, const at::Tensor& grad) { return needed ? grad : at::Tensor(); }

inline std::optional<at::Tensor> given(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

inline bool has_kernel(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  return x.is_cpu() && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

inline bool plainly_valid(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                          const std::optional<at::Tensor>& bias, double eps) {
  if (!has_kernel(x) || x.dim() == 0 || !(eps > 0) || (bias.has_value() && !weight.has_value())) return false;
  for (const auto* parameter : {&weight, &bias}) {
    if (!parameter->has_value()) continue;
    const at::Tensor& values = parameter->value();
    if (!has_kernel(values) || values.dim() != 1 || values.size(0) != x.size(-1)) return false;
    if (values.scalar_type() != weight->scalar_type()) return false;
  }
  return true;
}

}  // namespace gpt_fast
