// The arithmetic of one normalised row, for layer_norm and add_layer_norm.
//
// Forward: y = (x - mean) * rstd * weight + bias. Backward, with xhat = (x - mean) * rstd and g = dy * weight:
// dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd, dweight = sum of dy * xhat, dbias = sum of dy over the rows.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <tuple>

#include "cpu/core/vector_math.h"

namespace gpt_fast {

// A weight or bias as contiguous float32; data() is null if there is none.
class Parameter {
 public:
  explicit Parameter(const std::optional<at::Tensor>& parameter) {
    if (!parameter.has_value()) return;
    readable(parameter->scalar_type());
    values_ = parameter->to(at::kFloat).contiguous();
  }
  const float* data() const { return values_.defined() ? values_.const_data_ptr<float>() : nullptr; }

 private:
  at::Tensor values_;
};

struct Statistics {
  float mean, rstd;
};

// Returns the sum of each term(x[j]) over j. Each sum has four chains, because one chain alone would wait for each
// addition.
template <typename... Terms>
inline std::array<float, sizeof...(Terms)> sums_of(const float* x, int64_t N, const Terms&... terms) {
  constexpr size_t kTerms = sizeof...(Terms);
  std::array<Vec, 4 * kTerms> sums;
  sums.fill(Vec(0.0f));
  const auto add = [&](Vec value, size_t chain, int64_t count) {
    size_t term = 0;
    const auto add_one = [&](Vec summand) {
      Vec& sum = sums[chain * kTerms + term++];
      sum = sum + (count < kVec ? Vec::set(Vec(0.0f), summand, count) : summand);
    };
    (add_one(terms(value)), ...);
  };
  int64_t j = 0;
  for (; j + 4 * kVec <= N; j += 4 * kVec) {
    for (size_t chain = 0; chain < 4; ++chain) add(Vec::loadu(x + j + chain * kVec), chain, kVec);
  }
  for (; j + kVec <= N; j += kVec) add(Vec::loadu(x + j), 0, kVec);
  if (j < N) add(Vec::loadu(x + j, N - j), 1, N - j);
  std::array<float, kTerms> totals;
  for (size_t term = 0; term < kTerms; ++term) {
    const auto chain = [&](size_t index) { return sums[index * kTerms + term]; };
    totals[term] = sum_lanes((chain(0) + chain(1)) + (chain(2) + chain(3)));
  }
  return totals;
}

// Returns mean and rstd in two passes. The second pass takes the mean of x minus the first mean, and adds it to the
// first mean. The mean of a constant row is then exactly the constant.
inline Statistics row_statistics(const float* x, int64_t N, double eps) {
  const float rough = sums_of(x, N, [](Vec a) { return a; })[0] / N;
  const Vec centre(rough);
  const auto [rest, squares] =
      sums_of(x, N, [centre](Vec a) { return a - centre; }, [centre](Vec a) { return (a - centre) * (a - centre); });
  const float shift = rest / N;
  const float variance = std::max(squares / N - shift * shift, 0.0f);
  return {rough + shift, 1.0f / std::sqrt(variance + static_cast<float>(eps))};
}

inline void normalise_row(const float* x, Statistics statistics, const float* weight, const float* bias, int64_t N,
                          float* y) {
  const Vec mean(statistics.mean), rstd(statistics.rstd);
  for_each_vector(N, [&](int64_t j, int64_t count) {
    Vec value = (Vec::loadu(x + j, count) - mean) * rstd;
    if (weight != nullptr) value = value * Vec::loadu(weight + j, count);
    if (bias != nullptr) value = value + Vec::loadu(bias + j, count);
    value.store(y + j, count);
  });
}

// Writes dx, and adds the row's share to dweight and dbias if they are not null.
inline void differentiate_row(const float* dy, const float* x, Statistics statistics, const float* weight, int64_t N,
                              float* dx, float* dweight, float* dbias) {
  const Vec mean(statistics.mean), rstd(statistics.rstd);
  const auto normalised = [&](int64_t j, int64_t count) { return (Vec::loadu(x + j, count) - mean) * rstd; };
  const auto weighted = [&](Vec upstream, int64_t j, int64_t count) {
    return weight != nullptr ? upstream * Vec::loadu(weight + j, count) : upstream;
  };
  // Each sum has two chains, because one chain alone would wait for each multiply-add.
  Vec sum_g[2] = {Vec(0.0f), Vec(0.0f)}, sum_gx[2] = {Vec(0.0f), Vec(0.0f)};
  const auto add_columns = [&](int64_t j, int64_t count, int chain) {
    // Lanes past `count` load as zeros, so their dy adds nothing to any sum.
    const Vec upstream = Vec::loadu(dy + j, count), xhat = normalised(j, count), g = weighted(upstream, j, count);
    sum_g[chain] = sum_g[chain] + g;
    sum_gx[chain] = at::vec::fmadd(g, xhat, sum_gx[chain]);
    if (dweight != nullptr) at::vec::fmadd(upstream, xhat, Vec::loadu(dweight + j, count)).store(dweight + j, count);
    if (dbias != nullptr) (Vec::loadu(dbias + j, count) + upstream).store(dbias + j, count);
  };
  int64_t j = 0;
  for (; j + 2 * kVec <= N; j += 2 * kVec) {
    add_columns(j, kVec, 0);
    add_columns(j + kVec, kVec, 1);
  }
  for (; j < N; j += kVec) add_columns(j, std::min<int64_t>(kVec, N - j), 0);
  const Vec mean_g(sum_lanes(sum_g[0] + sum_g[1]) / N);
  const Vec mean_gx(sum_lanes(sum_gx[0] + sum_gx[1]) / N);
  for_each_vector(N, [&](int64_t j, int64_t count) {
    const Vec g = weighted(Vec::loadu(dy + j, count), j, count);
    ((g - mean_g - normalised(j, count) * mean_gx) * rstd).store(dx + j, count);
  });
}

// Returns float32 tensors for the mean and rstd of each row of x, of shape x.shape[:-1].
inline std::tuple<at::Tensor, at::Tensor> empty_statistics(const at::Tensor& x) {
  const at::Tensor mean = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  return {mean, at::empty_like(mean)};
}

// The gradients of weight and bias: partial sums of row blocks, which are added in the order of the blocks.
class ParameterGradients {
 public:
  ParameterGradients(int64_t M, int64_t N, at::TensorOptions options, bool needs_weight, bool needs_bias)
      : blocks_(row_blocks(M)), M_(M), N_(N), options_(options) {
    if (needs_weight) dweight_ = at::empty({blocks_, N}, options.dtype(at::kFloat));
    if (needs_bias) dbias_ = at::empty({blocks_, N}, options.dtype(at::kFloat));
  }

  // Calls body(begin, end, dweight, dbias) for each block of rows. The block's sums are added into dweight and dbias,
  // which hold zeros or are null.
  template <typename Body>
  void for_each_block(const Body& body) const {
    parallel_for(0, blocks_, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        body(row_block_begin(block, blocks_, M_), row_block_begin(block + 1, blocks_, M_), zeros(dweight_, block),
             zeros(dbias_, block));
      }
    });
  }

  at::Tensor dweight() const { return total(dweight_); }
  at::Tensor dbias() const { return total(dbias_); }

 private:
  float* zeros(const at::Tensor& partial, int64_t block) const {
    if (!partial.defined()) return nullptr;
    float* sums = partial.mutable_data_ptr<float>() + block * N_;
    std::fill_n(sums, N_, 0.0f);
    return sums;
  }

  at::Tensor total(const at::Tensor& partial) const {
    if (!partial.defined()) return at::empty({0}, options_);
    const at::Tensor sums = at::empty({N_}, options_.dtype(at::kFloat));
    const float* partial_data = partial.const_data_ptr<float>();
    float* sums_data = sums.mutable_data_ptr<float>();
    parallel_for(0, N_, kColumnGrain, [&](int64_t begin, int64_t end) {
      for_each_vector(end - begin, [&](int64_t j, int64_t count) {
        Vec sum(0.0f);
        for (int64_t block = 0; block < blocks_; ++block) {
          sum = sum + Vec::loadu(partial_data + block * N_ + begin + j, count);
        }
        sum.store(sums_data + begin + j, count);
      });
    });
    return sums.to(options_.dtype());
  }

  static constexpr int64_t kColumnGrain = 512;
  int64_t blocks_, M_, N_;
  at::TensorOptions options_;
  at::Tensor dweight_, dbias_;  // float32 [blocks, N], or undefined
};

}  // namespace gpt_fast
