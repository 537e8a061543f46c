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

// A matrix as one of the two operands of a product: element (n, k) is data[n * stride_n + k * stride_k]. An operand of
// 16 bits may also be given as float32, as the weights are under autocast. `pack` then rounds its elements.
template <typename scalar_t>
struct Operand {
  Operand(const scalar_t* data, int64_t stride_n, int64_t stride_k)
      : data(data), stride_n(stride_n), stride_k(stride_k) {}

  static Operand of(const at::Tensor& x, int64_t n, int64_t k) {
    Operand operand(nullptr, x.stride(n), x.stride(k));
    if (!std::is_same_v<scalar_t, float> && x.scalar_type() == at::kFloat) {
      operand.unrounded = x.const_data_ptr<float>();
    } else {
      operand.data = x.const_data_ptr<scalar_t>();
    }
    return operand;
  }

  // Returns the operand without its first n rows and the first k elements of each row.
  Operand from(int64_t n, int64_t k) const {
    Operand rest = *this;
    const int64_t offset = n * stride_n + k * stride_k;
    if (unrounded != nullptr) {
      rest.unrounded += offset;
    } else {
      rest.data += offset;
    }
    return rest;
  }

  const scalar_t* data;
  const float* unrounded = nullptr;  // the matrix if it is float32 and scalar_t is not; `data` is then null
  int64_t stride_n, stride_k;
};

template <typename scalar_t>
inline Operand<scalar_t> rows_of(const at::Tensor& x) {
  return Operand<scalar_t>::of(x, 0, 1);
}

template <typename scalar_t>
inline Operand<scalar_t> columns_of(const at::Tensor& x) {
  return Operand<scalar_t>::of(x, 1, 0);
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

// Returns n elements of a row of an operand as floats, rounded to scalar_t: the row itself if it is float32 and
// scalar_t too, else the elements converted into `buffer`.
template <typename scalar_t, typename source_t>
inline const float* operand_row(const source_t* row, float* buffer, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, source_t>) {
    return load_row(row, buffer, n);
  } else {
    for (int64_t j = 0; j < n; j += kVec) {
      const int64_t count = std::min(kVec, n - j);
      scalar_t rounded[kVec];
      at::vec::convert(row + j, rounded, count);
      at::vec::convert(rounded, buffer + j, count);
    }
    return buffer;
  }
}

// Copies `count` elements of a row to `stage`, as kVec packed elements, with zeros after the last.
template <typename scalar_t, typename source_t>
inline void stage_row(const source_t* row, int64_t count, float* stage) {
  if constexpr (WordsOf<scalar_t>::kPair == 2) {
    if (count == 2 * kVec) {
      if constexpr (std::is_same_v<scalar_t, source_t>) {
        std::memcpy(stage, row, 2 * kVec * sizeof(scalar_t));
      } else {
        WordsOf<scalar_t>::round(Vec::loadu(row), Vec::loadu(row + kVec)).store(stage);
      }
      return;
    }
    std::memset(stage, 0, kVec * sizeof(float));
    if constexpr (std::is_same_v<scalar_t, source_t>) {
      std::memcpy(stage, row, count * sizeof(scalar_t));
    } else {
      scalar_t rounded[2 * kVec];
      at::vec::convert(row, rounded, count);
      std::memcpy(stage, rounded, count * sizeof(scalar_t));
    }
  } else {
    for (int64_t k = count; k < kVec; ++k) stage[k] = 0.0f;
    const float* values = operand_row<scalar_t>(row, stage, count);
    if (values != stage) std::memcpy(stage, values, count * sizeof(float));
  }
}

// Does the work of `pack` for elements that lie in memory as source_t.
template <int64_t WIDTH, typename scalar_t, typename source_t>
void pack_from(const source_t* data, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K, float* packed,
               int64_t panel_stride) {
  constexpr int64_t PAIR = WordsOf<scalar_t>::kPair;
  // True if the elements of a row are words as they lie in memory.
  constexpr bool ARE_WORDS = std::is_same_v<scalar_t, source_t> && (std::is_same_v<scalar_t, float> || PAIR == 2);
  const int64_t D = depth<scalar_t>(K), padded = round_up(N, WIDTH);
  if (stride_k == 1 && K > 1) {
    constexpr int64_t TILE = std::min(kVec, WIDTH);  // rows of a transposed tile, at most kVec
    alignas(64) float stage[kVec * kVec], tile[kVec * kVec];
    std::memset(stage, 0, sizeof stage);
    for (int64_t n = 0; n < padded; n += TILE) {
      for (int64_t d = 0; d < D; d += kVec) {
        const int64_t count = std::min(kVec * PAIR, K - d * PAIR), lanes = std::min(kVec, D - d);
        const source_t* source = data + n * stride_n + d * PAIR;
        float* out = packed + n / WIDTH * panel_stride + d * WIDTH + n % WIDTH;
        const float* words = stage;
        int64_t stride_words = kVec;
        if (ARE_WORDS && n + kVec <= N && count == kVec * PAIR && stride_n % PAIR == 0) {
          words = reinterpret_cast<const float*>(source);
          stride_words = stride_n / PAIR;
        } else {
          for (int64_t r = 0; r < TILE; ++r) {
            if (n + r < N) {
              stage_row<scalar_t>(source + r * stride_n, count, stage + r * kVec);
            } else {
              std::memset(stage + r * kVec, 0, kVec * sizeof(float));
            }
          }
        }
        if (WIDTH % kVec == 0 && lanes == kVec) {
          at::vec::transpose_mxn<float, kVec, kVec>(words, stride_words, out, WIDTH);
          continue;
        }
        at::vec::transpose_mxn<float, kVec, kVec>(words, stride_words, tile, kVec);
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
    for (; stride_n == 1 && whole + GROUP <= N; whole += GROUP) {
      for (int64_t d = 0; d < D; ++d) {
        const source_t* source = data + whole + d * stride_k;
        for (int64_t n = 0; n < GROUP; n += 64 / sizeof(source_t)) {
          __builtin_prefetch(source + std::min<int64_t>(8, D - 1 - d) * stride_k + n);
        }
        alignas(64) float stage[GROUP];
        const float* values = operand_row<scalar_t>(source, stage, GROUP);
        for (int64_t panel = 0; panel < 4; ++panel) {
          std::memcpy(packed + panel * panel_stride + d * WIDTH, values + panel * WIDTH, WIDTH * sizeof(float));
        }
      }
      packed += 4 * panel_stride;
    }
  }
  for (int64_t n = whole; n < padded; n += WIDTH, packed += panel_stride) {
    const int64_t count = std::min(WIDTH, N - n);
    const source_t* source = data + n * stride_n;
    const auto element = [&](int64_t lane, int64_t k) {
      return lane < count && k < K ? static_cast<scalar_t>(source[lane * stride_n + k * stride_k]) : scalar_t(0);
    };
    for (int64_t d = 0; d < D; ++d) {
      float* out = packed + d * WIDTH;
      if constexpr (PAIR == 2) {
        if (stride_n == 1 && n + round_up(WIDTH, kVec) <= N && 2 * d + 1 < K) {
          const source_t *even = source + 2 * d * stride_k, *odd = even + stride_k;
          for (int64_t lane = 0; lane < WIDTH; lane += kVec) {
            WordsOf<scalar_t>::join(even + lane, odd + lane).store(out + lane, std::min(kVec, WIDTH - lane));
          }
          continue;
        }
        uint32_t words[WIDTH];
        for (int64_t lane = 0; lane < WIDTH; ++lane) {
          const scalar_t pair[2] = {element(lane, 2 * d), element(lane, 2 * d + 1)};
          std::memcpy(words + lane, pair, sizeof pair);
        }
        std::memcpy(out, words, sizeof words);
      } else if (stride_n == 1 && count == WIDTH) {
        alignas(64) float stage[WIDTH];
        std::memcpy(out, operand_row<scalar_t>(source + d * stride_k, stage, WIDTH), WIDTH * sizeof(float));
      } else {
        for (int64_t lane = 0; lane < WIDTH; ++lane) out[lane] = static_cast<float>(element(lane, d));
      }
    }
  }
}

// Packs N rows of K elements into panels of WIDTH rows, `panel_stride` floats apart. Elements past N or K become zero.
template <int64_t WIDTH, typename scalar_t>
void pack(const Operand<scalar_t>& x, int64_t N, int64_t K, float* packed, int64_t panel_stride) {
  if constexpr (!std::is_same_v<scalar_t, float>) {
    if (x.unrounded != nullptr) {
      pack_from<WIDTH, scalar_t>(x.unrounded, x.stride_n, x.stride_k, N, K, packed, panel_stride);
      return;
    }
  }
  pack_from<WIDTH, scalar_t>(x.data, x.stride_n, x.stride_k, N, K, packed, panel_stride);
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
                   pack<kRows>(x.from(first, 0), last - first, K, data() + first / kRows * stride, stride);
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
      pack<kColumns>(b.from(0, d * PAIR), N, std::min(count * PAIR, K - d * PAIR), b_.data(), stride_b);
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
      if constexpr (std::is_same_v<scalar_t, float>) {
        if (i + kVec <= rows && j + kVec <= width) {
          float* to = out + i + j * stride_column;
          if (!accumulate) {
            at::vec::transpose_mxn<float, kVec, kVec>(block + i * kBlock + j, kBlock, to, stride_column);
            continue;
          }
          at::vec::transpose_mxn<float, kVec, kVec>(block + i * kBlock + j, kBlock, tile, kVec);
          for (int64_t lane = 0; lane < kVec; ++lane, to += stride_column) {
            (Vec::loadu(to) + Vec::loadu(tile + lane * kVec)).store(to);
          }
          continue;
        }
      }
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
