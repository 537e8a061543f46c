// linear_cross_entropy on CPU: a buffer holds the logits of about kChunk rows, whatever the number of rows.
//
// With l = x W' + b, p = softmax(l) and smoothing s: loss = lse(l) - (1 - s) l[target] - s / V sum(l),
// dl = p - (1 - s) [v = target] - s / V, dW = dl' x, db = sum of dl, dx = dl W. A block of logits that leaves the
// product becomes exp(l - m), where m is the row's largest logit in the block. Once all blocks of a row are there, one
// factor for each block turns these exponentials into p. Weight gradients add up in float32 in the order of the rows.
// dx is summed over kGroups groups of blocks, which are added in their order. The number of groups does not depend on
// the threads.
#include <ATen/ops/scalar_tensor.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "cpu/core/common.h"
#include "cpu/core/gemm.h"
#include "cpu/core/vector_math.h"

namespace gpt_fast::linear_cross_entropy {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kChunk = 1024;  // most rows, but for whole panels: 200 MiB of logits for the vocabulary of GPT-2
constexpr int64_t kGroups = 16;   // groups of blocks of the vocabulary
// Packed elements along the vocabulary whose product with W is added to dx at once.
constexpr int64_t kWideDepth = kChain;
constexpr float kLowest = std::numeric_limits<float>::lowest();

Vec add(Vec a, Vec b) { return a + b; }

// Rows that count, which are those whose target is not ignore_index, and their targets.
struct CountedRows {
  std::vector<int64_t> index, target;
};

CountedRows counted_rows(const Tensor& target, int64_t V, int64_t ignore_index) {
  const Tensor targets = target.reshape(-1).contiguous();
  const int64_t* values = targets.const_data_ptr<int64_t>();
  CountedRows rows;
  for (int64_t i = 0; i < targets.numel(); ++i) {
    if (values[i] == ignore_index) continue;
    TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < V, "gpt_fast.linear_cross_entropy: target holds ", values[i],
                      "; expected values in [0, ", V, ") or ", ignore_index);
    rows.index.push_back(i);
    rows.target.push_back(values[i]);
  }
  return rows;
}

struct Problem {
  const Tensor& x;       // [N, C]
  const Tensor& weight;  // [V, C]
  const float* bias;     // padded to whole blocks by -inf
  const CountedRows& rows;
  float smoothing;
  const float* scale;  // factor of each row's gradient, by its index in x; null: 1
  float dx_scale;      // factor of dx alone, before dx is rounded
};

// Outputs. A tensor that is not needed is undefined. dx holds zeros in rows that do not count. dweight and dbias are
// float32 sums.
struct Results {
  float* loss = nullptr;  // by index in x
  Tensor dx, dweight;
  float* dbias = nullptr;
};

// Statistics of one row's logits in one block.
struct Statistics {
  float largest, sum;  // the largest logit, and the sum of exp(logit - largest)
  float logits;        // sum of the logits, for smoothing
};

// Memory that one chunk after another uses.
struct Workspace {
  Buffer exps;   // [blocks, rows, kBlock]
  Buffer parts;  // partial sums of dx: [groups, rows, C up to whole panels]
};

template <typename scalar_t>
class Chunk {
  // Type of the logits' gradient as an operand: bfloat16 if words pair it, else float32. In float16, the probabilities
  // of a large vocabulary would be subnormal numbers and lose bits.
  using operand_t = std::conditional_t<WordsOf<scalar_t>::kPair == 2, scalar_t, float>;

 public:
  Chunk(const Problem& problem, const Workspace& workspace, int64_t begin, int64_t end, bool keeps)
      : in_(problem),
        workspace_(workspace),
        begin_(begin),
        M(end - begin),
        C(problem.x.size(1)),
        V(problem.weight.size(0)),
        blocks(ceil_div(V, kBlock)),
        gathered_(at::empty({M, C}, problem.x.options())),
        statistics_(blocks * M),
        factors_(keeps ? blocks * M : 0),
        target_logit_(M) {
    for (int64_t i = 0; i < M && C > 0; ++i) {
      std::memcpy(gathered_.mutable_data_ptr<scalar_t>() + i * C,
                  in_.x.const_data_ptr<scalar_t>() + in_.rows.index[begin + i] * in_.x.stride(0), C * sizeof(scalar_t));
    }
  }

  // Computes the logits, block by block of the vocabulary. If `keeps`, their exponentials stay for `backward`.
  void forward(bool keeps, float* loss) {
    const PackedRows<scalar_t> x(rows_of<scalar_t>(gathered_), M, C);
    const Operand<scalar_t> weight = rows_of<scalar_t>(in_.weight);
    parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      const BlockProduct product;
      const Buffer own(keeps ? 0 : M * kBlock);
      for (int64_t block = first; block < last; ++block) {
        const int64_t v = block * kBlock, width = std::min(kBlock, V - v);
        float* logits = keeps ? exps(block, 0) : own.data();
        product(x, 0, M, weight.from(v, 0), width, C, logits);
        for (int64_t i = 0; i < M; ++i) exponentiate(block, i, logits + i * kBlock, width);
      }
    });
    parallel_for(0, M, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) finish_row(i, keeps, loss);
    });
  }

  void backward(const Results& out, bool accumulate) const {
    const bool needs_x = out.dx.defined(), needs_weight = out.dweight.defined();
    constexpr int64_t PAIR = WordsOf<scalar_t>::kPair;
    constexpr int64_t kWide = kWideDepth * PAIR / kBlock;  // kWideDepth in blocks
    const int64_t groups = std::min(kGroups, blocks), padded_C = round_up(C, kColumns);
    optional<PackedRows<scalar_t>> x_t;
    if (needs_weight) x_t.emplace(columns_of<scalar_t>(gathered_), C, M);
    const Buffer& parts = workspace_.parts;
    const Operand<scalar_t> weight = columns_of<scalar_t>(in_.weight);
    const int64_t wide_depth = kWideDepth, D = depth<scalar_t>(M);

    parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
      const RoundedBlock<operand_t> gradient(M);
      const Buffer by_rows(D * kBlock), sums(round_up(C, kVec) * kBlock);
      const Buffer left(needs_x ? round_up(M, kRows) * wide_depth : 0);
      const Buffer right(needs_x ? kColumns * wide_depth : 0);
      for (int64_t group = first; group < last; ++group) {
        const int64_t group_begin = group * blocks / groups, group_end = (group + 1) * blocks / groups;
        float* part = parts.data() + (needs_x ? group * M * padded_C : 0);
        for (int64_t wide = group_begin; wide < group_end; wide += kWide) {
          const int64_t wide_end = std::min(wide + kWide, group_end);
          for (int64_t block = wide; block < wide_end; ++block) {
            const int64_t v = block * kBlock, width = std::min(kBlock, V - v);
            // Short chains of sums round less than a long one.
            float bias_sums[kBlock] = {};
            for (int64_t first_row = 0; first_row < M; first_row += kBlock) {
              float chain[kBlock] = {};
              for (int64_t i = first_row; i < std::min(M, first_row + kBlock); ++i) {
                differentiate(block, i, width, gradient.row(i), chain);
              }
              add_to_column_sums(chain, bias_sums);
            }
            if (out.dbias != nullptr) {
              for (int64_t j = 0; j < width; ++j) out.dbias[v + j] += bias_sums[j];
            }
            if (needs_weight) {
              pack<kColumns>(Operand<operand_t>{gradient.row(0), 1, kBlock}, width, M, by_rows.data(), D * kColumns);
              multiply<WordsOf<scalar_t>>(C, ceil_div(width, kColumns), D, x_t->data(), x_t->stride, by_rows.data(),
                                          D * kColumns, sums.data(), kBlock, false);
              add_block(sums.data(), C, width, out.dweight.mutable_data_ptr<float>() + v * out.dweight.stride(0),
                        out.dweight.stride(1), out.dweight.stride(0), accumulate);
            }
            if (needs_x) {
              pack<kRows>(Operand<operand_t>{gradient.row(0), kBlock, 1}, M, width,
                          left.data() + (block - wide) * kBlock / PAIR * kRows, wide_depth * kRows);
            }
          }
          if (needs_x) {
            const int64_t v = wide * kBlock, count = std::min(wide_end * kBlock, V) - v;
            for (int64_t c = 0; c < C; c += kColumns) {
              pack<kColumns>(weight.from(c, v), std::min(kColumns, C - c), count, right.data(), 0);
              multiply<WordsOf<scalar_t>>(M, 1, depth<scalar_t>(count), left.data(), wide_depth * kRows, right.data(),
                                          0, part + c, padded_C, wide > group_begin);
            }
          }
        }
      }
    });

    if (!needs_x) return;
    parallel_for(0, M, 16, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float* total = parts.data() + i * padded_C;
        for (int64_t group = 1; group < groups; ++group) {
          at::vec::map2<float>(add, total, total, total + group * M * padded_C, C);
        }
        if (in_.dx_scale != 1.0f) {
          const Vec scale(in_.dx_scale);
          at::vec::map<float>([scale](Vec value) { return value * scale; }, total, total, C);
        }
        at::vec::convert(total, out.dx.mutable_data_ptr<scalar_t>() + in_.rows.index[begin_ + i] * C, C);
      }
    });
  }

 private:
  float* exps(int64_t block, int64_t i) const { return workspace_.exps.data() + (block * M + i) * kBlock; }
  int64_t target(int64_t i) const { return in_.rows.target[begin_ + i]; }

  void exponentiate(int64_t block, int64_t i, float* row, int64_t width) {
    const float* bias = in_.bias + block * kBlock;
    Vec largest(kLowest);  // finite, so that -inf - largest is not NaN
    for (int64_t j = 0; j < kBlock; j += kVec) {
      const Vec logit = Vec::loadu(row + j) + Vec::loadu(bias + j);
      logit.store(row + j);
      largest = at::vec::maximum(largest, logit);
    }
    Statistics& row_statistics = statistics_[block * M + i];
    if (in_.smoothing > 0) row_statistics.logits = at::vec::reduce_all<float>(add, row, width);
    if (const int64_t j = target(i) - block * kBlock; j >= 0 && j < kBlock) target_logit_[i] = row[j];
    const float m = at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, largest);
    Vec sum(0.0f);
    for (int64_t j = 0; j < kBlock; j += kVec) {
      const Vec value = exp(Vec::loadu(row + j) - Vec(m));
      value.store(row + j);
      sum = sum + value;
    }
    row_statistics.largest = m;
    row_statistics.sum = at::vec::vec_reduce_all<float>(add, sum);
  }

  void finish_row(int64_t i, bool keeps, float* loss) {
    float largest = kLowest;
    for (int64_t block = 0; block < blocks; ++block) {
      const float m = statistics_[block * M + i].largest;
      if (m > largest || std::isnan(m)) largest = m;
    }
    double sum = 0, logits = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      const Statistics& of_block = statistics_[block * M + i];
      sum += of_block.sum * std::exp(of_block.largest - largest);
      logits += of_block.logits;
    }
    const double lse = largest + std::log(sum);
    const int64_t row = in_.rows.index[begin_ + i];
    if (loss != nullptr) {
      double value = (1.0 - in_.smoothing) * (lse - target_logit_[i]);
      if (in_.smoothing > 0) value += in_.smoothing * (lse - logits / V);
      loss[row] = static_cast<float>(value);
    }
    if (!keeps) return;
    const float scale = in_.scale != nullptr ? in_.scale[row] : 1.0f;
    for (int64_t block = 0; block < blocks; ++block) {
      const float largest_of_block = statistics_[block * M + i].largest;
      factors_[block * M + i] = scale * static_cast<float>(std::exp(largest_of_block - largest) / sum);
    }
  }

  void differentiate(int64_t block, int64_t i, int64_t width, operand_t* out, float* bias_sums) const {
    const float* row = exps(block, i);
    const float scale = in_.scale != nullptr ? in_.scale[in_.rows.index[begin_ + i]] : 1.0f;
    const Vec factor(factors_[block * M + i]), smooth(scale * in_.smoothing / V);
    alignas(64) float values[kBlock];
    for (int64_t j = 0; j < kBlock; j += kVec) {
      at::vec::fmsub(Vec::loadu(row + j), factor, smooth).store(values + j);
    }
    if (const int64_t j = target(i) - block * kBlock; j >= 0 && j < kBlock) values[j] -= scale * (1.0f - in_.smoothing);
    for (int64_t j = width; j < kBlock; ++j) values[j] = 0.0f;
    add_to_column_sums(values, bias_sums);
    round_row(values, out, kBlock);
  }

  const Problem& in_;
  const Workspace& workspace_;
  const int64_t begin_;
  const int64_t M, C, V, blocks;
  const Tensor gathered_;  // x of the chunk's rows
  std::vector<Statistics> statistics_;
  std::vector<float> factors_, target_logit_;
};

void run(const Problem& problem, const Results& out) {
  const int64_t N = static_cast<int64_t>(problem.rows.index.size());
  const bool keeps = out.dx.defined() || out.dweight.defined() || out.dbias != nullptr;
  if (N == 0 && out.dweight.defined()) out.dweight.zero_();
  // Divide the rows evenly, because each chunk costs a pass over the weight and its gradient, however few its rows are.
  const int64_t chunk_rows = round_up(ceil_div(N, std::max<int64_t>(1, ceil_div(N, kChunk))), kRows);
  const int64_t rows = std::min(N, chunk_rows), blocks = ceil_div(problem.weight.size(0), kBlock);
  const Workspace workspace{
      Buffer(keeps ? blocks * rows * kBlock : 0),
      Buffer(out.dx.defined() ? std::min(kGroups, blocks) * rows * round_up(problem.x.size(1), kColumns) : 0)};
  GPT_FAST_DISPATCH(problem.x.scalar_type(), "gpt_fast::linear_cross_entropy", [&] {
    for (int64_t begin = 0; begin < N; begin += chunk_rows) {
      Chunk<scalar_t> chunk(problem, workspace, begin, std::min(N, begin + chunk_rows), keeps);
      chunk.forward(keeps, out.loss);
      if (keeps) chunk.backward(out, begin > 0);
    }
  });
}

Tensor gradient_like_x(const Tensor& x, int64_t rows, int64_t valid, bool needed) {
  if (!needed) return at::empty({0}, x.options());
  return valid < rows ? at::zeros(x.sizes(), x.options()) : at::empty(x.sizes(), x.options());
}

// Returns the factor of 1 / count that is no power of two. Autograd divides by the other factor, the largest power of
// two up to count, and that division is exact.
float mean_scale(int64_t count) {
  if (count < 2) return 1.0f;
  const float counted = static_cast<float>(count);
  return std::exp2(static_cast<float>(std::ilogb(counted))) / counted;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_forward(
    const Tensor& x, const Tensor& weight, const Tensor& target, const optional<Tensor>& bias, int64_t ignore_index,
    double label_smoothing, c10::string_view reduction, bool needs_x, bool needs_weight, bool needs_bias) {
  const int64_t V = weight.size(0), N = target.numel();
  const CountedRows valid = counted_rows(target, V, ignore_index);
  const int64_t count = static_cast<int64_t>(valid.index.size());
  const auto sums = x.options().dtype(at::kFloat);
  const bool reduces = reduction != "none";
  const Tensor losses = at::zeros({N}, sums);
  const Tensor dx = gradient_like_x(x, N, count, needs_x);
  const Tensor dweight = needs_weight ? at::empty_like(weight, sums) : at::empty({0}, sums);
  const Tensor dbias = at::zeros({needs_bias ? V : 0}, sums);
  const Tensor rows = as_rows(x);
  const Tensor shift = padded_parameter(bias, V, -std::numeric_limits<float>::infinity());

  Results out;
  out.loss = losses.mutable_data_ptr<float>();
  if (needs_x) out.dx = dx;
  if (needs_weight) out.dweight = dweight;
  if (needs_bias) out.dbias = dbias.mutable_data_ptr<float>();
  ask_for_huge_pages(dweight);
  const float dx_scale = reduction == "mean" ? mean_scale(count) : 1.0f;
  run({rows, weight, shift.const_data_ptr<float>(), valid, static_cast<float>(label_smoothing), nullptr, dx_scale},
      out);

  const Tensor counted = at::scalar_tensor(static_cast<double>(count), sums);
  if (!reduces) return {losses.view(target.sizes()), counted, dx, dweight, dbias};
  double total = 0;
  for (const int64_t row : valid.index) total += losses.const_data_ptr<float>()[row];
  if (reduction == "mean") total /= static_cast<double>(std::max<int64_t>(count, 1));
  return {at::scalar_tensor(total, sums), counted, dx, dweight, dbias};
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_backward(const Tensor& dloss, const Tensor& x,
                                                                 const Tensor& weight, const Tensor& target,
                                                                 const optional<Tensor>& bias, int64_t ignore_index,
                                                                 double label_smoothing, bool needs_x,
                                                                 bool needs_weight, bool needs_bias) {
  const int64_t V = weight.size(0), N = target.numel();
  const CountedRows valid = counted_rows(target, V, ignore_index);
  const auto sums = x.options().dtype(at::kFloat);
  const Tensor dx = gradient_like_x(x, N, static_cast<int64_t>(valid.index.size()), needs_x);
  const Tensor dweight = needs_weight ? at::empty_like(weight, sums) : at::empty({0}, sums);
  const Tensor dbias = at::zeros({needs_bias ? V : 0}, sums);
  const Tensor rows = as_rows(x);
  const Tensor shift = padded_parameter(bias, V, -std::numeric_limits<float>::infinity());
  const Tensor scale = dloss.reshape(-1).contiguous();

  Results out;
  if (needs_x) out.dx = dx;
  if (needs_weight) out.dweight = dweight;
  if (needs_bias) out.dbias = dbias.mutable_data_ptr<float>();
  run({rows, weight, shift.const_data_ptr<float>(), valid, static_cast<float>(label_smoothing),
       scale.const_data_ptr<float>(), 1.0f},
      out);
  return {dx, dweight.to(weight.scalar_type()), dbias.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("linear_cross_entropy_forward", linear_cross_entropy_forward);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward);
}

}  // namespace gpt_fast::linear_cross_entropy
