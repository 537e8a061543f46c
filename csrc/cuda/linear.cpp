// Backward of linear by cuBLASLt, whose epilogue sums the bias's gradient in the product of the weight's: 16 bits,
// sizes a multiple of 8. Without it the sum is a pass of its own over dy.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <tuple>

#include "products.h"

namespace gpt_fast {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                   bool needs_x, bool needs_weight, bool needs_bias) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Products products("linear", x);
  check_dtypes("linear", x, {dy, weight});
  const int64_t N = weight.size(0), C = weight.size(1);
  TORCH_CHECK_VALUE(C % 8 == 0 && N % 8 == 0 && C * N > 0, "gpt_fast.linear: sizes are C ", C, ", N ", N,
                    ", cuBLASLt serves multiples of 8");
  const Tensor nothing = at::empty({0}, x.options());
  const Tensor dx = needs_x ? at::empty(x.sizes(), x.options()) : nothing;
  const Tensor dweight = needs_weight ? at::empty_like(weight) : nothing;
  const Tensor dbias = at::empty({needs_bias ? N : 0}, x.options());
  const int64_t M = x.numel() / C;
  if (M == 0) {
    for (const Tensor& gradient : {dweight, dbias}) gradient.zero_();
    return {dx, dweight, dbias};
  }

  const Tensor dy_rows = rows_of(dy);
  if (needs_weight) {
    const Tensor rows = rows_of(x);
    products.run(transpose(matrix(dy_rows)), transpose(matrix(rows)), dweight, M, Epilogue::kSumA,
                 needs_bias ? dbias : Tensor());
  } else if (needs_bias) {
    dbias.copy_(at::sum(dy_rows, {0}, /*keepdim=*/false, at::kFloat));
  }
  if (needs_x) {
    const Tensor kept = usable(weight);
    products.run(matrix(dy_rows), transpose(matrix(kept)), dx.view({M, C}), N, Epilogue::kNone, Tensor());
  }
  return {dx, dweight, dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CUDA, m) { m.impl("linear_cublaslt_backward", linear_backward); }

}  // namespace gpt_fast
