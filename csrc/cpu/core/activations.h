// The activations of an MLP and their derivatives, for training (mlp.cpp) and for decoding (decode/session.cpp).
//
// To add an activation, add its name to the enum and to kActivations, its formula to `activate` and its case to
// `with_activation`. Then add it to the table in gpt_fast/_activations.py and to kernels/mlp.py.
// tests/ops/test_activations.py compares the three.
#pragma once

#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "cpu/core/common.h"
#include "cpu/core/vector_math.h"

namespace gpt_fast {

enum class Activation { kRelu, kGelu, kGeluTanh };

constexpr std::pair<std::string_view, Activation> kActivations[] = {
    {"relu", Activation::kRelu}, {"gelu", Activation::kGelu}, {"gelu_tanh", Activation::kGeluTanh}};

// Returns the activation of that name, or nothing for an unknown name. unknown_activation() returns the error message.
inline std::optional<Activation> find_activation(std::string_view name) {
  for (const auto& [known, activation] : kActivations) {
    if (known == name) return activation;
  }
  return std::nullopt;
}

inline std::string unknown_activation(std::string_view name) {
  std::string text = "activation is '" + std::string(name) + "'; expected one of ";
  for (const auto& [known, activation] : kActivations) {
    if (known != kActivations[0].first) text += ", ";
    text += known;
  }
  return text;
}

struct ValueAndSlope {
  Vec value, slope;
};

// Returns the activation of z and its derivative; the compiler drops the one that the caller does not use.
template <Activation ACTIVATION>
inline ValueAndSlope activate(Vec z) {
  const Vec one(1.0f), half(0.5f);
  if constexpr (ACTIVATION == Activation::kRelu) {
    return {at::vec::maximum(z, Vec(0.0f)), Vec::blendv(one, Vec(0.0f), z <= Vec(0.0f))};
  } else if constexpr (ACTIVATION == Activation::kGelu) {
    const Vec cdf = half * (one + (z * Vec(0.70710678f)).erf());
    const Vec pdf = exp(z * z * Vec(-0.5f)) * Vec(0.39894228f);
    return {z * cdf, at::vec::fmadd(z, pdf, cdf)};
  } else {
    static_assert(ACTIVATION == Activation::kGeluTanh);
    // (1 + tanh u) / 2 = 1 / (1 + exp(-2u)) with u = sqrt(2 / pi) (z + 0.044715 z^3).
    const Vec square = z * z, c(-2.0f * 0.79788456f);
    const Vec cdf = one / (one + exp(c * z * at::vec::fmadd(square, Vec(0.044715f), one)));
    const Vec slope_u = c * at::vec::fmadd(square, Vec(3.0f * 0.044715f), one);
    return {z * cdf, cdf - z * cdf * (one - cdf) * slope_u};
  }
}

// Calls function(std::integral_constant<Activation, activation>()).
template <class Function>
void with_activation(Activation activation, const Function& function) {
  switch (activation) {
    case Activation::kRelu:
      return function(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kGelu:
      return function(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return function(std::integral_constant<Activation, Activation::kGeluTanh>());
  }
  TORCH_INTERNAL_ASSERT(false, "gpt_fast: unknown activation code ", static_cast<int>(activation));
}

}  // namespace gpt_fast
