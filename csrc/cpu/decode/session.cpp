// gpt_fast._C.DecodeSession: one decode step of a whole model in one call, and the drawing of the next tokens.
//
// One parallel region serves a step; its threads meet at five barriers a layer and own fixed rows of every weight
// matrix in between. What is small (norms, the preparation of a product's input) every thread computes for itself,
// which is cheaper than to wait for another. x is the residual stream, shared; h its normed form, private.
#include <ATen/ops/from_blob.h>
#include <omp.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <memory>
#include <vector>

#include "bindings.h"
#include "cpu/core/activations.h"
#include "cpu/core/norm.h"
#include "cpu/decode/attention.h"
#include "cpu/decode/sampling.h"
#include "cpu/decode/weights.h"

namespace gpt_fast::decode {
namespace {

using at::Tensor;
using std::optional;

[[noreturn]] void refuse(const std::string& message) {
  throw pybind11::value_error("gpt_fast.DecodeSession: " + message);
}

void activate_row(Activation activation, float* x, int64_t n) {
  with_activation(activation, [&](auto constant) {
    at::vec::map<float>([](Vec z) { return activate<decltype(constant)::value>(z).value; }, x, x, n);
  });
}

constexpr int64_t kBytesPerThread = 128 << 10;

// Thread `thread`'s part of N, in multiples of `unit`.
struct Share {
  int64_t begin, end;
  Share(int64_t N, int64_t unit, int thread, int threads) {
    const int64_t units = ceil_div(N, unit);
    begin = std::min(N, units * thread / threads * unit);
    end = std::min(N, units * (thread + 1) / threads * unit);
  }
};

// Marks a session as in use; a second thread gets an error instead of a data race.
class InUse {
 public:
  explicit InUse(std::atomic<bool>& flag) : flag_(flag) {
    if (flag_.exchange(true)) {
      throw std::runtime_error(
          "gpt_fast.DecodeSession: in use by another thread; a session serves one thread at a time, make one for each");
    }
  }
  ~InUse() { flag_.store(false); }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  std::atomic<bool>& flag_;
};

class DecodeSession {
 public:
  // keys and values: [layers, B, H, S, D], float32 for float32 weights, else bfloat16.
  DecodeSession(std::shared_ptr<const DecodeWeights> weights, Tensor keys, Tensor values)
      : w_(std::move(weights)), keys_(std::move(keys)), values_(std::move(values)) {
    const auto type = w_->dtype == at::kFloat ? at::kFloat : at::kBFloat16;
    const int64_t L = static_cast<int64_t>(w_->blocks.size());
    for (const Tensor& cache : {keys_, values_}) {
      if (cache.dim() != 5 || cache.size(0) != L || cache.size(2) != w_->H || cache.size(4) != w_->C / w_->H ||
          cache.sizes() != keys_.sizes() || cache.scalar_type() != type || !cache.is_contiguous()) {
        refuse("the cache does not fit the model");
      }
    }
    B_ = keys_.size(1);
    S_ = keys_.size(3);
    x_.resize(B_ * w_->C);
    q_.resize(B_ * w_->C);
    attended_.resize(B_ * w_->C);
    hidden_.resize(B_ * w_->F);
    logits_.resize(B_ * w_->V);
    drawn_.resize(B_);
  }

  // Feeds tokens[i] at positions[i] to the cache's row rows[i], each [n] int64; draws and returns the next tokens [n].
  Tensor step(const Tensor& tokens, const Tensor& positions, const Tensor& rows, const Sampling& sampling,
              const optional<Tensor>& seen) {
    const InUse guard(in_use_);
    check_rows(rows);
    n_ = 0;  // no logits to show until this step has made them
    const int64_t n = rows.numel();
    const int64_t* token = integers("tokens", tokens, n);
    const int64_t* position = integers("positions", positions, n);
    for (int64_t i = 0; i < n; ++i) {
      if (token[i] < 0 || token[i] >= w_->V) {
        refuse("token " + std::to_string(token[i]) + ", wanted one in [0, " + std::to_string(w_->V) + ")");
      }
      const int64_t most = std::min(S_, w_->T);
      if (position[i] < 0 || position[i] >= most) {
        refuse("position " + std::to_string(position[i]) + " in a cache of " + std::to_string(most) +
               ": it is full; make a longer one, or let the context slide");
      }
    }
    const Work work{token, position, rows.const_data_ptr<int64_t>(), n, sampling, marks(seen)};
    const int threads = threads_for(n);
    if (static_cast<int>(private_.size()) < threads) private_.resize(threads);
    for (Private& own : private_) own.reserve(*this);
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num(), count = omp_get_num_threads();
      with_format(w_->dtype, [&](auto format) { run<decltype(format)>(work, private_[thread], thread, count); });
    }
    n_ = n;
    return taken(n);
  }

  // Draws from given logits [n, V] float32 as `step` does from its own.
  Tensor draw(const Tensor& logits, const Tensor& rows, const Sampling& sampling, const optional<Tensor>& seen) {
    const InUse guard(in_use_);
    check_rows(rows);
    const int64_t n = rows.numel();
    if (logits.scalar_type() != at::kFloat || logits.dim() != 2 || logits.size(0) != n || logits.size(1) != w_->V) {
      refuse("logits to draw from do not fit, wanted float32 [n, V]");
    }
    const Tensor copy = logits.clone(at::MemoryFormat::Contiguous);
    if (private_.empty()) private_.resize(1);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = rows.const_data_ptr<int64_t>()[i];
      drawn_[i] = private_[0].sampler.draw(copy.mutable_data_ptr<float>() + i * w_->V, w_->V, sampling,
                                           row_marks(marks(seen), row), row);
    }
    return taken(n);
  }

  // Of the last step, float32 [n, V], as they were before any penalty or cut.
  Tensor logits() const {
    const InUse guard(in_use_);
    return at::from_blob(const_cast<float*>(logits_.data()), {n_, w_->V}, at::kFloat).clone();
  }

 private:
  struct Work {
    const int64_t *token, *position, *row;
    int64_t n;
    const Sampling& sampling;
    const uint8_t* seen;
  };

  // One thread's memory.
  struct Private {
    std::vector<float> h, scale, scratch, buffer, logits;
    std::vector<char> input;
    Sampler sampler;

    void reserve(const DecodeSession& s) {
      const DecodeWeights& w = *s.w_;
      const int64_t widest = std::max(w.C, w.F);
      h.resize(s.B_ * w.C);
      scale.resize(s.B_);
      scratch.resize(decode_scratch(s.S_, w.C / w.H));
      buffer.resize(widest);
      logits.resize(w.V);
      input.resize(s.B_ * (widest + 64) * sizeof(float) + 64);
    }
    template <class Format>
    typename Format::input_t* inputs() {
      const auto address = reinterpret_cast<uintptr_t>(input.data());
      return reinterpret_cast<typename Format::input_t*>((address + 63) / 64 * 64);
    }
  };

  template <class Format>
  void prepare(const Linear& linear, const float* x, int64_t n, Private& own) const {
    for (int64_t i = 0; i < n; ++i) {
      own.scale[i] =
          Format::prepare(x + i * linear.K, linear.K, linear.stride, own.inputs<Format>() + i * linear.stride);
    }
  }

  void normalise(const Norm& norm, int64_t n, Private& own) const {
    const int64_t C = w_->C;
    for (int64_t i = 0; i < n; ++i) {
      const float* row = x_.data() + i * C;
      normalise_row(row, row_statistics(row, C, w_->eps), norm.gain(), norm.shift(), C, own.h.data() + i * C);
    }
  }

  template <class Format, class Write>
  void product(const Linear& linear, int64_t n, Private& own, const Share& share, const Write& write) const {
    multiply(linear.matrix<Format>(), share.begin, share.end, own.inputs<Format>(), own.scale.data(), n, write);
  }

  template <class Format>
  void run(const Work& work, Private& own, int thread, int threads) {
    const DecodeWeights& w = *w_;
    const int64_t n = work.n, C = w.C, F = w.F, H = w.H, D = C / H;
    const Share narrow(C, kStreams, thread, threads), wide(F, kStreams, thread, threads),
        triple(3 * C, kStreams, thread, threads), heads(n * H, 1, thread, threads);
    using cache_t = Cache<Format>;
    cache_t* const keys = keys_.mutable_data_ptr<cache_t>();
    cache_t* const values = values_.mutable_data_ptr<cache_t>();
    const float scale = 1.0f / std::sqrt(static_cast<float>(D));

    const Rows tokens(w.token_embedding), positions(w.position_embedding);
    for (int64_t i = thread; i < n; i += threads) {
      float* x = x_.data() + i * C;
      const float* token = tokens.read(work.token[i], own.buffer.data());
      std::copy(token, token + C, x);
      const float* position = positions.read(work.position[i], own.buffer.data());
      at::vec::map2<float>(add, x, x, position, C);
    }
#pragma omp barrier
    if (!w.pre_norm) std::copy(x_.data(), x_.data() + n * C, own.h.data());

    for (int64_t layer = 0; layer < static_cast<int64_t>(w.blocks.size()); ++layer) {
      const DecoderWeights& block = w.blocks[layer];
      const auto cached = [&](int64_t i, int64_t head) {  // where the keys, and the values, of a head begin
        return (((layer * B_ + work.row[i]) * H) + head) * S_ * D;
      };
      const auto add_branch = [&](int64_t i, int64_t c, float y) {
        x_[i * C + c] = (w.pre_norm ? x_[i * C + c] : own.h[i * C + c]) + y;
      };

      if (w.pre_norm) normalise(block.norm1, n, own);
      prepare<Format>(block.qkv, own.h.data(), n, own);
      product<Format>(block.qkv, n, own, triple, [&](int64_t i, int64_t c, float y) {
        if (c < C) {
          q_[i * C + c] = y * scale;
          return;
        }
        const int64_t within = (c - C) % C;
        (c < 2 * C ? keys : values)[cached(i, within / D) + work.position[i] * D + within % D] =
            static_cast<cache_t>(y);
      });
#pragma omp barrier
      for (int64_t task = heads.begin; task < heads.end; ++task) {
        const int64_t i = task / H, head = task % H, base = cached(i, head);
        attend_to_cache(q_.data() + i * C + head * D, keys + base, D, values + base, D, work.position[i] + 1, D,
                        own.scratch.data(), attended_.data() + i * C + head * D);
      }
#pragma omp barrier
      prepare<Format>(block.out, attended_.data(), n, own);
      product<Format>(block.out, n, own, narrow, add_branch);
#pragma omp barrier
      normalise(w.pre_norm ? block.norm2 : block.norm1, n, own);
      prepare<Format>(block.fc, own.h.data(), n, own);
      product<Format>(block.fc, n, own, wide, [&](int64_t i, int64_t f, float y) { hidden_[i * F + f] = y; });
      for (int64_t i = 0; i < n; ++i) {
        activate_row(w.activation, hidden_.data() + i * F + wide.begin, wide.end - wide.begin);
      }
#pragma omp barrier
      prepare<Format>(block.proj, hidden_.data(), n, own);
      product<Format>(block.proj, n, own, narrow, add_branch);
#pragma omp barrier
      if (!w.pre_norm) normalise(block.norm2, n, own);
    }
    if (w.pre_norm) normalise(w.final_norm, n, own);
    prepare<Format>(w.output, own.h.data(), n, own);
    product<Format>(w.output, n, own, Share(w.V, kStreams, thread, threads),
                    [&](int64_t i, int64_t v, float y) { logits_[i * w.V + v] = y; });
#pragma omp barrier
    for (int64_t i = thread; i < n; i += threads) {
      std::copy(logits_.data() + i * w.V, logits_.data() + (i + 1) * w.V, own.logits.data());
      drawn_[i] =
          own.sampler.draw(own.logits.data(), w.V, work.sampling, row_marks(work.seen, work.row[i]), work.row[i]);
    }
  }

  // A layer's five barriers are worth another thread from about kBytesPerThread of weights on.
  int threads_for(int64_t n) const {
    const int64_t layers = std::max<int64_t>(1, static_cast<int64_t>(w_->blocks.size()));
    const int64_t useful = w_->bytes() / layers * n / kBytesPerThread;
    return static_cast<int>(std::clamp<int64_t>(useful, 1, at::get_num_threads()));
  }

  const uint8_t* row_marks(const uint8_t* seen, int64_t row) const {
    return seen == nullptr ? nullptr : seen + row * w_->V;
  }

  const int64_t* integers(const char* name, const Tensor& x, int64_t n) const {
    if (x.scalar_type() != at::kLong || x.dim() != 1 || x.numel() != n || !x.is_contiguous()) {
      refuse(std::string(name) + " does not fit, wanted int64 [" + std::to_string(n) + "]");
    }
    return x.const_data_ptr<int64_t>();
  }

  void check_rows(const Tensor& rows) const {
    const int64_t n = rows.numel();
    if (n > B_) refuse(std::to_string(n) + " sequences, wanted at most the " + std::to_string(B_) + " it was made for");
    const int64_t* row = integers("rows", rows, n);
    std::vector<bool> used(B_);
    for (int64_t i = 0; i < n; ++i) {
      if (row[i] < 0 || row[i] >= B_ || used[row[i]]) {
        refuse("row " + std::to_string(row[i]) + ", wanted different ones in [0, " + std::to_string(B_) + ")");
      }
      used[row[i]] = true;
    }
  }

  const uint8_t* marks(const optional<Tensor>& seen) const {
    if (!seen.has_value()) return nullptr;
    if (seen->scalar_type() != at::kBool || seen->dim() != 2 || seen->size(0) != B_ || seen->size(1) != w_->V ||
        !seen->is_contiguous()) {
      refuse("seen does not fit, wanted bool [" + std::to_string(B_) + ", " + std::to_string(w_->V) + "]");
    }
    return static_cast<const uint8_t*>(seen->const_data_ptr());
  }

  Tensor taken(int64_t n) const {
    for (int64_t i = 0; i < n; ++i) {
      if (drawn_[i] == kNotFinite) {
        throw pybind11::value_error(
            "generate: the model's logits hold NaN or infinity; its weights are damaged or its training diverged");
      }
    }
    const Tensor tokens = at::empty({n}, at::TensorOptions().dtype(at::kLong));
    std::copy(drawn_.begin(), drawn_.begin() + n, tokens.mutable_data_ptr<int64_t>());
    return tokens;
  }

  std::shared_ptr<const DecodeWeights> w_;
  Tensor keys_, values_;
  int64_t B_ = 0, S_ = 0, n_ = 0;  // sequences, positions; rows of the last step
  std::vector<float> x_, q_, attended_, hidden_, logits_;
  std::vector<int64_t> drawn_;
  std::vector<Private> private_;
  mutable std::atomic<bool> in_use_{false};
};

namespace py = pybind11;

const Binding binding([](py::module_& m) {
  py::class_<DecodeWeights, std::shared_ptr<DecodeWeights>>(
      m, "DecodeWeights", "A model's weights packed for decoding: float32, bfloat16 or int8 with a scale a row.")
      .def(py::init<const Parameters&, int64_t, const std::string&, bool, double, const std::string&>(),
           py::arg("parameters"), py::kw_only(), py::arg("num_heads"), py::arg("activation"), py::arg("pre_norm"),
           py::arg("eps"), py::arg("weights"))
      .def_property_readonly("bytes", &DecodeWeights::bytes, "What a step has to read: the bytes of all matrices.")
      .def_readonly("copied", &DecodeWeights::copied, "Names of the parameters that were copied, not read in place.");

  py::class_<Sampling>(m, "Sampling", "How a token is drawn from logits; top_k 0, top_p 1 and min_p 0 keep all.")
      .def(py::init([](double temperature, int64_t top_k, double top_p, double min_p, double penalty, int64_t seed,
                       int64_t draw) { return Sampling{temperature, top_k, top_p, min_p, penalty, seed, draw}; }),
           py::kw_only(), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
           py::arg("penalty"), py::arg("seed"), py::arg("draw"));

  py::class_<DecodeSession>(
      m, "DecodeSession",
      "Decode steps of a whole model against a cache of keys and values; see gpt_fast.DecodeSession.")
      .def(py::init([](std::shared_ptr<DecodeWeights> weights, Tensor keys, Tensor values) {
             return std::make_unique<DecodeSession>(std::move(weights), std::move(keys), std::move(values));
           }),
           py::arg("weights"), py::arg("keys"), py::arg("values"))
      .def("step", &DecodeSession::step, py::arg("tokens"), py::arg("positions"), py::arg("rows"), py::arg("sampling"),
           py::arg("seen") = py::none(), py::call_guard<py::gil_scoped_release>())
      .def("draw", &DecodeSession::draw, py::arg("logits"), py::arg("rows"), py::arg("sampling"),
           py::arg("seen") = py::none(), py::call_guard<py::gil_scoped_release>())
      .def("logits", &DecodeSession::logits);
});

}  // namespace
}  // namespace gpt_fast::decode
