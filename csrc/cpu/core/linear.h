// The products of a linear layer, for linear and mlp: A B + bias, the gradient of a weight in the weight's strides, and
// the gradient of a bias. Rows are processed in chunks of kChunk. The weight gradients of the chunks add up in float32,
// in the order of the rows.
#pragma once

#include <vector>

#include "cpu/core/gemm.h"

namespace gpt_fast {

using at::Tensor;
using std::optional;

constexpr int64_t kChunk = 1024;  // rows; a multiple of 16, so that a chunk does not separate dropout's pairs of rows

inline std::vector<int64_t> with_last(const Tensor& x, int64_t N) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = N;
  return sizes;
}

// out [rows, N] = A B + bias, rounded once.
template <typename scalar_t>
inline void multiply_into(const PackedRows<scalar_t>& a, const Operand<scalar_t>& b, int64_t N, int64_t K,
                          const float* bias, scalar_t* out, int64_t stride_out) {
  const int64_t M = a.rows, blocks = ceil_div(N, kBlock), pieces = row_pieces(M, blocks);
  const int64_t piece_rows = round_up(ceil_div(M, pieces), kRows);
  parallel_for(0, blocks * pieces, 1, [&](int64_t begin, int64_t end) {
    const BlockProduct product;
    const Buffer c(piece_rows * kBlock);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task / pieces * kBlock, width = std::min(kBlock, N - column);
      const int64_t first = std::min(M, task % pieces * piece_rows), last = std::min(M, first + piece_rows);
      product(a, first, last, b.from(column, 0), width, K, c.data());
      for (int64_t i = first; i < last; ++i) {
        float* row = c.data() + (i - first) * kBlock;
        if (bias != nullptr) {
          for (int64_t j = 0; j < kBlock; j += kVec) {
            (Vec::loadu(row + j) + Vec::loadu(bias + column + j)).store(row + j);
          }
        }
        round_row(row, out + i * stride_out + column, width);
      }
    }
  });
}

// Sum of a weight's gradient over the chunks. The sum is made in place if the gradient is float32 or there is one chunk
// only, else in a float32 tensor beside it. Element (i, j) of a block belongs to the weight's element
// [row + i, column + j], or to [column + j, row + i] if `stride_row` is the stride of the weight's columns.
class WeightGradient {
 public:
  WeightGradient(const Tensor& gradient, bool needed, int64_t chunks)
      : needed(needed), gradient_(gradient), sums_(gradient) {
    ask_for_huge_pages(gradient);
    if (needed && chunks > 1 && gradient.scalar_type() != at::kFloat) {
      sums_ = at::empty_like(gradient, gradient.options().dtype(at::kFloat));
    }
  }

  template <typename scalar_t>
  void add(const float* block, int64_t rows, int64_t width, int64_t stride_row, int64_t stride_column, int64_t row,
           int64_t column, bool accumulate) const {
    const int64_t offset = row * stride_row + column * stride_column;
    if (sums_.scalar_type() == at::kFloat) {
      add_block(block, rows, width, sums_.mutable_data_ptr<float>() + offset, stride_row, stride_column, accumulate);
    } else {
      add_block(block, rows, width, sums_.mutable_data_ptr<scalar_t>() + offset, stride_row, stride_column, false);
    }
  }

  void finish() const {
    if (needed && !sums_.is_same(gradient_)) gradient_.copy_(sums_);
  }

  int64_t stride(int64_t dim) const { return gradient_.stride(dim); }

  const bool needed;

 private:
  Tensor gradient_, sums_;
};

// sums[j] += the sum of column j of dy, whose rows are added in their order.
template <typename scalar_t>
inline void add_column_sums(const Tensor& dy, float* sums) {
  const int64_t M = dy.size(0), N = dy.size(1);
  const scalar_t* rows = dy.const_data_ptr<scalar_t>();
  parallel_for(0, N, std::max<int64_t>(kBlock, kGrain / std::max<int64_t>(M, 1)), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(end - begin), total(end - begin);
    for (int64_t i = 0; i < M; ++i) {
      const float* row = load_row(rows + i * dy.stride(0) + begin, buffer.data(), end - begin);
      at::vec::map2<float>([](Vec a, Vec b) { return a + b; }, total.data(), total.data(), row, end - begin);
    }
    for (int64_t j = begin; j < end; ++j) sums[j] += total[j - begin];
  });
}

}  // namespace gpt_fast
