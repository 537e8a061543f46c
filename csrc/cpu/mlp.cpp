// mlp on CPU: the hidden activation is computed, differentiated and consumed in blocks of columns that stay in cache.
//
// Forward: z = x W1' + b1, h = dropout(act(z)), y = h W2' + b2. Each block of z becomes h while in cache, and h is
// packed as the left operand of the second product. Backward gets h for relu, and z for the other activations.
//
// Backward: dh = dy W2, dz = dropout(dh) act'(z), dW1 = dz' x, db1 = sum of dz, dW2 = dy' h, db2 = sum of dy,
// dx = dz W1. A task computes a block of dz and h, and from them both weights' gradients for its columns. Only dz is
// stored, packed for dx. Rows are processed in chunks of kChunk. The weight gradients of the chunks add up in float32,
// in the order of the rows.
#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/core/activations.h"
#include "cpu/core/common.h"
#include "cpu/core/linear.h"

namespace gpt_fast {
namespace {

Activation read_activation(c10::string_view name) {
  const optional<Activation> activation = find_activation({name.data(), name.size()});
  TORCH_CHECK_VALUE(activation.has_value(), "gpt_fast.mlp: ", unknown_activation({name.data(), name.size()}));
  return *activation;
}

// Calls row(i, bits) for the rows of a chunk. Rows i and i + 8 come one after the other, because one call of the
// generator gives the bits of both. `first` is the chunk's first row in the matrix, a multiple of 16. Without dropout
// the order is the same and `bits` is null.
template <class Row>
void for_rows(const optional<Dropout>& dropout, int64_t first, int64_t rows, int64_t column, const Row& row) {
  alignas(64) uint16_t upper[kBlock], lower[kBlock];
  for (int64_t group = 0; group < rows; group += 16) {
    for (int64_t i = group; i < std::min(group + 8, rows); ++i) {
      if (dropout.has_value()) dropout->row_pair(0, first + i, column, kBlock / 64, upper, lower);
      row(i, dropout.has_value() ? upper : nullptr);
      if (i + 8 < rows) row(i + 8, dropout.has_value() ? lower : nullptr);
    }
  }
}

// Prefetches a row's part of a block: rows are too far apart for the processor to foresee the next one.
template <typename scalar_t>
inline void prefetch_block(const scalar_t* row) {
  for (int64_t j = 0; j < kBlock; j += 64 / static_cast<int64_t>(sizeof(scalar_t))) __builtin_prefetch(row + j);
}

// Dropout mask of a row of a block, from 16 random bits for each element: 1 if the element is kept, else 0.
struct Keep {
  alignas(64) float kept[kBlock];
  Keep(const uint16_t* bits, uint32_t threshold) {
    for (int64_t j = 0; j < kBlock; ++j) kept[j] = bits[j] >= threshold ? 1.0f : 0.0f;
  }
  Vec apply(Vec value, int64_t j) const { return Vec::blendv(Vec(0.0f), value, Vec::loadu(kept + j) != Vec(0.0f)); }
};

template <typename scalar_t, Activation ACTIVATION>
void forward_chunk(const Tensor& x, const Tensor& fc_weight, const float* fc_bias, const Tensor& proj_weight,
                   const float* proj_bias, const optional<Dropout>& dropout, int64_t first, const Tensor& y,
                   scalar_t* hidden) {
  const int64_t M = x.size(0), C = x.size(1), F = fc_weight.size(0);
  const PackedRows<scalar_t> packed_x(rows_of<scalar_t>(x), M, C);
  const PackedRows<scalar_t> packed_h(M, F);
  const Operand<scalar_t> weight = rows_of<scalar_t>(fc_weight);
  parallel_for(0, ceil_div(F, kBlock), 1, [&](int64_t begin, int64_t end) {
    const BlockProduct product;
    const Buffer z(M * kBlock);
    const RoundedBlock<scalar_t> h(M);
    for (int64_t column = begin * kBlock; column < std::min(F, end * kBlock); column += kBlock) {
      const int64_t width = std::min(kBlock, F - column);
      product(packed_x, 0, M, weight.from(column, 0), width, C, z.data());
      for_rows(dropout, first, M, column, [&](int64_t i, const uint16_t* bits) {
        float* row = z.data() + i * kBlock;
        for (int64_t j = 0; j < kBlock; j += kVec) {
          (Vec::loadu(row + j) + Vec::loadu(fc_bias + column + j)).store(row + j);
        }
        if (ACTIVATION != Activation::kRelu && hidden != nullptr) round_row(row, hidden + i * F + column, width);
        for (int64_t j = 0; j < kBlock; j += kVec) {
          activate<ACTIVATION>(Vec::loadu(row + j)).value.store(row + j);
        }
        if (bits != nullptr) {
          const Keep keep(bits, dropout->threshold);
          for (int64_t j = 0; j < kBlock; j += kVec) {
            keep.apply(Vec::loadu(row + j) * Vec(dropout->scale), j).store(row + j);
          }
        }
        round_row(row, h.row(i), kBlock);
        if (ACTIVATION == Activation::kRelu && hidden != nullptr) {
          std::memcpy(hidden + i * F + column, h.row(i), width * sizeof(scalar_t));
        }
      });
      pack<kRows>(Operand<scalar_t>{h.row(0), kBlock, 1}, M, width,
                  packed_h.data() + column / WordsOf<scalar_t>::kPair * kRows, packed_h.stride);
    }
  });
  multiply_into(packed_h, rows_of<scalar_t>(proj_weight), proj_weight.size(0), F, proj_bias,
                y.mutable_data_ptr<scalar_t>(), y.stride(0));
}

struct BackwardInputs {
  Tensor dy, x, fc_weight, proj_weight;
  const float* fc_bias;
  const void* hidden;  // null: recompute it
};

struct BackwardOutputs {
  bool needs_x;
  Tensor dx;
  WeightGradient fc_weight, proj_weight;
  float *fc_bias, *proj_bias;  // null: not needed
};

template <typename scalar_t, Activation ACTIVATION>
void backward_chunk(const BackwardInputs& in, const optional<Dropout>& dropout, int64_t first,
                    const BackwardOutputs& out) {
  constexpr int64_t PAIR = WordsOf<scalar_t>::kPair;
  const int64_t M = in.x.size(0), C = in.x.size(1), F = in.fc_weight.size(0), C_out = in.proj_weight.size(0);
  const bool accumulate = first > 0;
  const bool needs_dz = out.needs_x || out.fc_weight.needed || out.fc_bias != nullptr;
  const bool recomputes = in.hidden == nullptr && (needs_dz || out.proj_weight.needed);
  using Packed = optional<PackedRows<scalar_t>>;
  Packed packed_dy, packed_dy_t, packed_x, packed_x_t, packed_dz;
  if (needs_dz) packed_dy.emplace(rows_of<scalar_t>(in.dy), M, C_out);
  if (out.proj_weight.needed) packed_dy_t.emplace(columns_of<scalar_t>(in.dy), C_out, M);
  if (recomputes) packed_x.emplace(rows_of<scalar_t>(in.x), M, C);
  if (out.fc_weight.needed) packed_x_t.emplace(columns_of<scalar_t>(in.x), C, M);
  if (out.needs_x) packed_dz.emplace(M, F);
  const Operand<scalar_t> fc = rows_of<scalar_t>(in.fc_weight), proj = columns_of<scalar_t>(in.proj_weight);
  const scalar_t* hidden = static_cast<const scalar_t*>(in.hidden);
  const float scale = dropout.has_value() ? dropout->scale : 1.0f;

  if (needs_dz || out.proj_weight.needed) {
    parallel_for(0, ceil_div(F, kBlock), 1, [&](int64_t begin, int64_t end) {
      const BlockProduct product;
      const Buffer z(M * kBlock), dz(M * kBlock), gradient(round_up(std::max(C, C_out), kVec) * kBlock);
      const Buffer panels(depth<scalar_t>(M) * kBlock);
      const RoundedBlock<scalar_t> h_rounded(M), dz_rounded(M);
      for (int64_t column = begin * kBlock; column < std::min(F, end * kBlock); column += kBlock) {
        const int64_t width = std::min(kBlock, F - column);
        if (recomputes) {
          product(*packed_x, 0, M, fc.from(column, 0), width, C, z.data());
        }
        if (needs_dz) {
          product(*packed_dy, 0, M, proj.from(column, 0), width, C_out, dz.data());
        }
        float bias_sums[kBlock] = {};
        for_rows(ACTIVATION == Activation::kRelu && !recomputes ? optional<Dropout>() : dropout, first, M, column,
                 [&](int64_t i, const uint16_t* bits) {
                   float* z_row = z.data() + i * kBlock;
                   float* dz_row = dz.data() + i * kBlock;
                   scalar_t* h_row = h_rounded.row(i);
                   alignas(64) scalar_t saved[kBlock];
                   if (recomputes) {
                     for (int64_t j = 0; j < kBlock; j += kVec) {
                       (Vec::loadu(z_row + j) + Vec::loadu(in.fc_bias + column + j)).store(z_row + j);
                     }
                     if (ACTIVATION != Activation::kRelu) {
                       // Round z as forward rounds the z that it keeps, so that recomputing changes no bit.
                       round_row(z_row, saved, kBlock);
                       widen<kBlock>(saved, z_row);
                     }
                   } else {
                     const scalar_t* kept = hidden + i * F + column;
                     if (i + 16 < M) prefetch_block(kept + 16 * F);
                     if (width < kBlock) {
                       std::fill(std::copy_n(kept, width, saved), saved + kBlock, scalar_t(0));
                       kept = saved;
                     }
                     widen<kBlock>(kept, z_row);
                   }
                   alignas(64) float h_values[kBlock];
                   const bool is_h = ACTIVATION == Activation::kRelu && !recomputes;  // z_row holds h itself
                   for (int64_t j = 0; j < kBlock; j += kVec) {
                     const ValueAndSlope at_z = activate<ACTIVATION>(Vec::loadu(z_row + j));
                     (is_h ? Vec::loadu(z_row + j) : at_z.value * Vec(scale)).store(h_values + j);
                     if (needs_dz) {
                       const Vec dh = Vec::loadu(dz_row + j) * Vec(scale);
                       // Select, do not multiply by 0: where relu is 0, an infinite dh passes nothing, as in PyTorch.
                       const Vec dz_of_relu = Vec::blendv(dh, Vec(0.0f), at_z.slope == Vec(0.0f));
                       (ACTIVATION == Activation::kRelu ? dz_of_relu : dh * at_z.slope).store(dz_row + j);
                     }
                   }
                   if (bits != nullptr) {
                     const Keep keep(bits, dropout->threshold);
                     for (int64_t j = 0; j < kBlock; j += kVec) {
                       keep.apply(Vec::loadu(h_values + j), j).store(h_values + j);
                       if (needs_dz) keep.apply(Vec::loadu(dz_row + j), j).store(dz_row + j);
                     }
                   }
                   round_row(h_values, h_row, kBlock);
                   if (needs_dz) {
                     add_to_column_sums(dz_row, bias_sums);
                     round_row(dz_row, dz_rounded.row(i), kBlock);
                   }
                 });
        const int64_t stride_b = depth<scalar_t>(M) * kColumns, count = ceil_div(width, kColumns);
        // gradient [a.rows, kBlock] = A' block. A' is packed with the rows of the chunk as its k.
        const auto multiply_by_block = [&](const PackedRows<scalar_t>& a, const RoundedBlock<scalar_t>& block) {
          pack<kColumns>(Operand<scalar_t>{block.row(0), 1, kBlock}, width, M, panels.data(), stride_b);
          multiply<WordsOf<scalar_t>>(a.rows, count, depth<scalar_t>(M), a.data(), a.stride, panels.data(), stride_b,
                                      gradient.data(), kBlock, false);
        };
        if (out.proj_weight.needed) {
          multiply_by_block(*packed_dy_t, h_rounded);
          out.proj_weight.template add<scalar_t>(gradient.data(), C_out, width, out.proj_weight.stride(0),
                                                 out.proj_weight.stride(1), 0, column, accumulate);
        }
        if (out.fc_weight.needed) {
          multiply_by_block(*packed_x_t, dz_rounded);
          out.fc_weight.template add<scalar_t>(gradient.data(), C, width, out.fc_weight.stride(1),
                                               out.fc_weight.stride(0), 0, column, accumulate);
        }
        if (out.fc_bias != nullptr) {
          for (int64_t j = 0; j < width; ++j) out.fc_bias[column + j] += bias_sums[j];
        }
        if (out.needs_x) {
          pack<kRows>(Operand<scalar_t>{dz_rounded.row(0), kBlock, 1}, M, width,
                      packed_dz->data() + column / PAIR * kRows, packed_dz->stride);
        }
      }
    });
  }
  if (out.needs_x) {
    multiply_into(*packed_dz, columns_of<scalar_t>(in.fc_weight), C, F, nullptr, out.dx.mutable_data_ptr<scalar_t>(),
                  out.dx.stride(0));
  }
  if (out.proj_bias != nullptr) add_column_sums<scalar_t>(in.dy, out.proj_bias);
}

std::tuple<Tensor, Tensor> mlp_forward(const Tensor& x, const Tensor& fc_weight, const optional<Tensor>& fc_bias,
                                       const Tensor& proj_weight, const optional<Tensor>& proj_bias,
                                       c10::string_view activation_name, double dropout_p, const optional<Tensor>& seed,
                                       int64_t site, bool keeps_hidden) {
  const Activation activation = read_activation(activation_name);
  const int64_t F = fc_weight.size(0), C_out = proj_weight.size(0);
  const Tensor y = at::empty(with_last(x, C_out), x.options());
  const Tensor hidden = at::empty(keeps_hidden ? with_last(x, F) : std::vector<int64_t>{0}, x.options());
  const Tensor rows = as_rows(x), y_rows = y.view({rows.size(0), C_out});
  const int64_t M = rows.size(0);
  const optional<Dropout> dropout = make_dropout("mlp", dropout_p, seed, site);
  const Tensor fc_shift = padded_parameter(fc_bias, F), proj_shift = padded_parameter(proj_bias, C_out);
  GPT_FAST_DISPATCH(x.scalar_type(), "gpt_fast::mlp_forward", [&] {
    with_activation(activation, [&](auto constant) {
      for (int64_t first = 0; first < M; first += kChunk) {
        const int64_t count = std::min(kChunk, M - first);
        forward_chunk<scalar_t, decltype(constant)::value>(
            rows.narrow(0, first, count), fc_weight, fc_shift.const_data_ptr<float>(), proj_weight,
            proj_shift.const_data_ptr<float>(), dropout, first, y_rows.narrow(0, first, count),
            keeps_hidden ? hidden.mutable_data_ptr<scalar_t>() + first * F : nullptr);
      }
    });
  });
  return {y, hidden};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mlp_backward(
    const Tensor& dy, const Tensor& x, const Tensor& fc_weight, const optional<Tensor>& fc_bias,
    const Tensor& proj_weight, const optional<Tensor>& hidden, c10::string_view activation_name, double dropout_p,
    const optional<Tensor>& seed, int64_t site, std::array<bool, 5> needs) {
  const Activation activation = read_activation(activation_name);
  const auto [needs_x, needs_fc_weight, needs_fc_bias, needs_proj_weight, needs_proj_bias] = needs;
  const int64_t F = fc_weight.size(0), C_out = proj_weight.size(0);
  const Tensor nothing = at::empty({0}, x.options());
  const Tensor dx = needs_x ? at::empty(x.sizes(), x.options()) : nothing;
  const Tensor dfc_weight = needs_fc_weight ? at::empty_like(fc_weight) : nothing;
  const Tensor dproj_weight = needs_proj_weight ? at::empty_like(proj_weight) : nothing;
  const auto sums = x.options().dtype(at::kFloat);
  const Tensor dfc_bias = at::zeros({needs_fc_bias ? F : 0}, sums);
  const Tensor dproj_bias = at::zeros({needs_proj_bias ? C_out : 0}, sums);
  const Tensor rows = as_rows(x), dy_rows = as_rows(dy);
  const int64_t M = rows.size(0), chunks = ceil_div(M, kChunk);
  if (M == 0) {
    dfc_weight.zero_();
    dproj_weight.zero_();
  }
  const optional<Dropout> dropout = make_dropout("mlp", dropout_p, seed, site);
  const Tensor fc_shift = padded_parameter(fc_bias, F);
  BackwardOutputs out{needs_x,
                      dx,
                      WeightGradient(dfc_weight, needs_fc_weight, chunks),
                      WeightGradient(dproj_weight, needs_proj_weight, chunks),
                      needs_fc_bias ? dfc_bias.mutable_data_ptr<float>() : nullptr,
                      needs_proj_bias ? dproj_bias.mutable_data_ptr<float>() : nullptr};
  const Tensor dx_rows = needs_x ? dx.view(rows.sizes()) : dx;
  GPT_FAST_DISPATCH(x.scalar_type(), "gpt_fast::mlp_backward", [&] {
    with_activation(activation, [&](auto constant) {
      for (int64_t first = 0; first < M; first += kChunk) {
        const int64_t count = std::min(kChunk, M - first);
        if (needs_x) out.dx = dx_rows.narrow(0, first, count);
        const BackwardInputs in{dy_rows.narrow(0, first, count),
                                rows.narrow(0, first, count),
                                fc_weight,
                                proj_weight,
                                fc_shift.const_data_ptr<float>(),
                                hidden.has_value() ? hidden->const_data_ptr<scalar_t>() + first * F : nullptr};
        backward_chunk<scalar_t, decltype(constant)::value>(in, dropout, first, out);
      }
    });
  });
  out.fc_weight.finish();
  out.proj_weight.finish();
  return {dx, dfc_weight, dfc_bias.to(x.scalar_type()), dproj_weight, dproj_bias.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(gpt_fast, CPU, m) {
  m.impl("mlp_forward", mlp_forward);
  m.impl("mlp_backward", mlp_backward);
}

}  // namespace gpt_fast
