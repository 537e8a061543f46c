// Drawing of one token from a row of logits: repetition penalty, temperature, top-k, top-p, min-p, then inversion of
// the cumulative distribution.
//
// At temperature 0 the most probable token is taken. Else a draw uses one uniform number of Philox, whose counter is
// (draw, row) and whose key is the seed. The drawn token is the first one at which the running sum of probabilities
// exceeds that number. The sum runs in the order of ids, or of falling probability if top-k or top-p apply.
#pragma once

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <vector>

#include "cpu/core/vector_math.h"
#include "philox.h"

namespace gpt_fast::decode {

struct Sampling {
  double temperature = 0.0;
  int64_t top_k = 0;  // 0: all tokens
  double top_p = 1.0;
  double min_p = 0.0;  // drops tokens whose probability is below this fraction of the largest one
  double penalty = 1.0;
  int64_t seed = 0;
  int64_t draw = 0;
};

constexpr int64_t kSampleBlock = 64;
constexpr int64_t kNotFinite = -1;
constexpr double kLeastTemperature = 1e-30;

// Returns a uniform number in [0, 1), made of 53 random bits.
inline double uniform(const Sampling& sampling, int64_t row) {
  uint32_t words[4][kLanes];
  const uint64_t draw = static_cast<uint64_t>(sampling.draw);
  philox(0, static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32), static_cast<uint32_t>(row),
         PhiloxKey(sampling.seed), words);
  return static_cast<double>((static_cast<uint64_t>(words[0][0]) << 32 | words[1][0]) >> 11) * 0x1p-53;
}

// Sampler with its own memory, for use by one thread.
class Sampler {
 public:
  // Draws a token from `logits` [V], which this function may change. `seen` [V] marks the tokens that the penalty
  // applies to, or is null. Returns kNotFinite if the logits hold NaN or +inf.
  int64_t draw(float* logits, int64_t V, const Sampling& sampling, const uint8_t* seen, int64_t row) {
    const float before = largest_of(logits, V);
    if (!(before < std::numeric_limits<float>::infinity())) return kNotFinite;
    if (seen != nullptr && sampling.penalty != 1.0) {
      const float penalty = static_cast<float>(sampling.penalty);
      for (int64_t i = 0; i < V; ++i) {
        if (seen[i]) logits[i] = logits[i] > 0.0f ? logits[i] / penalty : logits[i] * penalty;
      }
    }
    const float largest = largest_of(logits, V);
    // At a temperature that float32 cannot divide by, only the most probable token is left.
    if (sampling.temperature < kLeastTemperature) return std::find(logits, logits + V, largest) - logits;
    const float inverse = static_cast<float>(1.0 / sampling.temperature);
    const double u = uniform(sampling, row);
    if ((sampling.top_k == 0 || sampling.top_k >= V) && sampling.top_p >= 1.0) {
      weights_.resize(V);
      weigh(logits, V, largest, inverse, weights_.data());
      if (sampling.min_p > 0.0) {
        const float least = static_cast<float>(sampling.min_p);  // the most probable token weighs 1
        for (int64_t i = 0; i < V; ++i) weights_[i] = weights_[i] < least ? 0.0f : weights_[i];
      }
      return pick(V, u);
    }
    int64_t kept = keep_most_probable(logits, V, largest, inverse, sampling);
    while (kept > 1 && weights_[kept - 1] < static_cast<float>(sampling.min_p)) --kept;
    return ids_[pick(kept, u)];
  }

 private:
  static void weigh(const float* logits, int64_t n, float largest, float inverse, float* weights) {
    at::vec::map<float>([=](Vec x) { return ((x - Vec(largest)) * Vec(inverse)).exp(); }, weights, logits, n);
  }

  static double sum_of(const float* weights, int64_t n) {
    double sum = 0.0;
    for (int64_t i = 0; i < n; i += kSampleBlock) {
      sum += at::vec::reduce_all<float>(add, weights + i, std::min(kSampleBlock, n - i));
    }
    return sum;
  }

  // Returns the first of `count` candidates at which the running sum of weights exceeds u times the sum of all weights.
  int64_t pick(int64_t count, double u) const {
    const double wanted = u * sum_of(weights_.data(), count);
    double running = 0.0;
    int64_t last = 0;  // the result if rounding keeps the running sum from exceeding `wanted`
    for (int64_t begin = 0; begin < count; begin += kSampleBlock) {
      const int64_t n = std::min(kSampleBlock, count - begin);
      const double block = sum_of(weights_.data() + begin, n);
      if (running + block <= wanted) {
        running += block;
        continue;
      }
      for (int64_t i = begin; i < begin + n; ++i) {
        running += weights_[i];
        if (weights_[i] > 0.0f) last = i;
        if (running > wanted) return i;
      }
    }
    return last;
  }

  // Writes the ids of the k largest logits to ids_, largest first. Equal logits come in the order of their ids.
  void take_largest(const float* logits, int64_t V, int64_t k) {
    // The block maxima are logits themselves, so at least k logits reach the k-th largest maximum: it bounds the
    // search.
    const int64_t blocks = ceil_div(V, kSampleBlock);
    float bound = -std::numeric_limits<float>::infinity();
    if (k <= blocks) {
      maxima_.resize(blocks);
      for (int64_t i = 0; i < blocks; ++i) {
        maxima_[i] = largest_of(logits + i * kSampleBlock, std::min(kSampleBlock, V - i * kSampleBlock));
      }
      std::nth_element(maxima_.begin(), maxima_.begin() + (k - 1), maxima_.end(), std::greater<float>());
      bound = maxima_[k - 1];
    }
    ids_.clear();
    for (int64_t i = 0; i < V; ++i) {
      if (logits[i] >= bound) ids_.push_back(static_cast<int32_t>(i));
    }
    const auto before = [logits](int32_t a, int32_t b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    };
    std::partial_sort(ids_.begin(), ids_.begin() + k, ids_.end(), before);
    ids_.resize(k);
  }

  // Keeps the candidates that top-k and top-p leave, with their weights. Returns their number.
  int64_t keep_most_probable(const float* logits, int64_t V, float largest, float inverse, const Sampling& sampling) {
    const int64_t most = sampling.top_k > 0 ? std::min(sampling.top_k, V) : V;
    double whole = 0.0;  // sum of all weights, of which top-p takes a share
    if (most == V) {
      weights_.resize(V);
      weigh(logits, V, largest, inverse, weights_.data());
      whole = sum_of(weights_.data(), V);
    }
    // Without top-k, few tokens usually reach the share of top-p. More tokens are sorted only if they do not.
    for (int64_t k = most == V ? std::min<int64_t>(V, 256) : most;; k = std::min(most, 8 * k)) {
      take_largest(logits, V, k);
      gathered_.resize(k);
      weights_.resize(std::max<int64_t>(k, static_cast<int64_t>(weights_.size())));
      for (int64_t i = 0; i < k; ++i) gathered_[i] = logits[ids_[i]];
      weigh(gathered_.data(), k, largest, inverse, weights_.data());
      if (sampling.top_p >= 1.0) return k;
      const double wanted = sampling.top_p * (most == V ? whole : sum_of(weights_.data(), k));
      double running = 0.0;
      for (int64_t i = 0; i < k; ++i) {
        running += weights_[i];
        if (running >= wanted) return i + 1;
      }
      if (k == most) return k;
    }
  }

  std::vector<float> weights_, gathered_, maxima_;
  std::vector<int32_t> ids_;
};

}  // namespace gpt_fast::decode
