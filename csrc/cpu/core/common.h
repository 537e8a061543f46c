// Common parts of the CPU kernels: vectors, sizes, memory, dtypes, and rows of any dtype as float32.
//
// Validation has two levels. The public function in gpt_fast/ops checks shapes, dtypes and devices. The C++ entry (a
// function that TORCH_LIBRARY_IMPL registers) checks values that Python does not read under torch.compile: token ids,
// lengths, cu_seqlens, the seed. The C++ entry turns tensors into pointers only by Rows, Parameter, as_int64,
// make_dropout, GPT_FAST_DISPATCH and data_ptr<T>(). Each of these raises for a dtype that it does not read. Helpers
// that take pointers and sizes check nothing. gpt_fast._C.DecodeSession is not called through an operator and checks
// its own arguments.
#pragma once

// These headers replace ATen/ATen.h, which declares every operator and takes as long to compile as all of them.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <type_traits>

#include "cpu/core/team.h"
#include "philox.h"

namespace gpt_fast {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kVec = Vec::size();
constexpr int64_t kGrain = 32768;  // elements that are worth a thread: PyTorch's GRAIN_SIZE

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Asks for huge pages for memory that will be written whole. Call this before it is first written. Fresh memory costs
// fewer page faults then. One thread that reads the memory gains a third (16 to 22 GB/s), four threads gain little.
inline void ask_for_huge_pages(const at::Tensor& x) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t HUGE = 2 << 20;
  const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
  const uintptr_t begin = round_up(address, HUGE), end = (address + x.nbytes()) / HUGE * HUGE;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only advice: it may fail
#endif
}

// Uninitialised memory for floats, 64-byte aligned. It comes from at::empty, which the tests fill with NaN.
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(at::empty({size}, at::TensorOptions().dtype(at::kFloat))), data_(memory_.mutable_data_ptr<float>()) {
    ask_for_huge_pages(memory_);
  }
  float* data() const { return data_; }
  operator float*() const { return data_; }

 private:
  at::Tensor memory_;
  float* data_;
};

// Keeps a loaded vector in a register. GCC 12 would load it again for each product that uses it, and the two loads that
// a CPU does in a cycle would then limit a tile of products (57 of 100 GFLOP/s on Zen 3).
inline Vec in_register(Vec x) {
#if defined(CPU_CAPABILITY_AVX2)
  __m256 values = x;
  asm("" : "+x"(values));
  return values;
#else
  return x;
#endif
}

// Returns a row as float32: the row itself if it is float32, else its n elements converted into `buffer`.
template <typename scalar_t>
inline const float* load_row(const scalar_t* row, float* buffer, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return row;
  } else {
    at::vec::convert(row, buffer, n);
    return buffer;
  }
}

// Returns where to write a float32 result before it is rounded: the destination if that is float32, else `buffer`.
template <typename scalar_t>
inline float* result_row(scalar_t* row, float* buffer) {
  if constexpr (std::is_same_v<scalar_t, float>) {
    return row;
  } else {
    return buffer;
  }
}

// Rounds the result in `buffer` into its destination. A float32 result is there already, because of result_row.
template <typename scalar_t>
inline void store_row(scalar_t* row, const float* buffer, int64_t n) {
  if constexpr (!std::is_same_v<scalar_t, float>) {
    at::vec::convert(buffer, row, n);
  }
}

// Returns a tensor [..., N] as [M, N] with neighbouring columns side by side, as a view if the strides allow it. N may
// be 0.
inline at::Tensor as_rows(const at::Tensor& x) {
  int64_t M = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) M *= x.size(dim);
  const at::Tensor rows = x.reshape({M, x.size(-1)});
  return rows.size(1) <= 1 || rows.stride(1) == 1 ? rows : rows.contiguous();
}

// Returns a dtype that kernels read: float32, bfloat16 or float16; raises ValueError for any other.
inline at::ScalarType readable(at::ScalarType dtype) {
  TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
                    "gpt_fast: a floating argument has dtype ", dtype, "; expected float32, bfloat16 or float16");
  return dtype;
}

// Returns integers as contiguous int64; raises ValueError for any dtype but int64 and int32.
inline at::Tensor as_int64(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kLong || x.scalar_type() == at::kInt, "gpt_fast.", op, ": ", name,
                    " has dtype ", x.scalar_type(), "; expected int64 or int32");
  return x.to(at::kLong).contiguous();
}

// Rows of a tensor of any dtype, read and written as float32.
class Rows {
 public:
  explicit Rows(const at::Tensor& x)
      : dtype_(readable(x.scalar_type())),
        rows_(as_rows(x)),
        data_(static_cast<char*>(rows_.data_ptr())),
        stride_(rows_.stride(0) * rows_.element_size()) {}

  int64_t M() const { return rows_.size(0); }
  int64_t N() const { return rows_.size(1); }

  // Returns row i as float32: the row itself if it is float32, else converted into `buffer`.
  const float* read(int64_t i, float* buffer) const {
    const char* row = data_ + i * stride_;
    switch (dtype_) {
      case at::kFloat:
        return reinterpret_cast<const float*>(row);
      case at::kBFloat16:
        return load_row(reinterpret_cast<const at::BFloat16*>(row), buffer, N());
      default:
        return load_row(reinterpret_cast<const at::Half*>(row), buffer, N());
    }
  }

  // Returns the place of row i before `write` rounds it: the row itself if it is float32, else `buffer`.
  float* target(int64_t i, float* buffer) const {
    return dtype_ == at::kFloat ? reinterpret_cast<float*>(data_ + i * stride_) : buffer;
  }

  void write(int64_t i, const float* target) const {
    char* row = data_ + i * stride_;
    if (dtype_ == at::kBFloat16) store_row(reinterpret_cast<at::BFloat16*>(row), target, N());
    if (dtype_ == at::kHalf) store_row(reinterpret_cast<at::Half*>(row), target, N());
  }

 private:
  at::ScalarType dtype_;  // declared first, so that readable() checks it before anything is read
  at::Tensor rows_;
  char* data_;
  int64_t stride_;  // bytes
};

// Returns the number of rows for one task of parallel_for: enough work to be worth a thread.
inline int64_t row_grain(int64_t N) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(N, 1)); }

// Returns the dropout of a site, or nothing if p is 0.
inline std::optional<Dropout> make_dropout(const char* op, double p, const std::optional<at::Tensor>& seed,
                                           int64_t site) {
  if (p == 0.0) return std::nullopt;
  TORCH_CHECK_VALUE(seed.has_value(), "gpt_fast.", op, ": dropout_p is ", p, " and seed is None; expected a seed");
  TORCH_CHECK_VALUE(seed->scalar_type() == at::kLong && seed->numel() == 1, "gpt_fast.", op, ": seed has dtype ",
                    seed->scalar_type(), " and ", seed->numel(), " elements; expected one int64 element");
  return Dropout(p, seed->item<int64_t>(), site);
}

// Calls body(j, count) for each vector of `count` columns from j on. The last vector may be shorter than kVec.
template <typename Body>
inline void for_each_vector(int64_t N, const Body& body) {
  int64_t j = 0;
  for (; j + kVec <= N; j += kVec) body(j, kVec);
  if (j < N) body(j, N - j);
}

// Gradients of weights are summed over row blocks, whose number depends on the work alone and never on the number of
// threads. Each block has a partial sum, and these are added in the order of the blocks. This gives the same bits at
// any number of threads.
constexpr int64_t kRowBlocks = 32;

inline int64_t row_blocks(int64_t M) { return std::min(M, kRowBlocks); }
inline int64_t row_block_begin(int64_t block, int64_t blocks, int64_t M) { return block * M / blocks; }

}  // namespace gpt_fast

// Runs the lambda with scalar_t as float, bfloat16 or float16. float64 never gets here, because the reference computes
// it.
#define GPT_FAST_DISPATCH(TYPE, NAME, ...)                                                                  \
  AT_DISPATCH_SWITCH(TYPE, NAME,                                                                            \
                     AT_DISPATCH_CASE(at::kFloat, __VA_ARGS__) AT_DISPATCH_CASE(at::kBFloat16, __VA_ARGS__) \
                         AT_DISPATCH_CASE(at::kHalf, __VA_ARGS__))
