// Products of a weight matrix with few vectors: y[b][n] = sum over k of W[n, k] x[b][k], bound by reading the weights.
//
// Rows of weights lie one after another, padded with zeros to whole steps of their format, so that a thread reads
// memory from one end to the other. One sum is always made in the same order, whatever rows and vectors are taken
// together: results depend neither on the number of threads nor on the size of the batch.
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

// A thread reads its rows in four places at once: the memory delivers more to a few streams far apart than to one.
constexpr int64_t kStreams = 4;

// y[r][i] = sum over k from begin to end of w[r][k] x[i][k], the vectors a stride apart. A function of its own, not
// inlined: its sums then stay in registers.
template <class Format, int R, int B>
[[gnu::noinline]] void add_up(const typename Format::weight_t* const (&w)[R], const typename Format::input_t* x,
                              int64_t stride, int64_t begin, int64_t end, float (&y)[R][B]) {
  using weight_t = typename Format::weight_t;
  using Sum = typename Format::Sum;
  constexpr int64_t STEP = Format::kStep;
  const weight_t* row[R];
  Sum even[R][B], odd[R][B];  // of every other step, as one sum would wait for itself
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    row[r] = w[r];
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) even[r][i] = odd[r][i] = Format::zero();
  }
  int64_t k = begin;
  for (; k + 2 * STEP <= end; k += 2 * STEP) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const auto first = Format::load(row[r] + k), second = Format::load(row[r] + k + STEP);
#pragma GCC unroll 4
      for (int i = 0; i < B; ++i) {
        even[r][i] = Format::multiply(first, x + i * stride + k, even[r][i]);
        odd[r][i] = Format::multiply(second, x + i * stride + k + STEP, odd[r][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < B; ++i) {
      if (k < end) even[r][i] = Format::multiply(Format::load(row[r] + k), x + i * stride + k, even[r][i]);
      y[r][i] = sum_lanes(Format::finish(Format::add(even[r][i], odd[r][i])));
    }
  }
}

// Rows n, n + apart, ... (R of them) of the matrix times the B prepared vectors from b on: write(b, n, y).
template <class Format, int R, int B, class Write>
inline void multiply_tile(const Matrix<Format>& matrix, int64_t n, int64_t apart, const typename Format::input_t* x,
                          const float* x_scale, int64_t b, const Write& write) {
  const int64_t stride = matrix.stride;
  const typename Format::weight_t* w[R];
  for (int r = 0; r < R; ++r) w[r] = matrix.data + (n + r * apart) * stride;
  float y[R][B];
  add_up<Format, R, B>(w, x + b * stride, stride, 0, std::min(stride, Format::kChain), y);
  for (int64_t begin = Format::kChain; begin < stride; begin += Format::kChain) {
    float more[R][B];
    add_up<Format, R, B>(w, x + b * stride, stride, begin, std::min(stride, begin + Format::kChain), more);
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < B; ++i) y[r][i] += more[r][i];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < B; ++i) {
      const int64_t row = n + r * apart;
      // Said explicitly: left to the compiler, one tile might fuse this and another not.
      const float scale = matrix.scale != nullptr ? x_scale[b + i] * matrix.scale[row] : x_scale[b + i];
      write(b + i, row, std::fma(y[r][i], scale, matrix.bias != nullptr ? matrix.bias[row] : 0.0f));
    }
  }
}

// The same for all B vectors, in groups whose sums fill the registers.
template <class Format, int R, class Write>
inline void multiply_rows(const Matrix<Format>& matrix, int64_t n, int64_t apart, const typename Format::input_t* x,
                          const float* x_scale, int64_t B, const Write& write) {
  constexpr int TWO = std::min(R, 2), FOUR = kVec == 16 ? TWO : 1;
  int64_t b = 0;
  for (; b + 4 <= B; b += 4) {
    for (int r = 0; r < R; r += FOUR) {
      multiply_tile<Format, FOUR, 4>(matrix, n + r * apart, apart, x, x_scale, b, write);
    }
  }
  if (b + 2 <= B) {
    for (int r = 0; r < R; r += TWO) multiply_tile<Format, TWO, 2>(matrix, n + r * apart, apart, x, x_scale, b, write);
    b += 2;
  }
  if (b < B) multiply_tile<Format, R, 1>(matrix, n, apart, x, x_scale, b, write);
}

// Rows `begin` to `end` of the matrix times all B vectors.
template <class Format, class Write>
inline void multiply(const Matrix<Format>& matrix, int64_t begin, int64_t end, const typename Format::input_t* x,
                     const float* x_scale, int64_t B, const Write& write) {
  const int64_t apart = (end - begin) / kStreams;
  for (int64_t n = begin; n < begin + apart; ++n) {
    multiply_rows<Format, kStreams>(matrix, n, apart, x, x_scale, B, write);
  }
  for (int64_t n = begin + kStreams * apart; n < end; ++n) {
    multiply_rows<Format, 1>(matrix, n, 0, x, x_scale, B, write);
  }
}

}  // namespace gpt_fast::decode
