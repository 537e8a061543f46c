// gpt_fast._C.DecodeSession: one decode step of a whole model in one call, and the drawing of the next tokens.
//
// A step, and a piece of a prompt, is one job of the threads (core/team.h): nine phases a layer, whose pieces go to
// whoever is free. A prompt is n tokens of one row where a step is one token of n rows. x is the residual stream.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "bindings.h"
#include "cpu/core/activations.h"
#include "cpu/core/gemm.h"
#include "cpu/core/norm.h"
#include "cpu/core/team.h"
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

constexpr int64_t kBytesPerThread = 128 << 10;  // of weights, from which on another thread is worth waking
constexpr int64_t kPieceBytes = 128 << 10;      // of weights, that one piece of a product reads
constexpr int64_t kChunk = 512;                 // tokens of prompts that are read together
constexpr int64_t kQueries = 16;                // of a piece of attention
constexpr int64_t kPreparedValues = 8192;       // of a piece that prepares vectors
constexpr int64_t kPreparedAlone = 2;           // vectors that every thread prepares for itself

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
    const auto type = w_->storage == Storage::kFloat32 ? at::kFloat : at::kBFloat16;
    const int64_t L = static_cast<int64_t>(w_->blocks.size());
    for (const Tensor& cache : {keys_, values_}) {
      if (cache.dim() != 5 || cache.size(0) != L || cache.size(2) != w_->H || cache.size(4) != w_->C / w_->H ||
          cache.sizes() != keys_.sizes() || cache.scalar_type() != type || !cache.is_contiguous()) {
        refuse("the cache does not fit the model");
      }
    }
    B_ = keys_.size(1);
    S_ = keys_.size(3);
    drawn_.resize(B_);
  }

  ~DecodeSession() { finish_jobs(); }

  // Feeds tokens[i] at positions[i] to the cache's row rows[i], each [n] int64; draws and returns the next tokens [n].
  Tensor step(const Tensor& tokens, const Tensor& positions, const Tensor& rows, const Sampling& sampling,
              const optional<Tensor>& seen) {
    const InUse guard(in_use_);
    check_rows(rows);
    n_ = 0;  // no logits to show until this step has made them
    const int64_t n = rows.numel();
    auto work = std::make_shared<Work>(read_work(tokens, positions, rows));
    for (int64_t i = 0; i < n; ++i) work->ends.push_back(i);
    work->sampling = sampling;
    work->seen = marks(seen);
    work->seen_tensor = seen;
    work->draws = true;
    read(work);
    n_ = n;
    return taken(n);
  }

  // Feeds the tokens of prompts as `step` does. The tokens of one row follow one another. Returns the logits [m, V]
  // after the tokens at the places `ends` [m], which rise.
  Tensor prefill(const Tensor& tokens, const Tensor& positions, const Tensor& rows, const Tensor& ends) {
    const InUse guard(in_use_);
    n_ = 0;
    const Work all = read_work(tokens, positions, rows);
    const int64_t n = tokens.numel(), m = ends.numel();
    const int64_t* end = integers("ends", ends, m);
    const Tensor logits = at::empty({m, w_->V}, at::TensorOptions().dtype(at::kFloat));
    for (int64_t begin = 0, made = 0; begin < n; begin += kChunk) {
      const int64_t last = std::min(n, begin + kChunk);
      auto work = std::make_shared<Work>();
      const auto part = [&](const std::vector<int64_t>& x) {
        return std::vector<int64_t>(x.begin() + begin, x.begin() + last);
      };
      work->token = part(all.token);
      work->position = part(all.position);
      work->row = part(all.row);
      const int64_t before = made;
      for (; made < m && end[made] < last; ++made) work->ends.push_back(end[made] - begin);
      read(work);
      std::copy(logits_.data(), logits_.data() + (made - before) * w_->V,
                logits.mutable_data_ptr<float>() + before * w_->V);
    }
    return logits;
  }

  // Draws from given logits [n, V] float32 as `step` does from its own.
  Tensor draw(const Tensor& logits, const Tensor& rows, const Sampling& sampling, const optional<Tensor>& seen) {
    const InUse guard(in_use_);
    check_rows(rows);
    const int64_t n = rows.numel();
    if (logits.scalar_type() != at::kFloat || logits.dim() != 2 || logits.size(0) != n || logits.size(1) != w_->V) {
      refuse("logits to draw from do not fit; expected float32 [n, V]");
    }
    const Tensor copy = logits.clone(at::MemoryFormat::Contiguous);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = rows.const_data_ptr<int64_t>()[i];
      drawn_[i] = scratch().sampler.draw(copy.mutable_data_ptr<float>() + i * w_->V, w_->V, sampling,
                                         row_marks(marks(seen), row), row);
    }
    return taken(n);
  }

  // Returns the logits of the last step, float32 [n, V], before any penalty or cut.
  Tensor logits() const {
    const InUse guard(in_use_);
    // Copied by this thread: the library's own copy would wake OpenMP's threads, which then spin beside the next step.
    const Tensor logits = at::empty({n_, w_->V}, at::TensorOptions().dtype(at::kFloat));
    std::memcpy(logits.mutable_data_ptr<float>(), logits_.data(), n_ * w_->V * sizeof(float));
    return logits;
  }

 private:
  // Input of a job. Other threads may be in it when the next one has begun, so it shares nothing with its caller.
  struct Work {
    std::vector<int64_t> token, position, row;
    std::vector<int64_t> ends;  // of which the logits are computed
    Sampling sampling;
    optional<Tensor> seen_tensor;
    const uint8_t* seen = nullptr;
    bool draws = false;

    int64_t n() const { return static_cast<int64_t>(token.size()); }
  };

  // One thread's memory, for the results of a piece.
  struct Scratch {
    Memory<float> y, h, scores, buffer, scale;
    Memory<Word> inputs;
    Sampler sampler;
  };

  static Scratch& scratch() {
    static thread_local Scratch own;
    return own;
  }

  static float* sized(Memory<float>& memory, int64_t size) {
    memory.reserve(size);
    return memory.data();
  }

  // The words of a prepared vector of K values.
  int64_t input_words(int64_t K) const {
    return with_format(w_->storage, [&](auto format) {
      using Format = decltype(format);
      return input_stride<Format>(ceil_div(K, Format::kPer));
    });
  }

  Work read_work(const Tensor& tokens, const Tensor& positions, const Tensor& rows) const {
    const int64_t n = tokens.numel(), most = std::min(S_, w_->T);
    const int64_t* token = integers("tokens", tokens, n);
    const int64_t* position = integers("positions", positions, n);
    const int64_t* row = integers("rows", rows, n);
    for (int64_t i = 0; i < n; ++i) {
      if (token[i] < 0 || token[i] >= w_->V) {
        refuse("token is " + std::to_string(token[i]) + "; expected one in [0, " + std::to_string(w_->V) + ")");
      }
      if (position[i] < 0 || position[i] >= most) {
        refuse("position " + std::to_string(position[i]) + " in a cache of " + std::to_string(most) +
               ": it is full; make a longer one, or let the context slide");
      }
      if (row[i] < 0 || row[i] >= B_) {
        refuse("row is " + std::to_string(row[i]) + "; expected one in [0, " + std::to_string(B_) + ")");
      }
    }
    Work work;
    work.token.assign(token, token + n);
    work.position.assign(position, position + n);
    work.row.assign(row, row + n);
    return work;
  }

  // Computes the keys and values of the work's tokens, and logits_ of its ends.
  void read(const std::shared_ptr<const Work>& work) {
    reserve(work->n(), static_cast<int64_t>(work->ends.size()));
    const int threads = threads_for(work->n());
    const auto running = Team::instance().run(threads, [this, work](Team::Walker& walker) {
      with_format(w_->storage, [&](auto format) { run<decltype(format)>(walker, *work); });
    });
    std::erase_if(jobs_, [](const Team::Running& job) { return job.is_over(); });
    if (!running.is_over()) jobs_.push_back(running);
  }

  // Memory for n vectors, of which m have logits.
  void reserve(int64_t n, int64_t m) {
    const DecodeWeights& w = *w_;
    if (n > scale_.size() || m * w.V > logits_.size()) finish_jobs();
    x_.reserve(n * w.C);
    q_.reserve(n * w.C);
    attended_.reserve(n * std::max(w.C, input_words(w.C)));
    hidden_.reserve(n * std::max(w.F, input_words(w.F)));
    if (n > scale_.size()) {
      scale_.reserve(n);
      std::fill(scale_.data(), scale_.data() + n, 1.0f);  // stays so where vectors have no scales
    }
    inputs_.reserve(n * std::max(input_words(w.C), input_words(w.F)));
    logits_.reserve(m * w.V);
  }

  void finish_jobs() {
    for (const Team::Running& job : jobs_) job.finish();
    jobs_.clear();
  }

  // The vectors of a product: rows of `x`, normalised if there is a norm, and written back if it `stores` the result.
  // Or `words`, which are prepared already.
  struct Source {
    float* x;
    const Norm* norm = nullptr;
    bool stores = false;
    const int64_t* rows = nullptr;  // which rows; null for the first ones
    const Word* words = nullptr;

    int64_t row(int64_t i) const { return rows == nullptr ? i : rows[i]; }
  };

  // Vectors [n, K] between two products, as the first one's pieces write them (`put`) and the next one reads them. They
  // are words already where no scale of the whole vector is needed, else floats.
  template <class Format>
  static Source between(Memory<Word>& vectors) {
    if constexpr (Format::kScaled) return {reinterpret_cast<float*>(vectors.data())};
    return {nullptr, nullptr, false, nullptr, vectors.data()};
  }

  // Writes the values from `begin` on of vector i.
  template <class Format>
  static void put(const float* y, int64_t count, Memory<Word>& vectors, const Linear& next, int64_t i, int64_t begin) {
    if constexpr (Format::kScaled) {
      round_row(y, reinterpret_cast<float*>(vectors.data()) + i * next.K + begin, count);
    } else {
      Word* vector = vectors.data() + i * input_stride<Format>(next.words);
      Format::prepare_part(y, begin, count, next.K, next.words, vector);
    }
  }

  // Prepares vectors `begin` to `end` into the thread's own inputs and scale; the normalised ones are in its h.
  template <class Format>
  void prepare(const Linear& linear, const Source& source, int64_t begin, int64_t end) const {
    const int64_t K = linear.K, stride = input_stride<Format>(linear.words), count = end - begin;
    Scratch& own = scratch();
    own.inputs.reserve(count * stride);
    sized(own.h, count * K);
    sized(own.scale, count);
    for (int64_t i = begin; i < end; ++i) {
      const float* row = source.x + source.row(i) * K;
      if (source.norm != nullptr) {
        float* h = own.h.data() + (i - begin) * K;
        normalise_row(row, row_statistics(row, K, w_->eps), source.norm->gain(), source.norm->shift(), K, h);
        row = h;
      }
      own.scale.data()[i - begin] = Format::prepare(row, K, linear.words, own.inputs.data() + (i - begin) * stride);
    }
  }

  // As a phase: the vectors go where all threads read them.
  template <class Format>
  void prepare_together(Team::Walker& walker, const Linear& linear, const Source& source, int64_t n) {
    const int64_t K = linear.K, stride = input_stride<Format>(linear.words);
    const int64_t rows = std::max<int64_t>(1, kPreparedValues / K);
    walker.phase(
        ceil_div(n, rows),
        [&](int64_t piece) { prepare<Format>(linear, source, piece * rows, std::min(n, (piece + 1) * rows)); },
        [&](int64_t piece) {
          const int64_t begin = piece * rows, end = std::min(n, begin + rows);
          Scratch& own = scratch();
          std::memcpy(inputs_.data() + begin * stride, own.inputs.data(), (end - begin) * stride * sizeof(Word));
          std::copy(own.scale.data(), own.scale.data() + (end - begin), scale_.data() + begin);
          if (source.stores) {
            for (int64_t i = begin; i < end; ++i) {
              std::copy(own.h.data() + (i - begin) * K, own.h.data() + (i - begin + 1) * K,
                        source.x + source.row(i) * K);
            }
          }
        });
  }

  // Panels of a matrix, `kVec` of its rows each.
  struct Panels {
    int64_t first = 0, last = std::numeric_limits<int64_t>::max();  // those before `last`
  };

  // The product of n vectors with the panels of a matrix: change(y, count), then write(i, c, y, count) for each
  // vector's values from c on. A few vectors every thread prepares for itself, which is cheaper than to wait for
  // another.
  template <class Format, class Change, class Write>
  void product(Team::Walker& walker, const Linear& linear, const Source& source, int64_t n, const Change& change,
               const Write& write, const Panels& range = {}) {
    const bool together = source.words != nullptr || n > kPreparedAlone || source.stores;
    if (together && source.words == nullptr) prepare_together<Format>(walker, linear, source, n);
    const Matrix<Format> matrix = linear.matrix<Format>();
    const int64_t first = range.first, last = std::min(range.last, matrix.panels()), panels = last - first;
    const int64_t bytes = linear.words * kVec * static_cast<int64_t>(sizeof(Word));
    int64_t count = std::max<int64_t>(1, kPieceBytes / bytes);  // panels of a piece
    if (count > kTilePanels) count = count / kTilePanels * kTilePanels;
    if (n > Format::kTileVectors) count = kTilePanels;
    count = std::max(count, ceil_div(panels, Team::kMostPieces));
    bool prepared = together;
    walker.phase(
        ceil_div(panels, count),
        [&](int64_t piece) {
          Scratch& own = scratch();
          if (!prepared) prepare<Format>(linear, source, 0, n);
          prepared = true;
          const Word* words = source.words != nullptr ? source.words : (together ? inputs_ : own.inputs).data();
          const Inputs inputs{words, (together ? scale_ : own.scale).data()};
          const int64_t begin = first + piece * count, end = std::min(last, begin + count);
          const int64_t width = (end - begin) * kVec;
          float* y = sized(own.y, n * width);
          multiply(matrix, begin, end, inputs, n, y);
          for (int64_t i = 0; i < n; ++i) change(y + i * width, std::min(width, linear.N - begin * kVec));
        },
        [&](int64_t piece) {
          const int64_t begin = first + piece * count, end = std::min(last, begin + count);
          const int64_t width = (end - begin) * kVec;
          const float* y = scratch().y.data();
          for (int64_t i = 0; i < n; ++i) {
            write(i, begin * kVec, y + i * width, std::min(width, linear.N - begin * kVec));
          }
        });
  }

  // One thread's way through a job. What it decides must follow from the work alone: a thread that comes late reads
  // what later phases have written.
  template <class Format>
  void run(Team::Walker& walker, const Work& work) {
    const DecodeWeights& w = *w_;
    const int64_t n = work.n(), C = w.C, H = w.H, D = C / H, L = static_cast<int64_t>(w.blocks.size());
    using cache_t = Cache<Format>;
    cache_t* const keys = keys_.mutable_data_ptr<cache_t>();
    cache_t* const values = values_.mutable_data_ptr<cache_t>();
    const float scale = 1.0f / std::sqrt(static_cast<float>(D));
    const int64_t m = static_cast<int64_t>(work.ends.size());
    const auto unchanged = [](float*, int64_t) {};

    const Rows tokens(w.token_embedding), positions(w.position_embedding);
    walker.phase(
        ceil_div(n, kQueries),
        [&](int64_t piece) {
          Scratch& own = scratch();
          float* x = sized(own.h, kQueries * C);
          float* buffer = sized(own.buffer, C);
          for (int64_t i = piece * kQueries; i < std::min(n, (piece + 1) * kQueries); ++i, x += C) {
            const float* token = tokens.read(work.token[i], buffer);
            std::copy(token, token + C, x);
            at::vec::map2<float>(add, x, x, positions.read(work.position[i], buffer), C);
          }
        },
        [&](int64_t piece) {
          const int64_t begin = piece * kQueries, end = std::min(n, begin + kQueries);
          std::copy(scratch().h.data(), scratch().h.data() + (end - begin) * C, x_.data() + begin * C);
        });

    // With norms after the blocks, the last norm of a block is that of what reads it next.
    const Norm* pending = nullptr;
    for (int64_t layer = 0; layer < L; ++layer) {
      const DecoderWeights& block = w.blocks[layer];
      const auto cached = [&](int64_t i, int64_t head) {  // where the keys, and the values, of a head begin
        return (((layer * B_ + work.row[i]) * H) + head) * S_ * D;
      };

      // Other tokens' keys and values are all that the last layer owes to the tokens whose logits are computed.
      const bool is_last = layer == L - 1;
      const int64_t* const places = is_last ? work.ends.data() : nullptr;
      const int64_t rest = is_last ? m : n;
      const auto place = [&](int64_t i) { return places == nullptr ? i : places[i]; };
      const auto add_branch = [&](int64_t i, int64_t c, const float* y, int64_t count) {
        float* x = x_.data() + place(i) * C + c;
        at::vec::map2<float>(add, x, x, y, count);
      };

      const auto put_qkv = [&](int64_t i, int64_t begin, const float* y, int64_t count) {
        for (int64_t c = begin, end = begin + count; c < end;) {  // pieces of one head's values
          const int64_t part = c / C, head = c % C / D, d = c % D, length = std::min(D - d, end - c);
          const float* values_here = y + c - begin;
          if (part == 0) {
            float* q = q_.data() + i * C + c;
            for (int64_t e = 0; e < length; ++e) q[e] = values_here[e] * scale;
          } else {
            cache_t* row = (part == 1 ? keys : values) + cached(i, head) + work.position[i] * D + d;
            round_row(values_here, row, length);
          }
          c += length;
        }
      };
      const Norm* first = w.pre_norm ? &block.norm1 : pending;
      const Source inputs{x_.data(), first, !w.pre_norm && first != nullptr};
      if (rest > 0 && rest < n && C % kVec == 0) {
        const int64_t queries = C / kVec;
        product<Format>(walker, block.qkv, inputs, n, unchanged, put_qkv, {queries});
        product<Format>(
            walker, block.qkv, {x_.data(), w.pre_norm ? first : nullptr, false, places}, rest, unchanged,
            [&](int64_t i, int64_t begin, const float* y, int64_t count) { put_qkv(place(i), begin, y, count); },
            {0, queries});
      } else {
        product<Format>(walker, block.qkv, inputs, n, unchanged, put_qkv);
      }
      if (rest == 0) break;
      const int64_t groups = ceil_div(rest, kQueries);
      walker.phase(
          groups * H,
          [&](int64_t piece) {
            const int64_t head = piece % H, begin = piece / H * kQueries, end = std::min(rest, begin + kQueries);
            Scratch& own = scratch();
            float* out = sized(own.h, kQueries * D);
            const bool fits = D % kVec == 0 && end - begin >= kFewestTogether;
            float* memory = sized(own.scores, fits ? together_scratch(S_, D) : decode_scratch(S_, D));
            for (int64_t i = begin, count; i < end; i += count) {
              const int64_t at = place(i), base = cached(at, head), keys_here = work.position[at] + 1;
              const float* q = q_.data() + at * C + head * D;
              const auto follows = [&](int64_t k) {
                return place(i + k) == at + k && work.row[at + k] == work.row[at];
              };
              for (count = 1; i + count < end && count < kQueriesTogether && follows(count);) ++count;
              if (fits && count >= kFewestTogether) {  // a row's tokens follow one another
                attend_together(q, C, count, keys + base, values + base, keys_here, D, memory, out + (i - begin) * D);
              } else {
                count = 1;
                attend_to_cache(q, keys + base, D, values + base, D, keys_here, D, memory, out + (i - begin) * D);
              }
            }
          },
          [&](int64_t piece) {
            const int64_t head = piece % H, begin = piece / H * kQueries, end = std::min(rest, begin + kQueries);
            const float* out = scratch().h.data();
            for (int64_t i = begin; i < end; ++i, out += D) {
              put<Format>(out, D, attended_, block.out, i, head * D);
            }
          });
      product<Format>(walker, block.out, between<Format>(attended_), rest, unchanged, add_branch);
      product<Format>(
          walker, block.fc, {x_.data(), w.pre_norm ? &block.norm2 : &block.norm1, !w.pre_norm, places}, rest,
          [&](float* y, int64_t count) { activate_row(w.activation, y, count); },
          [&](int64_t i, int64_t f, const float* y, int64_t count) {
            put<Format>(y, count, hidden_, block.proj, i, f);
          });
      product<Format>(walker, block.proj, between<Format>(hidden_), rest, unchanged, add_branch);
      pending = &block.norm2;
    }

    product<Format>(walker, w.output, {x_.data(), w.pre_norm ? &w.final_norm : pending, false, work.ends.data()}, m,
                    unchanged, [&](int64_t i, int64_t v, const float* y, int64_t count) {
                      round_row(y, logits_.data() + i * w.V + v, count);
                    });
    int64_t drawn = 0;
    walker.phase(
        work.draws ? m : 0,
        [&](int64_t i) {
          Scratch& own = scratch();
          float* logits = sized(own.y, w.V);
          std::copy(logits_.data() + i * w.V, logits_.data() + (i + 1) * w.V, logits);
          drawn = own.sampler.draw(logits, w.V, work.sampling, row_marks(work.seen, work.row[i]), work.row[i]);
        },
        [&](int64_t i) { drawn_[i] = drawn; });
  }

  // Another thread is worth waking from about kBytesPerThread of weights in a layer on.
  int threads_for(int64_t n) const {
    static const int usable = usable_cpus();
    const int64_t layers = std::max<int64_t>(1, static_cast<int64_t>(w_->blocks.size()));
    const int64_t useful = w_->bytes() / layers * n / kBytesPerThread;
    return static_cast<int>(std::clamp<int64_t>(useful, 1, std::min(at::get_num_threads(), usable)));
  }

  const uint8_t* row_marks(const uint8_t* seen, int64_t row) const {
    return seen == nullptr ? nullptr : seen + row * w_->V;
  }

  const int64_t* integers(const char* name, const Tensor& x, int64_t n) const {
    if (x.scalar_type() != at::kLong || x.dim() != 1 || x.numel() != n || !x.is_contiguous()) {
      refuse(std::string(name) + " does not fit; expected int64 [" + std::to_string(n) + "]");
    }
    return x.const_data_ptr<int64_t>();
  }

  void check_rows(const Tensor& rows) const {
    const int64_t n = rows.numel();
    if (n > B_)
      refuse(std::to_string(n) + " sequences; expected at most the " + std::to_string(B_) + " it was made for");
    const int64_t* row = integers("rows", rows, n);
    std::vector<bool> used(B_);
    for (int64_t i = 0; i < n; ++i) {
      if (row[i] < 0 || row[i] >= B_ || used[row[i]]) {
        refuse("row " + std::to_string(row[i]) + "; expected different ones in [0, " + std::to_string(B_) + ")");
      }
      used[row[i]] = true;
    }
  }

  const uint8_t* marks(const optional<Tensor>& seen) const {
    if (!seen.has_value()) return nullptr;
    if (seen->scalar_type() != at::kBool || seen->dim() != 2 || seen->size(0) != B_ || seen->size(1) != w_->V ||
        !seen->is_contiguous()) {
      refuse("seen does not fit; expected bool [" + std::to_string(B_) + ", " + std::to_string(w_->V) + "]");
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
  Memory<float> x_, q_, scale_, logits_;
  Memory<Word> inputs_, attended_, hidden_;
  std::vector<int64_t> drawn_;
  std::vector<Team::Running> jobs_;  // that other threads may still be in
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
      .def("prefill", &DecodeSession::prefill, py::arg("tokens"), py::arg("positions"), py::arg("rows"),
           py::arg("ends"), py::call_guard<py::gil_scoped_release>())
      .def("logits", &DecodeSession::logits);
});

}  // namespace
}  // namespace gpt_fast::decode
