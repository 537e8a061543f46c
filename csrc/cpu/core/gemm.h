// Matrix products on packed operands, for kernels that fuse their element-wise work between products.
//
// C[i, j] (+)= sum over k of A[i, k] B[j, k]. A is packed in panels of kRows rows, B in panels of kColumns columns. A
// panel holds one k after another, and for each k its rows (columns) side by side. A micro-kernel keeps kRows x
// kColumns sums in registers for kChain packed elements along k, then adds them to C: short chains round less than long
// ones. Every element of C is summed in the same order however the work is divided, so results do not depend on the
// number of threads. No ATen product is called, so autocast cannot interfere.
//
// A packed element is a word (words.h): a float, or two bfloat16 neighbours along k if the CPU multiplies them.
#pragma once

#include <ATen/ops/full.h>

#include <cstring>

#include "cpu/core/words.h"

namespace gpt_fast {

constexpr int64_t kRows = kVec == 16 ? 14 : 6;  // rows of a panel of A; the registers hold two vectors of sums a row
constexpr int64_t kColumns = 2 * kVec;          // columns of a panel of B
constexpr int64_t kBlock = 64;                  // columns that a task computes at a time: whole panels
constexpr int64_t kDepthBlock = 768;            // packed elements along k for which a block of B stays in the L2 cache
constexpr int64_t kChain = 256;                 // packed elements along k that one register sums up
static_assert(kBlock % kColumns == 0 && kDepthBlock % kChain == 0);

// Returns the number of packed elements that hold K elements along k.
template <typename scalar_t>
inline int64_t depth(int64_t K) {
  return ceil_div(K, WordsOf<scalar_t>::kPair);
}

// A matrix as one of the two operands of a product: element (n, k) is data[n * stride_n + k * stride_k].
template <typename scalar_t>
struct Operand {
  const scalar_t* data;
  int64_t stride_n, stride_k;
};

template <typename scalar_t>
inline Operand<scalar_t> rows_of(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};
}

template <typename scalar_t>
inline Operand<scalar_t> columns_of(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(1), x.stride(0)};
}

// Converts N values to float32. The compiler turns copies of a known size into a few instructions.
template <int64_t N, typename scalar_t>
inline void widen(const scalar_t* values, float* out) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    std::memcpy(out, values, N * sizeof(float));
  } else {
    at::vec::convert(values, out, N);
  }
}

// Rounds n values to scalar_t, or copies them if it is float32. The copy is a loop of vectors, because a library call
// costs more than rows this short.
template <typename scalar_t>
inline void round_row(const float* values, scalar_t* out, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    if (values == out) return;
    int64_t j = 0;
    for (; j + kVec <= n; j += kVec) Vec::loadu(values + j).store(out + j);
    for (; j < n; ++j) out[j] = values[j];
  } else {
    at::vec::convert(values, out, n);
  }
}

// Copies `count` elements of a row to `stage`, as kVec packed elements, with zeros after the last.
template <typename scalar_t>
inline void stage_row(const scalar_t* row, int64_t count, float* stage) {
  if constexpr (WordsOf<scalar_t>::kPair == 2) {
    if (count == 2 * kVec) {
      std::memcpy(stage, row, 2 * kVec * sizeof(scalar_t));
      return;
    }
    std::memset(stage, 0, kVec * sizeof(float));
    std::memcpy(stage, row, count * sizeof(scalar_t));
  } else {
    for (int64_t k = count; k < kVec; ++k) stage[k] = 0.0f;
    at::vec::convert(row, stage, count);
  }
}

// Packs N rows of K elements into panels of WIDTH rows, `panel_stride` floats apart. Elements past N or K become zero.
template <int64_t WIDTH, typename scalar_t>
void pack(const Operand<scalar_t>& x, int64_t N, int64_t K, float* packed, int64_t panel_stride) {
  constexpr int64_t PAIR = WordsOf<scalar_t>::kPair;
  const int64_t D = depth<scalar_t>(K), padded = round_up(N, WIDTH);
  if (x.stride_k == 1 && K > 1) {
    constexpr int64_t TILE = std::min(kVec, WIDTH);  // rows of a transposed tile, at most kVec
    alignas(64) float stage[kVec * kVec], tile[kVec * kVec];
    std::memset(stage, 0, sizeof stage);
    for (int64_t n = 0; n < padded; n += TILE) {
      for (int64_t d = 0; d < D; d += kVec) {
        const int64_t count = std::min(kVec * PAIR, K - d * PAIR), lanes = std::min(kVec, D - d);
        const scalar_t* source = x.data + n * x.stride_n + d * PAIR;
        bool direct = false;
        if constexpr (std::is_same_v<scalar_t, float>) direct = n + kVec <= N && count == kVec;
        if (direct) {
          if constexpr (std::is_same_v<scalar_t, float>) {
            at::vec::transpose_mxn<float, kVec, kVec>(source, x.stride_n, tile, kVec);
          }
        } else {
          for (int64_t r = 0; r < TILE; ++r) {
            if (n + r < N) {
              stage_row(source + r * x.stride_n, count, stage + r * kVec);
            } else {
              std::memset(stage + r * kVec, 0, kVec * sizeof(float));
            }
          }
          at::vec::transpose_mxn<float, kVec, kVec>(stage, kVec, tile, kVec);
        }
        float* out = packed + n / WIDTH * panel_stride + d * WIDTH + n % WIDTH;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          std::memcpy(out + lane * WIDTH, tile + lane * kVec, TILE * sizeof(float));
        }
      }
    }
    return;
  }
  int64_t whole = 0;
  if constexpr (PAIR == 1) {
    // If the rows of a panel lie side by side, several panels are packed at a time. Each cache line is then read once,
    // however far apart the k are. Lines of later k are prefetched, because the processor does not foresee such
    // strides.
    constexpr int64_t GROUP = 4 * WIDTH;
    for (; x.stride_n == 1 && whole + GROUP <= N; whole += GROUP) {
      for (int64_t d = 0; d < D; ++d) {
        const scalar_t* source = x.data + whole + d * x.stride_k;
        for (int64_t n = 0; n < GROUP; n += 64 / sizeof(scalar_t)) {
          __builtin_prefetch(source + std::min<int64_t>(8, D - 1 - d) * x.stride_k + n);
        }
        alignas(64) float stage[GROUP];
        const float* values = load_row(source, stage, GROUP);
        for (int64_t panel = 0; panel < 4; ++panel) {
          std::memcpy(packed + panel * panel_stride + d * WIDTH, values + panel * WIDTH, WIDTH * sizeof(float));
        }
      }
      packed += 4 * panel_stride;
    }
  }
  for (int64_t n = whole; n < padded; n += WIDTH, packed += panel_stride) {
    const int64_t count = std::min(WIDTH, N - n);
    const scalar_t* source = x.data + n * x.stride_n;
    const auto element = [&](int64_t lane, int64_t k) {
      return lane < count && k < K ? source[lane * x.stride_n + k * x.stride_k] : scalar_t(0);
    };
    for (int64_t d = 0; d < D; ++d) {
      float* out = packed + d * WIDTH;
      const bool direct = x.stride_n == 1 && count == WIDTH && (d + 1) * PAIR <= K;
      if constexpr (PAIR == 2) {
        uint32_t words[WIDTH];
        if (direct) {
          uint16_t low[WIDTH], high[WIDTH];
          std::memcpy(low, source + 2 * d * x.stride_k, sizeof low);
          std::memcpy(high, source + (2 * d + 1) * x.stride_k, sizeof high);
          for (int64_t lane = 0; lane < WIDTH; ++lane)
            words[lane] = low[lane] | static_cast<uint32_t>(high[lane]) << 16;
        } else {
          for (int64_t lane = 0; lane < WIDTH; ++lane) {
            const scalar_t pair[2] = {element(lane, 2 * d), element(lane, 2 * d + 1)};
            std::memcpy(words + lane, pair, sizeof pair);
          }
        }
        std::memcpy(out, words, sizeof words);
      } else if (direct) {
        widen<WIDTH>(source + d * x.stride_k, out);
      } else {
        for (int64_t lane = 0; lane < WIDTH; ++lane) out[lane] = static_cast<float>(element(lane, d));
      }
    }
  }
}

// The whole of A in packed form. All threads pack it together.
template <typename scalar_t>
class PackedRows {
 public:
  PackedRows(int64_t N, int64_t K)
      : rows(N), stride(depth<scalar_t>(K) * kRows), memory_(round_up(N, kRows) / kRows * stride) {}

  PackedRows(const Operand<scalar_t>& x, int64_t N, int64_t K) : PackedRows(N, K) {
    // Each task packs whole panels, and enough of them to be worth a thread.
    const int64_t step = 4 * kRows;
    parallel_for(0, ceil_div(N, step), std::max<int64_t>(1, kGrain / (step * std::max<int64_t>(1, K))),
                 [&](int64_t begin, int64_t end) {
                   const int64_t first = begin * step, last = std::min(N, end * step);
                   pack<kRows>(Operand<scalar_t>{x.data + first * x.stride_n, x.stride_n, x.stride_k}, last - first, K,
                               data() + first / kRows * stride, stride);
                 });
  }

  float* data() const { return memory_.data(); }

  const int64_t rows;
  const int64_t stride;  // floats from one panel to the next

 private:
  Buffer memory_;
};

// c [ROWS, kColumns] (+)= a b over D packed elements. Prefetches `next`.
template <class Words, int64_t ROWS>
inline void micro_kernel(int64_t D, const float* a, const float* b, float* c, int64_t stride_c, bool accumulate,
                         const float* next) {
  Vec sums[ROWS][2];
#pragma GCC unroll 16
  for (int64_t i = 0; i < ROWS; ++i) sums[i][0] = sums[i][1] = Vec(0.0f);
  for (int64_t d = 0; d < D; ++d, a += kRows, b += kColumns, next += kRows) {
    const Vec b0 = Vec::loadu(b), b1 = Vec::loadu(b + kVec);
    __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 16
    for (int64_t i = 0; i < ROWS; ++i) {
      const Vec ai(a[i]);
      sums[i][0] = Words::multiply_add(ai, b0, sums[i][0]);
      sums[i][1] = Words::multiply_add(ai, b1, sums[i][1]);
    }
  }
  if (accumulate) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < ROWS; ++i) {
      sums[i][0] = sums[i][0] + Vec::loadu(c + i * stride_c);
      sums[i][1] = sums[i][1] + Vec::loadu(c + i * stride_c + kVec);
    }
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < ROWS; ++i) {
    sums[i][0].store(c + i * stride_c);
    sums[i][1].store(c + i * stride_c + kVec);
  }
}

template <class Words, int64_t ROWS = kRows>
inline void micro_kernel_rows(int64_t rows, int64_t D, const float* a, const float* b, float* c, int64_t stride_c,
                              bool accumulate, const float* next) {
  if (rows >= ROWS) {
    micro_kernel<Words, ROWS>(D, a, b, c, stride_c, accumulate, next);
  } else if constexpr (ROWS > 1) {
    micro_kernel_rows<Words, ROWS - 1>(rows, D, a, b, c, stride_c, accumulate, next);
  }
}

// C [M, panels * kColumns] (+)= A B over D packed elements.
template <class Words>
void multiply(int64_t M, int64_t panels, int64_t D, const float* a, int64_t stride_a, const float* b, int64_t stride_b,
              float* c, int64_t stride_c, bool accumulate) {
  for (int64_t d = 0; d < D; d += kChain) {
    const int64_t count = std::min(kChain, D - d);
    for (int64_t i = 0; i < M; i += kRows) {
      // The next panel of A is prefetched: it is further away than the processor's own prefetching reaches.
      const float* a_panel = a + i / kRows * stride_a + d * kRows;
      for (int64_t panel = 0; panel < panels; ++panel) {
        micro_kernel_rows<Words>(M - i, count, a_panel, b + panel * stride_b + d * kColumns,
                                 c + i * stride_c + panel * kColumns, stride_c, accumulate || d > 0,
                                 panel == 0 ? a_panel + stride_a : a_panel);
      }
    }
  }
}

// Product that one thread computes for a block of at most kBlock columns. It holds memory for a packed piece of B.
class BlockProduct {
 public:
  BlockProduct() : b_(kBlock * kDepthBlock) {}

  // c [rows `first` to `last` of a, kBlock] = A B for N <= kBlock columns of B. Columns past N become zero.
  template <typename scalar_t>
  void operator()(const PackedRows<scalar_t>& a, int64_t first, int64_t last, const Operand<scalar_t>& b, int64_t N,
                  int64_t K, float* c) const {
    constexpr int64_t PAIR = WordsOf<scalar_t>::kPair;
    const int64_t panels = ceil_div(N, kColumns), D = depth<scalar_t>(K);
    for (int64_t d = 0; d < D; d += kDepthBlock) {
      const int64_t count = std::min(kDepthBlock, D - d), stride_b = count * kColumns;
      pack<kColumns>(Operand<scalar_t>{b.data + d * PAIR * b.stride_k, b.stride_n, b.stride_k}, N,
                     std::min(count * PAIR, K - d * PAIR), b_.data(), stride_b);
      multiply<WordsOf<scalar_t>>(last - first, panels, count, a.data() + first / kRows * a.stride + d * kRows,
                                  a.stride, b_.data(), stride_b, c, kBlock, d > 0);
    }
    if (K == 0) std::fill(c, c + (last - first) * kBlock, 0.0f);
    if (panels * kColumns < kBlock) {
      for (int64_t i = 0; i < last - first; ++i) {
        std::fill(c + i * kBlock + panels * kColumns, c + (i + 1) * kBlock, 0.0f);
      }
    }
  }

 private:
  Buffer b_;
};

// out (+)= block. Element (i, j) of the block, which has kBlock columns a row, goes to out[i * stride_row + j *
// stride_column]. The memory of the block must hold rows up to the next multiple of kVec, because whole tiles are
// transposed.
template <typename scalar_t>
void add_block(const float* block, int64_t rows, int64_t width, scalar_t* out, int64_t stride_row,
               int64_t stride_column, bool accumulate) {
  const auto put = [accumulate](const float* values, scalar_t* to, int64_t n, int64_t stride) {
    if (stride != 1) {
      for (int64_t i = 0; i < n; ++i) {
        to[i * stride] = static_cast<scalar_t>(accumulate ? static_cast<float>(to[i * stride]) + values[i] : values[i]);
      }
      return;
    }
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (accumulate) {
        at::vec::map2<float>([](Vec a, Vec b) { return a + b; }, to, to, values, n);
        return;
      }
    }
    round_row(values, to, n);
  };
  if (stride_row != 1 || stride_column == 1) {
    for (int64_t i = 0; i < rows; ++i) put(block + i * kBlock, out + i * stride_row, width, stride_column);
    return;
  }
  alignas(64) float tile[kVec * kVec];
  for (int64_t i = 0; i < rows; i += kVec) {
    for (int64_t j = 0; j < width; j += kVec) {
      at::vec::transpose_mxn<float, kVec, kVec>(block + i * kBlock + j, kBlock, tile, kVec);
      for (int64_t lane = 0; lane < std::min(kVec, width - j); ++lane) {
        put(tile + lane * kVec, out + i + (j + lane) * stride_column, std::min(kVec, rows - i), 1);
      }
    }
  }
}

// sums[j] += row[j] for kBlock columns.
inline void add_to_column_sums(const float* row, float* sums) {
  for (int64_t j = 0; j < kBlock; j += kVec) (Vec::loadu(sums + j) + Vec::loadu(row + j)).store(sums + j);
}

// Rows of kBlock columns, rounded to the model's dtype.
template <typename scalar_t>
class RoundedBlock {
 public:
  explicit RoundedBlock(int64_t rows) : memory_(rows * kBlock) {}
  scalar_t* row(int64_t i) const { return reinterpret_cast<scalar_t*>(memory_.data()) + i * kBlock; }

 private:
  Buffer memory_;
};

// Returns a bias [n] as float32, with `fill` after it up to a whole block. Without a bias its n elements are zeros.
inline at::Tensor padded_parameter(const std::optional<at::Tensor>& parameter, int64_t n, float fill = 0.0f) {
  at::Tensor padded = at::full({round_up(n, kBlock)}, fill, at::TensorOptions().dtype(at::kFloat));
  if (parameter.has_value()) {
    readable(parameter->scalar_type());
    padded.narrow(0, 0, n).copy_(*parameter);
  } else {
    padded.narrow(0, 0, n).zero_();
  }
  return padded;
}

// Returns the number of pieces into which M rows are divided, so that `column_blocks` blocks keep all threads busy.
// Each piece packs B again, so there are no more pieces than that takes. Without rows there is one piece, because
// callers divide by the result.
inline int64_t row_pieces(int64_t M, int64_t column_blocks) {
  const int64_t wanted = ceil_div(2 * at::get_num_threads(), std::max<int64_t>(column_blocks, 1));
  return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(ceil_div(M, kBlock), 1));
}

}  // namespace gpt_fast
