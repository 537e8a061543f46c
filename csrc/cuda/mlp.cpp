// mlp by cuBLASLt's products and epilogues: relu and gelu_tanh without dropout, in 16 bits, sizes a multiple of 8. What
// is computed and where it is rounded is as in kernels/mlp.py; beside h or z, relu keeps cuBLASLt's mask, a bit an
// element.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "products.h"

namespace gpt_fast {
namespace {

using at::Tensor;
using std::optional;

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// The products of mlp. `aux` is relu's mask or gelu's argument.
class MlpProducts {
 public:
  MlpProducts(const Tensor& x, c10::string_view activation) : products_("mlp", x), relu_(activation == "relu") {
    TORCH_CHECK_VALUE(relu_ || activation == "gelu_tanh", "gpt_fast.mlp: activation is '", activation,
                      "'; expected one of relu, gelu_tanh, which cuBLASLt serves");
  }

  bool relu() const { return relu_; }

  // h = act(x W1ᵀ + b1) [M, F]; aux is kept, if it is given.
  void hidden(const Tensor& x, const Tensor& fc_weight, const optional<Tensor>& fc_bias, const Tensor& h,
              const Tensor* aux) const {
    const Tensor bias = fc_bias.has_value() ? usable_vector(*fc_bias) : Tensor();
    run(matrix(x), matrix(fc_weight), h, x.size(1), relu_ ? Epilogue::kRelu : Epilogue::kGelu, bias, aux);
  }

  // dz = act'(z) (dy W2) [M, F], and its sum over the rows.
  void gradient(const Tensor& dy, const Tensor& proj_weight, const Tensor& dz, const Tensor& dfc_bias,
                const Tensor& aux) const {
    const Epilogue epilogue = relu_ ? Epilogue::kReluGradient : Epilogue::kGeluGradient;
    run(matrix(dy), transpose(matrix(proj_weight)), dz, dy.size(1), epilogue, dfc_bias, &aux);
  }

  void run(Matrix a, Matrix b, const Tensor& out, int64_t K, Epilogue epilogue, const Tensor& bias,
           const Tensor* aux = nullptr) const {
    products_.run(a, b, out, K, epilogue, bias, aux);
  }

 private:
  Products products_;
  bool relu_;
};

void check_sizes(const Tensor& x, const Tensor& fc_weight, const Tensor& proj_weight) {
  const int64_t C = x.size(-1), F = fc_weight.size(0), C_out = proj_weight.size(0);
  TORCH_CHECK_VALUE(C % 8 == 0 && F % 8 == 0 && C_out % 8 == 0 && C * F * C_out > 0, "gpt_fast.mlp: sizes are C ", C,
                    ", F ", F, ", C' ", C_out, ", cuBLASLt serves multiples of 8");
}

Tensor new_mask(const Tensor& x, int64_t M, int64_t F) {
  return at::empty({M, mask_bits(F) / 8}, x.options().dtype(at::kByte));
}

std::tuple<Tensor, Tensor, Tensor> mlp_forward(const Tensor& x, const Tensor& fc_weight,
                                               const optional<Tensor>& fc_bias, const Tensor& proj_weight,
                                               const optional<Tensor>& proj_bias, c10::string_view activation,
                                               bool keeps_hidden) {
  const c10::cuda::CUDAGuard guard(x.device());
  const MlpProducts products(x, activation);
  check_sizes(x, fc_weight, proj_weight);
  check_dtypes("mlp", x, {fc_weight, fc_bias, proj_weight, proj_bias});
  const bool relu = products.relu();
  const int64_t F = fc_weight.size(0), C_out = proj_weight.size(0);
  const Tensor y = at::empty(with_last(x, C_out), x.options());
  const Tensor hidden = at::empty(keeps_hidden ? with_last(x, F) : std::vector<int64_t>{0}, x.options());
  const int64_t M = x.numel() / x.size(-1);
  const Tensor mask = keeps_hidden && relu ? new_mask(x, M, F) : at::empty({0}, x.options().dtype(at::kByte));
  if (M == 0) return {y, hidden, mask};

  const Tensor kept = keeps_hidden ? hidden.view({M, F}) : hidden;
  const Tensor h = keeps_hidden && relu ? kept : at::empty({M, F}, x.options());
  products.hidden(rows_of(x), usable(fc_weight), fc_bias, h, keeps_hidden ? (relu ? &mask : &kept) : nullptr);
  const Tensor bias = proj_bias.has_value() ? usable_vector(*proj_bias) : Tensor();
  products.run(matrix(h), matrix(usable(proj_weight)), y.view({M, C_out}), F, Epilogue::kNone, bias);
  return {y, hidden, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    const Tensor& dy, const Tensor& x, const Tensor& fc_weight, const optional<Tensor>& fc_bias,
    const Tensor& proj_weight, const optional<Tensor>& hidden, const optional<Tensor>& mask,
    c10::string_view activation, std::array<bool, 5> needs) {
  const c10::cuda::CUDAGuard guard(x.device());
  const MlpProducts products(x, activation);
  check_sizes(x, fc_weight, proj_weight);
  check_dtypes("mlp", x, {dy, fc_weight, fc_bias, proj_weight, hidden});
  const auto [needs_x, needs_fc_weight, needs_fc_bias, needs_proj_weight, needs_proj_bias] = needs;
  const int64_t F = fc_weight.size(0), C = x.size(-1), C_out = proj_weight.size(0), M = x.numel() / C;
  const Tensor nothing = at::empty({0}, x.options());
  const Tensor dx = needs_x ? at::empty(x.sizes(), x.options()) : nothing;
  const Tensor dfc_weight = needs_fc_weight ? at::empty_like(fc_weight) : nothing;
  const Tensor dproj_weight = needs_proj_weight ? at::empty_like(proj_weight) : nothing;
  const Tensor dfc_bias = at::empty({needs_fc_bias ? F : 0}, x.options());
  const Tensor dproj_bias = at::empty({needs_proj_bias ? C_out : 0}, x.options());
  if (M == 0) {
    for (const Tensor& gradient : {dfc_weight, dfc_bias, dproj_weight, dproj_bias}) gradient.zero_();
    return {dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias};
  }

  const Tensor rows = rows_of(x), dy_rows = rows_of(dy);
  const Tensor second = usable(proj_weight);
  const bool needs_dz = needs_x || needs_fc_weight || needs_fc_bias;
  Tensor h, aux;  // h for dW2, aux for dz
  if (hidden.has_value()) {
    const Tensor kept = usable(hidden->view({M, F}));
    aux = products.relu() ? usable_vector(mask.value()) : kept;
    if (products.relu()) h = kept;
  } else if (needs_dz || needs_proj_weight) {
    h = at::empty({M, F}, x.options());
    aux = products.relu() ? new_mask(x, M, F) : at::empty({M, F}, x.options());
    products.hidden(rows, usable(fc_weight), fc_bias, h, &aux);
  }
  // From the rounded argument, though it may just have been made from the exact one: recomputing changes no bit.
  if (needs_proj_weight && !products.relu()) h = at::gelu(aux, "tanh");
  if (needs_proj_weight) {
    products.run(transpose(matrix(dy_rows)), transpose(matrix(h)), dproj_weight, M, Epilogue::kSumA,
                 needs_proj_bias ? dproj_bias : Tensor());
  } else if (needs_proj_bias) {
    dproj_bias.copy_(at::sum(dy_rows, {0}, /*keepdim=*/false, at::kFloat));
  }
  if (needs_dz) {
    const Tensor dz = at::empty({M, F}, x.options());
    products.gradient(dy_rows, second, dz, needs_fc_bias ? dfc_bias : Tensor(), aux);
    if (needs_fc_weight)
      products.run(transpose(matrix(dz)), transpose(matrix(rows)), dfc_weight, M, Epilogue::kNone, Tensor());
    if (needs_x) {
      const Tensor first = usable(fc_weight);
      products.run(matrix(dz), transpose(matrix(first)), dx.view({M, C}), F, Epilogue::kNone, Tensor());
    }
  }
  return {dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CUDA, m) {
  m.impl("mlp_cublaslt_forward", mlp_forward);
  m.impl("mlp_cublaslt_backward", mlp_backward);
}

}  // namespace gpt_fast
