// The weights of a model as DecodeSession reads them. They are packed once and shared by any number of sessions and
// threads.
#pragma once

#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <vector>

#include "cpu/core/activations.h"
#include "cpu/core/common.h"
#include "cpu/decode/memory.h"
#include "cpu/decode/products.h"

namespace gpt_fast::decode {

using Parameters = std::map<std::string, at::Tensor>;

// Type of cached keys and values: float32 for float32 weights, else bfloat16, because int8 would lose too much
// precision.
template <class Format>
using Cache = std::conditional_t<std::is_same_v<Format, Float32>, float, at::BFloat16>;

// Precision in which weights are stored and multiplied.
enum class Storage { kFloat32, kBFloat16, kInt8, kInt8With16BitInputs };

// Calls body with a value of the format's type.
template <class Body>
auto with_format(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kFloat32:
      return body(Float32{});
    case Storage::kBFloat16:
      return body(BFloat16{});
    case Storage::kInt8:
      return body(Int8<8>{});
    default:
      return body(Int8<16>{});
  }
}

inline at::Tensor as_float(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

// A packed weight matrix and its bias.
struct Linear {
  at::Tensor data, scale, bias;
  int64_t N = 0, K = 0, words = 0;

  Linear() = default;
  Linear(Storage storage, const at::Tensor& weight, const at::Tensor& bias_or_none)
      : N(weight.size(0)), K(weight.size(1)) {
    if (bias_or_none.defined()) bias = as_float(bias_or_none);
    with_format(storage, [&](auto format) { pack<decltype(format)>(weight); });
  }

  template <class Format>
  Matrix<Format> matrix() const {
    return {data.const_data_ptr<Word>(), scale.defined() ? scale.const_data_ptr<float>() : nullptr,
            bias.defined() ? bias.const_data_ptr<float>() : nullptr, N, words};
  }

 private:
  template <class Format>
  void pack(const at::Tensor& weight) {
    words = ceil_div(K, Format::kPer);
    const Rows rows(weight);
    const int64_t panels = ceil_div(N, kVec);
    data = at::empty({panels, words, kVec}, at::TensorOptions().dtype(at::kInt));
    ask_for_huge_pages(data);
    Word* packed = data.mutable_data_ptr<Word>();
    if (Format::kScaled) scale = at::empty({N}, at::TensorOptions().dtype(at::kFloat));
    at::parallel_for(0, panels, 4, [&](int64_t begin, int64_t end) {
      const int64_t stride = round_up(words, kVec);
      std::vector<Word> panel(kVec * stride);
      std::vector<float> buffer(K), tile(kVec * kVec);
      for (int64_t p = begin; p < end; ++p) {
        std::fill(panel.begin(), panel.end(), 0);
        for (int64_t n = p * kVec; n < std::min(N, (p + 1) * kVec); ++n) {
          const float own = Format::pack(rows.read(n, buffer.data()), K, words, panel.data() + n % kVec * stride);
          if (Format::kScaled) scale.mutable_data_ptr<float>()[n] = own;
        }
        for (int64_t k = 0; k < words; k += kVec) {
          at::vec::transpose_mxn<float, kVec, kVec>(reinterpret_cast<const float*>(panel.data()) + k, stride,
                                                    tile.data(), kVec);
          std::memcpy(packed + (p * words + k) * kVec, tile.data(), std::min(kVec, words - k) * kVec * sizeof(Word));
        }
      }
    });
  }
};

struct Norm {
  at::Tensor weight, bias;

  const float* gain() const { return weight.defined() ? weight.const_data_ptr<float>() : nullptr; }
  const float* shift() const { return bias.defined() ? bias.const_data_ptr<float>() : nullptr; }
};

struct DecoderWeights {
  Linear qkv, out, fc, proj;
  Norm norm1, norm2;
};

class DecodeWeights {
 public:
  // `parameters` holds the parameters of a trunk by their names, and output_layer.weight and output_layer.bias.
  DecodeWeights(const Parameters& parameters, int64_t num_heads, const std::string& activation_name, bool is_pre_norm,
                double norm_eps, const std::string& weights)
      : storage(parse_storage(weights)),
        activation(read_activation(activation_name)),
        pre_norm(is_pre_norm),
        eps(norm_eps),
        H(num_heads),
        token_embedding(find(parameters, "token_emb.weight")),
        position_embedding(find(parameters, "pos_emb").squeeze(0)) {
    const auto note_copy = [&](const at::Tensor& stored, const std::string& name) {
      if (stored.defined() && stored.const_data_ptr() != find(parameters, name).const_data_ptr())
        copied.push_back(name);
    };
    const auto linear = [&](const std::string& weight, const std::string& bias) {
      Linear made(storage, find(parameters, weight), find(parameters, bias, true));
      note_copy(made.data, weight);
      note_copy(made.bias, bias);
      return made;
    };
    const auto norm = [&](const std::string& name) {
      Norm found;
      const at::Tensor gain = find(parameters, name + ".weight", true), shift = find(parameters, name + ".bias", true);
      if (gain.defined()) found.weight = as_float(gain);
      if (shift.defined()) found.bias = as_float(shift);
      note_copy(found.weight, name + ".weight");
      note_copy(found.bias, name + ".bias");
      return found;
    };
    for (int64_t i = 0; parameters.count("decoders." + std::to_string(i) + ".ff.0.weight") > 0; ++i) {
      const std::string prefix = "decoders." + std::to_string(i) + ".";
      blocks.push_back({linear(prefix + "multihead_attn.in_proj_weight", prefix + "multihead_attn.in_proj_bias"),
                        linear(prefix + "multihead_attn.out_proj.weight", prefix + "multihead_attn.out_proj.bias"),
                        linear(prefix + "ff.0.weight", prefix + "ff.0.bias"),
                        linear(prefix + "ff.3.weight", prefix + "ff.3.bias"), norm(prefix + "layer_norm1"),
                        norm(prefix + "layer_norm2")});
    }
    if (pre_norm) final_norm = norm("final_norm");
    output = linear("output_layer.weight", "output_layer.bias");
    C = output.K;
    V = output.N;
    F = blocks.empty() ? 0 : blocks[0].fc.N;
    T = position_embedding.size(0);
    if (H < 1 || C < 1 || V < 1 || C % H != 0 || token_embedding.size(0) != V || token_embedding.size(1) != C) {
      throw pybind11::value_error("gpt_fast.DecodeWeights: the parameters do not fit together: " + std::to_string(V) +
                                  " outputs of width " + std::to_string(C) + ", " +
                                  std::to_string(token_embedding.size(0)) + " tokens, " + std::to_string(H) + " heads");
    }
    for (const DecoderWeights& block : blocks) check_shapes(block);
  }

  // Returns the bytes of all matrices, which a step has to read. Biases and norms are not counted.
  int64_t bytes() const {
    int64_t sum = output.data.nbytes();
    for (const DecoderWeights& block : blocks) {
      sum += block.qkv.data.nbytes() + block.out.data.nbytes() + block.fc.data.nbytes() + block.proj.data.nbytes();
    }
    return sum;
  }

  Storage storage;  // format of the matrices
  Activation activation;
  bool pre_norm;
  double eps;
  int64_t C = 0, F = 0, H, V = 0, T = 0;  // width, MLP's width, heads, tokens, positions
  at::Tensor token_embedding, position_embedding;
  std::vector<DecoderWeights> blocks;
  Norm final_norm;
  Linear output;
  std::vector<std::string> copied;  // parameters that were copied: later writes into them have no effect

 private:
  // Validates the sizes of a block. Steps write into buffers of C and F numbers, so a block of other sizes would write
  // past their ends.
  void check_shapes(const DecoderWeights& block) const {
    const auto fits = [](const Linear& linear, int64_t N, int64_t K) {
      return linear.N == N && linear.K == K && (!linear.bias.defined() || linear.bias.numel() == N);
    };
    const auto norm_fits = [&](const Norm& norm) {
      return (!norm.weight.defined() || norm.weight.numel() == C) && (!norm.bias.defined() || norm.bias.numel() == C);
    };
    if (!fits(block.qkv, 3 * C, C) || !fits(block.out, C, C) || !fits(block.fc, F, C) || !fits(block.proj, C, F) ||
        !norm_fits(block.norm1) || !norm_fits(block.norm2)) {
      throw pybind11::value_error("gpt_fast.DecodeWeights: a block has other sizes than width " + std::to_string(C) +
                                  " and MLP width " + std::to_string(F) + " of the first one");
    }
  }

  static Storage parse_storage(const std::string& name) {
    if (name == "float32") return Storage::kFloat32;
    if (name == "bfloat16") return Storage::kBFloat16;
    if (name == "int8") return Storage::kInt8;
    if (name == "int8-a16") return Storage::kInt8With16BitInputs;
    throw pybind11::value_error("gpt_fast.DecodeWeights: weights is '" + name +
                                "'; expected one of float32, bfloat16, int8, int8-a16");
  }

  static Activation read_activation(const std::string& name) {
    const std::optional<Activation> activation = find_activation(name);
    if (!activation) throw pybind11::value_error("gpt_fast.DecodeWeights: " + unknown_activation(name));
    return *activation;
  }

  static at::Tensor find(const Parameters& parameters, const std::string& name, bool optional = false) {
    const auto found = parameters.find(name);
    if (found != parameters.end()) {
      const auto dtype = found->second.scalar_type();
      if (dtype != at::kFloat && dtype != at::kBFloat16 && dtype != at::kHalf) {
        throw pybind11::value_error("gpt_fast.DecodeWeights: " + name + " has dtype " + c10::toString(dtype) +
                                    "; expected float32, bfloat16 or float16");
      }
      return found->second.detach();
    }
    if (!optional) throw pybind11::value_error("gpt_fast.DecodeWeights: parameter " + name + " is missing");
    return {};
  }
};

}  // namespace gpt_fast::decode
