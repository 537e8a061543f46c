// mlp by cuBLASLt's products and epilogues: relu and gelu_tanh without dropout, in 16 bits, sizes a multiple of 8. What
// is computed and where it is rounded is as in kernels/mlp.py; beside h or z, relu keeps cuBLASLt's mask, a bit an
// element.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cublaslt.h"

namespace gpt_fast {
namespace {

using at::Tensor;
using std::optional;

// Returns x in a layout that a product takes: rows or columns of neighbours, 16 bytes apart or a multiple of it. Other
// layouts are copied.
Tensor usable(const Tensor& x) {
  const auto lies = [&](int64_t inner, int64_t outer) {
    return x.stride(inner) == 1 && x.stride(outer) % 8 == 0 && x.stride(outer) >= x.size(inner);
  };
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0;
  return aligned && (lies(1, 0) || lies(0, 1)) ? x : x.clone(at::MemoryFormat::Contiguous);
}

Tensor usable_vector(const Tensor& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kAlignment == 0;
  return aligned && x.is_contiguous() ? x : x.clone(at::MemoryFormat::Contiguous);
}

Matrix matrix(const Tensor& x) {
  const bool by_rows = x.stride(1) == 1 && x.stride(0) >= x.size(1);
  return {const_cast<void*>(x.const_data_ptr()), by_rows ? x.stride(0) : x.stride(1), !by_rows};
}

void* data(const Tensor& x) { return x.mutable_data_ptr(); }

Tensor rows_of(const Tensor& x) {
  const int64_t C = x.size(-1);
  return usable(x.reshape({x.numel() / C, C}));
}

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = last;
  return sizes;
}

int64_t mask_bits(int64_t F) { return (F + kMaskBits - 1) / kMaskBits * kMaskBits; }

// The products of one call: they share operands' type, workspace and stream, and run one after the other.
class Products {
 public:
  Products(const Tensor& x, c10::string_view activation)
      : relu_(activation == "relu"),
        type_(x.scalar_type() == at::kHalf ? CUDA_R_16F : CUDA_R_16BF),
        workspace_(at::empty({static_cast<int64_t>(kWorkspace)}, x.options().dtype(at::kByte))),
        stream_(c10::cuda::getCurrentCUDAStream()) {
    TORCH_CHECK_VALUE(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, "gpt_fast.mlp: x is ",
                      x.scalar_type(), ", cuBLASLt serves bfloat16 and float16");
    TORCH_CHECK_VALUE(relu_ || activation == "gelu_tanh", "gpt_fast.mlp: activation is '", activation,
                      "'; expected one of relu, gelu_tanh, which cuBLASLt serves");
  }

  bool relu() const { return relu_; }

  // h = act(x W1ᵀ + b1) [M, F]; aux, if it is to be kept: relu's mask or gelu's argument.
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

  // out = a bᵀ, with K columns each.
  void plain(Matrix a, Matrix b, const Tensor& out, int64_t K, Epilogue epilogue, const Tensor& bias) const {
    run(a, b, out, K, epilogue, bias, nullptr);
  }

 private:
  void run(Matrix a, Matrix b, const Tensor& out, int64_t K, Epilogue epilogue, const Tensor& bias,
           const Tensor* aux) const {
    const Product problem{
        .a = a,
        .b = b,
        .out = matrix(out),
        .M = out.size(0),
        .N = out.size(1),
        .K = K,
        .type = type_,
        .epilogue = epilogue,
        .bias = bias.defined() ? data(bias) : nullptr,
        .aux = aux == nullptr ? nullptr : data(*aux),
        .ld_aux = aux == nullptr ? 0 : (relu_ ? mask_bits(out.size(1)) : out.size(1)),
        .workspace = data(workspace_),
    };
    const cublasStatus_t status = product(problem, stream_);
    TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "gpt_fast.mlp: cuBLASLt: ", cublasLtGetStatusString(status),
                " for a product of ", problem.M, " x ", problem.N, " x ", problem.K);
  }

  bool relu_;
  cudaDataType type_;
  Tensor workspace_;
  cudaStream_t stream_;
};

void check_sizes(const Tensor& x, const Tensor& fc_weight, const Tensor& proj_weight) {
  const int64_t C = x.size(-1), F = fc_weight.size(0), C_out = proj_weight.size(0);
  TORCH_CHECK_VALUE(C % 8 == 0 && F % 8 == 0 && C_out % 8 == 0 && C * F * C_out > 0, "gpt_fast.mlp: sizes are C ", C,
                    ", F ", F, ", C' ", C_out, ", cuBLASLt serves multiples of 8");
}

// The products take every operand for one of x's dtype.
void check_dtypes(const Tensor& x, std::initializer_list<optional<Tensor>> others) {
  for (const optional<Tensor>& other : others) {
    TORCH_CHECK_VALUE(!other.has_value() || other->scalar_type() == x.scalar_type(),
                      "gpt_fast.mlp: an operand has dtype ", other->scalar_type(), "; expected ", x.scalar_type(),
                      ", as x");
  }
}

Tensor new_mask(const Tensor& x, int64_t M, int64_t F) {
  return at::empty({M, mask_bits(F) / 8}, x.options().dtype(at::kByte));
}

std::tuple<Tensor, Tensor, Tensor> mlp_forward(const Tensor& x, const Tensor& fc_weight,
                                               const optional<Tensor>& fc_bias, const Tensor& proj_weight,
                                               const optional<Tensor>& proj_bias, c10::string_view activation,
                                               bool keeps_hidden) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Products products(x, activation);
  check_sizes(x, fc_weight, proj_weight);
  check_dtypes(x, {fc_weight, fc_bias, proj_weight, proj_bias});
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
  products.plain(matrix(h), matrix(usable(proj_weight)), y.view({M, C_out}), F, Epilogue::kNone, bias);
  return {y, hidden, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    const Tensor& dy, const Tensor& x, const Tensor& fc_weight, const optional<Tensor>& fc_bias,
    const Tensor& proj_weight, const optional<Tensor>& hidden, const optional<Tensor>& mask,
    c10::string_view activation, std::array<bool, 5> needs) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Products products(x, activation);
  check_sizes(x, fc_weight, proj_weight);
  check_dtypes(x, {dy, fc_weight, fc_bias, proj_weight, hidden});
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
    products.plain(transpose(matrix(dy_rows)), transpose(matrix(h)), dproj_weight, M, Epilogue::kSumA,
                   needs_proj_bias ? dproj_bias : Tensor());
  } else if (needs_proj_bias) {
    dproj_bias.copy_(at::sum(dy_rows, {0}, /*keepdim=*/false, at::kFloat));
  }
  if (needs_dz) {
    const Tensor dz = at::empty({M, F}, x.options());
    products.gradient(dy_rows, second, dz, needs_fc_bias ? dfc_bias : Tensor(), aux);
    if (needs_fc_weight)
      products.plain(transpose(matrix(dz)), transpose(matrix(rows)), dfc_weight, M, Epilogue::kNone, Tensor());
    if (needs_x) {
      const Tensor first = usable(fc_weight);
      products.plain(matrix(dz), transpose(matrix(first)), dx.view({M, C}), F, Epilogue::kNone, Tensor());
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
