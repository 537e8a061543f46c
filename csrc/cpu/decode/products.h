// Products of a weight matrix with a few vectors or many: y[b][n] = sum over k of W[n, k] x[b][k].
//
// Weights are packed in panels of kVec rows, whose words lie side by side for one k after another: a register holds one
// word of each row, and no sum crosses its lanes. A tile of panels and vectors keeps its sums in registers for a chain
// of words. With one vector the product is bound by reading the weights, with many by the multiplications. One sum is
// always made in the same order, whatever rows and vectors are taken together: results depend neither on the number of
// threads nor on that of the vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/decode/formats.h"

namespace gpt_fast::decode {

// A weight matrix [N, K] as panels [ceil(N / kVec), words, kVec]. `scale` [N] is null where every row's is 1, `bias`
// [N] where there is none.
template <class Format>
struct Matrix {
  const Word* data = nullptr;
  const float* scale = nullptr;
  const float* bias = nullptr;
  int64_t N = 0, words = 0;

  int64_t panels() const { return ceil_div(N, kVec); }
};

// Words from one prepared vector to the next.
template <class Format>
inline int64_t input_stride(int64_t words) {
  return round_up(words * Format::kInputWords + words / Format::kChain + 1, 16);
}

// Vectors prepared for a product: words [B, input_stride] and a scale for each.
struct Inputs {
  const Word* data;
  const float* scale;
};

// y[i][lane of panel r] (+)= sum over the words from `begin` to `end`; rows of y are `width` apart. A function of its
// own, not inlined: its sums then stay in registers.
template <class Format, int R, int B>
[[gnu::noinline]] void add_up(const Word* const (&panels)[R], const Word* x, int64_t words, int64_t begin, int64_t end,
                              float* y, int64_t width) {
  constexpr int64_t STEP = Format::kInputWords;
  const int64_t stride = input_stride<Format>(words);
  typename Format::Sum sum[B][R];
#pragma GCC unroll 8
  for (int i = 0; i < B; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[i][r] = Format::start(x[i * stride + words * STEP + begin / Format::kChain]);
  }
  for (int64_t k = begin; k < end; ++k) {
    typename Format::Weights weights[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) weights[r] = Format::load(panels[r] + k * kVec);
#pragma GCC unroll 8
    for (int i = 0; i < B; ++i) {
      const typename Format::Input input = Format::load_input(x + i * stride + k * STEP);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[i][r] = Format::multiply(weights[r], input, sum[i][r]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < B; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float* out = y + i * width + r * kVec;
      const Vec result = Format::finish(sum[i][r]);
      (begin == 0 ? result : Vec::loadu(out) + result).store(out);
    }
  }
}

// R panels from `panel` on times all B vectors. The words of a chain stay in a cache for all groups of vectors.
template <class Format, int R>
inline void multiply_panels(const Matrix<Format>& matrix, int64_t panel, const Inputs& x, int64_t B, float* y,
                            int64_t width) {
  constexpr int MOST = Format::kTileVectors;
  const int64_t words = matrix.words, stride = input_stride<Format>(words);
  const Word* panels[R];
  for (int r = 0; r < R; ++r) panels[r] = matrix.data + (panel + r) * words * kVec;
  for (int64_t begin = 0; begin < words; begin += Format::kChain) {
    const int64_t end = std::min(words, begin + Format::kChain);
    int64_t b = 0;
    const auto add = [&](auto count) {
      add_up<Format, R, decltype(count)::value>(panels, x.data + b * stride, words, begin, end, y + b * width, width);
      b += decltype(count)::value;
    };
    while (B - b >= MOST && B - b != 8) add(std::integral_constant<int, MOST>{});
    while (B - b >= 4) add(std::integral_constant<int, 4>{});
    if (B - b >= 2) add(std::integral_constant<int, 2>{});
    if (B - b >= 1) add(std::integral_constant<int, 1>{});
  }
}

// Panels `begin` to `end` of the matrix times all B vectors: y [B, (end - begin) * kVec].
template <class Format>
inline void multiply(const Matrix<Format>& matrix, int64_t begin, int64_t end, const Inputs& x, int64_t B, float* y) {
  const int64_t width = (end - begin) * kVec;
  int64_t panel = begin;
  const auto advance = [&](auto count) {
    constexpr int R = decltype(count)::value;
    multiply_panels<Format, R>(matrix, panel, x, B, y + (panel - begin) * kVec, width);
    panel += R;
  };
  while (end - panel >= kTilePanels) advance(std::integral_constant<int, kTilePanels>{});
  while (end - panel >= 2) advance(std::integral_constant<int, 2>{});
  if (end - panel >= 1) advance(std::integral_constant<int, 1>{});

  const int64_t n = begin * kVec, rows = std::min(matrix.N, end * kVec) - n;
  if (matrix.scale == nullptr && matrix.bias == nullptr && !Format::kScaled) return;
  for (int64_t b = 0; b < B; ++b) {
    float* row = y + b * width;
    const Vec scale(x.scale[b]);
    for_each_vector(rows, [&](int64_t i, int64_t count) {
      const Vec own = matrix.scale == nullptr ? scale : scale * Vec::loadu(matrix.scale + n + i, count);
      const Vec bias = matrix.bias == nullptr ? Vec(0.0f) : Vec::loadu(matrix.bias + n + i, count);
      at::vec::fmadd(Vec::loadu(row + i, count), own, bias).store(row + i, count);
    });
  }
}

}  // namespace gpt_fast::decode
