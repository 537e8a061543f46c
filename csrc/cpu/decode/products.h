// Products of a weight matrix with a few vectors or many: y[b][n] = sum over k of W[n, k] x[b][k].
//
// Rows of weights lie one after another, padded with zeros to whole steps of their format, so that a thread reads
// memory from one end to the other. A tile of rows and vectors keeps its sums in registers: with one vector the product
// is bound by reading the weights, with many by the multiplications. One sum is always made in the same order, whatever
// rows and vectors are taken together: results depend neither on the number of threads nor on that of the vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cpu/decode/formats.h"

namespace gpt_fast::decode {

// A weight matrix [N, K] in a format. `scale` is null where every row's is 1, `bias` where there is none.
template <class Format>
struct Matrix {
  const typename Format::weight_t* data = nullptr;
  const float* scale = nullptr;
  const float* bias = nullptr;
  int64_t N = 0, K = 0, stride = 0;  // stride: K in whole steps
};

// Vectors prepared for a product: input_t [B, stride] and a scale for each.
template <class Format>
struct Inputs {
  const typename Format::input_t* data;
  const float* scale;
};

// Rows of a tile. A thread reads them in four places at once: the memory delivers more to a few streams far apart than
// to one.
constexpr int64_t kTileRows = 4;

// y[i][r] = sum over k from begin to end of w[r][k] x[i][k], the vectors a stride apart. A function of its own, not
// inlined: its sums then stay in registers.
template <class Format, int R, int B>
[[gnu::noinline]] void add_up(const typename Format::weight_t* const (&w)[R], const typename Format::input_t* x,
                              int64_t stride, int64_t begin, int64_t end, float (&y)[B][R]) {
  typename Format::Sum sum[B][R];
#pragma GCC unroll 8
  for (int i = 0; i < B; ++i) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum[i][r] = Format::zero();
  }
  for (int64_t k = begin; k < end; k += Format::kStep) {
    typename Format::Inputs inputs[B];
#pragma GCC unroll 8
    for (int i = 0; i < B; ++i) inputs[i] = Format::load_inputs(x + i * stride + k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const typename Format::Weights weights = Format::load(w[r] + k);
#pragma GCC unroll 8
      for (int i = 0; i < B; ++i) sum[i][r] = Format::multiply(weights, inputs[i], sum[i][r]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < B; ++i) {
    if constexpr (R == 4) {
      const Vec sums[4] = {Format::finish(sum[i][0]), Format::finish(sum[i][1]), Format::finish(sum[i][2]),
                           Format::finish(sum[i][3])};
      sum_lanes_of_four(sums, y[i]);
    } else {
      for (int r = 0; r < R; ++r) y[i][r] = sum_lanes(Format::finish(sum[i][r]));
    }
  }
}

// Rows n, n + apart, ... (R of them, of the stripes from `first` on) of the matrix times the B vectors from b on.
template <class Format, int R, int B, class Write>
inline void multiply_tile(const Matrix<Format>& matrix, int64_t tile, int64_t apart, int64_t first,
                          const Inputs<Format>& x, int64_t b, const Write& write) {
  const int64_t n = tile + first * apart;
  const int64_t stride = matrix.stride;
  const typename Format::weight_t* w[R];
  for (int r = 0; r < R; ++r) w[r] = matrix.data + (n + r * apart) * stride;
  float y[B][R];
  add_up<Format, R, B>(w, x.data + b * stride, stride, 0, std::min(stride, Format::kChain), y);
  for (int64_t begin = Format::kChain; begin < stride; begin += Format::kChain) {
    float more[B][R];
    add_up<Format, R, B>(w, x.data + b * stride, stride, begin, std::min(stride, begin + Format::kChain), more);
    for (int i = 0; i < B; ++i) {
      for (int r = 0; r < R; ++r) y[i][r] += more[i][r];
    }
  }
  for (int i = 0; i < B; ++i) {
    for (int r = 0; r < R; ++r) {
      const int64_t row = n + r * apart;
      // Said explicitly: left to the compiler, one tile might fuse this and another not.
      const float scale = matrix.scale != nullptr ? x.scale[b + i] * matrix.scale[row] : x.scale[b + i];
      write(b + i, first + r, tile, std::fma(y[i][r], scale, matrix.bias != nullptr ? matrix.bias[row] : 0.0f));
    }
  }
}

// A matrix is read as kTileRows stripes of equal height, of which tile n takes a row each; what is left over of the
// rows follows as tiles of one row.
template <class Format>
inline int64_t stripe_height(const Matrix<Format>& matrix) {
  return matrix.N / kTileRows;
}

// Tiles `begin` to `end` of the matrix times the B vectors from b on.
template <class Format, int B, class Write>
inline void multiply_vectors(const Matrix<Format>& matrix, int64_t begin, int64_t end, const Inputs<Format>& x,
                             int64_t b, const Write& write) {
  const int64_t apart = stripe_height(matrix);
  for (int64_t n = begin; n < std::min(end, apart); ++n) {
    multiply_tile<Format, kTileRows, B>(matrix, n, apart, 0, x, b, write);
  }
  for (int64_t n = std::max(begin, apart); n < end; ++n) {
    multiply_tile<Format, 1, B>(matrix, n, apart, kTileRows - 1, x, b, write);
  }
}

// Tiles `begin` to `end` of the matrix times all B vectors: write(b, stripe, tile, y). The rows stay in a cache for all
// groups of vectors.
template <class Format, class Write>
inline void multiply(const Matrix<Format>& matrix, int64_t begin, int64_t end, const Inputs<Format>& x, int64_t B,
                     const Write& write) {
  constexpr int MOST = Format::kTileVectors;
  int64_t b = 0;
  for (; B - b >= MOST && B - b != MOST / 3 * 4; b += MOST)
    multiply_vectors<Format, MOST>(matrix, begin, end, x, b, write);
  if constexpr (MOST >= 4) {
    for (; B - b >= 4; b += 4) multiply_vectors<Format, 4>(matrix, begin, end, x, b, write);
  }
  for (; B - b >= 2; b += 2) multiply_vectors<Format, 2>(matrix, begin, end, x, b, write);
  if (b < B) multiply_vectors<Format, 1>(matrix, begin, end, x, b, write);
}

}  // namespace gpt_fast::decode
