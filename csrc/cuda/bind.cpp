// The CUDA C++ kernels as operators. They are built only if PyTorch has CUDA and nvcc is found. Without them the Triton
// kernels serve.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>

#include "decode_attention.h"

namespace gpt_fast {
namespace {

using at::Tensor;

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Element::kFloat32;
    case at::kBFloat16:
      return Element::kBFloat16;
    case at::kHalf:
      return Element::kFloat16;
    default:
      TORCH_CHECK_VALUE(false, "gpt_fast.decode_attention: q is ", x.scalar_type(),
                        "; expected float32, bfloat16 or float16");
  }
}

Tensor decode_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lengths) {
  const c10::cuda::CUDAGuard guard(q.device());
  for (const Tensor& cache : {k, v}) {
    TORCH_CHECK_VALUE(cache.scalar_type() == q.scalar_type(), "gpt_fast.decode_attention: a cache has dtype ",
                      cache.scalar_type(), "; expected ", q.scalar_type(), ", as q");
  }
  TORCH_CHECK_VALUE(lengths.scalar_type() == at::kLong || lengths.scalar_type() == at::kInt,
                    "gpt_fast.decode_attention: lengths has dtype ", lengths.scalar_type(),
                    "; expected int64 or int32");
  const int64_t B = q.size(0), H = q.size(1), D = q.size(2), S = k.size(2);
  const Tensor out = at::empty({B, H, D}, q.options());
  if (out.numel() == 0) return out;
  const int64_t splits = decode_splits(S);
  const auto workspace = q.options().dtype(at::kFloat);
  const Tensor acc = at::empty({B * H, splits, D}, workspace), statistics = at::empty({B * H, splits, 2}, workspace);
  const Tensor counts = lengths.to(at::kLong).contiguous();
  const DecodeAttention problem{
      .q = q.const_data_ptr(),
      .k = k.const_data_ptr(),
      .v = v.const_data_ptr(),
      .lengths = counts.const_data_ptr<int64_t>(),
      .out = out.mutable_data_ptr(),
      .acc = acc.mutable_data_ptr<float>(),
      .statistics = statistics.mutable_data_ptr<float>(),
      .B = B,
      .H = H,
      .S = S,
      .D = D,
      .stride_q = {q.stride(0), q.stride(1), q.stride(2)},
      .stride_k = {k.stride(0), k.stride(1), k.stride(2), k.stride(3)},
      .stride_v = {v.stride(0), v.stride(1), v.stride(2), v.stride(3)},
      .scale = 1.0f / std::sqrt(static_cast<float>(D)),
      .element = element_of(q),
  };
  C10_CUDA_CHECK(decode_attention(problem, c10::cuda::getCurrentCUDAStream()));
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CUDA, m) { m.impl("decode_attention_cuda_forward", decode_attention_forward); }

}  // namespace gpt_fast
