// Building blocks of attention: register tiles of a matrix product, the packing of their operands, and dropout tiles.
//
// Queries are in the lanes of vectors. A panel of kPanel queries is multiplied as Sᵀ = K Qᵀ and Oᵀ = Vᵀ Pᵀ. Softmax
// statistics are then plain vectors, and keys and values are broadcast in their order in memory. Every operand consists
// of 32-bit words: one float, or two bfloat16 neighbours along the summed axis, which one instruction multiplies and
// adds. The layout "rows" pairs neighbours in a row, the layout "pairs" pairs elements of two rows. For floats both
// layouts are the plain row-major matrix.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/core/vector_math.h"
#include "cpu/core/words.h"
#include "philox.h"

namespace gpt_fast::attention {
namespace {

constexpr int64_t kPanel = 2 * kVec;                              // queries of a panel
constexpr int64_t kTileRows = kVec == 16 ? 8 : 4;                 // rows of a register tile, kPanel wide
constexpr int64_t kKeys = 64;                                     // keys of a block
constexpr int64_t kPanels = kPanel < kKeys ? kKeys / kPanel : 1;  // panels that backward processes together
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLog2E = 1.44269504088896341f;

// acc[r][lane] += sum over k of A(r, k) * b[k][lane], where A(r, k) is a[r * lda + k], or a[k * lda + r] if COLUMNS.
template <class Words, int NV, bool COLUMNS>
[[gnu::always_inline]] inline void multiply(Vec (&acc)[kTileRows][NV], const float* a, int64_t lda, const float* b,
                                            int64_t ldb, int64_t K) {
  for (int64_t k = 0; k < K; ++k) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) row[v] = in_register(Vec::loadu(b + k * ldb + v * kVec));
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vec x(COLUMNS ? a[k * lda + r] : a[r * lda + k]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) acc[r][v] = Words::multiply_add(x, row[v], acc[r][v]);
    }
  }
}

template <int NV>
[[gnu::always_inline]] inline void set_zero(Vec (&acc)[kTileRows][NV]) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec(0.0f);
  }
}

template <int NV>
[[gnu::always_inline]] inline void load_tile(Vec (&acc)[kTileRows][NV], const float* c, int64_t ldc) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec::loadu(c + r * ldc + v * kVec);
  }
}

template <int NV>
[[gnu::always_inline]] inline void store_tile(const Vec (&acc)[kTileRows][NV], float* c, int64_t ldc) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) acc[r][v].store(c + r * ldc + v * kVec);
  }
}

template <int NV>
[[gnu::always_inline]] inline void add_tile(const Vec (&acc)[kTileRows][NV], float* c, int64_t ldc) {
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) (Vec::loadu(c + r * ldc + v * kVec) + acc[r][v]).store(c + r * ldc + v * kVec);
  }
}

// A strided [B, H, T, D] tensor.
template <typename scalar_t>
struct View {
  scalar_t* data;
  int64_t stride_b, stride_h, stride_t, stride_d;

  explicit View(const at::Tensor& x)
      : data(const_cast<scalar_t*>(x.const_data_ptr<scalar_t>())),
        stride_b(x.stride(0)),
        stride_h(x.stride(1)),
        stride_t(x.stride(2)),
        stride_d(x.stride(3)) {}
  scalar_t* row(int64_t b, int64_t h, int64_t t) const { return data + b * stride_b + h * stride_h + t * stride_t; }
};

// Prefetches rows that will be packed soon into the second-level cache. They are too far apart for the CPU's own
// prefetching.
template <typename scalar_t>
inline void prefetch_rows(const View<scalar_t>& x, int64_t b, int64_t h, int64_t begin, int64_t end, int64_t D) {
  for (int64_t t = begin; t < end && x.stride_d == 1; ++t) {
    const char* row = reinterpret_cast<const char*>(x.row(b, h, t));
    for (int64_t byte = 0; byte < D * static_cast<int64_t>(sizeof(scalar_t)); byte += 64) {
      __builtin_prefetch(row + byte, 0, 2);
    }
  }
}

template <typename from_t, typename to_t>
inline void convert_row(const from_t* from, to_t* to, int64_t n) {
  if constexpr (std::is_same_v<from_t, to_t>) {
    std::memcpy(to, from, n * sizeof(to_t));
  } else {
    at::vec::convert(from, to, n);
  }
}

// Packs one row in the layout "rows": D elements, then zeros up to the padded size Dp.
template <class Words, typename scalar_t>
inline void pack_row(const scalar_t* row, int64_t stride, int64_t D, int64_t Dp, float* words) {
  if constexpr (Words::kPair == 2) {
    uint16_t* halves = reinterpret_cast<uint16_t*>(words);
    if (stride == 1) {
      std::memcpy(halves, row, D * sizeof(uint16_t));
    } else {
      for (int64_t d = 0; d < D; ++d) std::memcpy(halves + d, row + d * stride, sizeof(uint16_t));
    }
    std::memset(halves + D, 0, (Dp - D) * sizeof(uint16_t));
  } else {
    if (stride == 1) {
      convert_row(row, words, D);
    } else {
      for (int64_t d = 0; d < D; ++d) words[d] = static_cast<float>(row[d * stride]);
    }
    std::fill(words + D, words + Dp, 0.0f);
  }
}

// Converts [rows][width / 2] words that pair neighbours in a row to [rows / 2][width] words that pair two rows.
inline void pair_rows(const float* words, int64_t rows, int64_t width, float* pairs) {
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* first = reinterpret_cast<const uint16_t*>(words) + r * width;
    const uint16_t* second = first + width;
    uint32_t* out = reinterpret_cast<uint32_t*>(pairs) + r / 2 * width;
    for (int64_t d = 0; d < width; ++d) out[d] = first[d] | static_cast<uint32_t>(second[d]) << 16;
  }
}

// target [columns][rows] = transpose of source [rows][columns].
inline void transpose(const float* source, int64_t ld_source, int64_t rows, int64_t columns, float* target,
                      int64_t ld_target) {
  for (int64_t r = 0; r < rows; r += kVec) {
    for (int64_t c = 0; c < columns; c += kVec) {
      at::vec::transpose_mxn<float>(source + r * ld_source + c, ld_source, target + c * ld_target + r, ld_target,
                                    static_cast<int>(std::min(kVec, rows - r)),
                                    static_cast<int>(std::min(kVec, columns - c)));
    }
  }
}

// Round two vectors to words of two bfloat16. pair_neighbours pairs neighbours of the sequence low, high. pair_vectors
// pairs lane i of `first` with lane i of `second`.
#if GPT_FAST_BF16_WORDS
inline __m512 pair_neighbours(Vec low, Vec high) {
  return _mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(high, low));
}

inline __m512 pair_vectors(Vec first, Vec second) {
  const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
  const __m512i b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
  return _mm512_castsi512_ps(_mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
}
#endif

// Philox words at the eight counters (c0, c1 + g, b, site), g = 0 to 7.
struct PhiloxColumn {
#if defined(CPU_CAPABILITY_AVX512)
  // 64-bit lanes whose upper halves hold garbage: the multiplication reads lower halves only.
  __m512i x0, x1, x2, x3;

  PhiloxColumn(uint32_t c0, uint32_t c1, uint32_t b, uint32_t site, PhiloxKey key)
      : x0(_mm512_set1_epi64(c0)),
        x1(_mm512_add_epi64(_mm512_set1_epi64(c1), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0))),
        x2(_mm512_set1_epi64(b)),
        x3(_mm512_set1_epi64(site)) {
    const __m512i m0 = _mm512_set1_epi64(0xD2511F53), m1 = _mm512_set1_epi64(0xCD9E8D57);
#pragma GCC unroll 7
    for (int round = 0; round < kPhiloxRounds; ++round) {
      const __m512i p0 = _mm512_mul_epu32(x0, m0), p1 = _mm512_mul_epu32(x2, m1);
      x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1, _mm512_set1_epi64(key.k0), 0x96);  // three-way xor
      x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3, _mm512_set1_epi64(key.k1), 0x96);
      x1 = p1;
      x3 = p0;
      key.k0 += 0x9E3779B9u;
      key.k1 += 0xBB67AE85u;
    }
  }

  // Writes the dropout factors of two neighbouring keys, even[0..16) and odd[0..16), for sixteen queries. j3 is bit 3
  // of the keys.
  void factors(int j3, const Dropout& dropout, float* even, float* odd) const {
    const __m512i lower_halves = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i words =
        j3 == 0 ? _mm512_permutex2var_epi32(x0, lower_halves, x2) : _mm512_permutex2var_epi32(x1, lower_halves, x3);
    const __m512i threshold = _mm512_set1_epi32(static_cast<int>(dropout.threshold));
    const __m512 scale = _mm512_set1_ps(dropout.scale);
    const __m512i low = _mm512_and_si512(words, _mm512_set1_epi32(0xffff)), high = _mm512_srli_epi32(words, 16);
    _mm512_storeu_ps(even, _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(low, threshold), scale));
    _mm512_storeu_ps(odd, _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(high, threshold), scale));
  }
#elif defined(CPU_CAPABILITY_AVX2)
  PhiloxEight<Along::kC1> x;

  PhiloxColumn(uint32_t c0, uint32_t c1, uint32_t b, uint32_t site, PhiloxKey key) : x(c0, c1, b, site, key) {}

  void factors(int j3, const Dropout& dropout, float* even, float* odd) const {
    const __m256i below = _mm256_set1_epi32(static_cast<int>(dropout.threshold) - 1);
    const __m256i scale = _mm256_castps_si256(_mm256_set1_ps(dropout.scale));
    for (int i3 = 0; i3 < 2; ++i3) {
      const __m256i words = x.words(2 * i3 + j3);
      const auto put = [&](__m256i bits, float* out) {
        const __m256i chosen = _mm256_and_si256(_mm256_cmpgt_epi32(bits, below), scale);
        _mm256_storeu_ps(out + 8 * i3, _mm256_castsi256_ps(chosen));
      };
      put(_mm256_and_si256(words, _mm256_set1_epi32(0xffff)), even);
      put(_mm256_srli_epi32(words, 16), odd);
    }
  }
#else
  uint32_t x[4][8];

  PhiloxColumn(uint32_t c0, uint32_t c1, uint32_t b, uint32_t site, PhiloxKey key) {
    for (int g = 0; g < 8; ++g) {
      x[0][g] = c0;
      x[1][g] = c1 + static_cast<uint32_t>(g);
      x[2][g] = b;
      x[3][g] = site;
    }
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int g = 0; g < 8; ++g) {
        const uint64_t p0 = static_cast<uint64_t>(x[0][g]) * 0xD2511F53u;
        const uint64_t p1 = static_cast<uint64_t>(x[2][g]) * 0xCD9E8D57u;
        x[0][g] = static_cast<uint32_t>(p1 >> 32) ^ x[1][g] ^ key.k0;
        x[2][g] = static_cast<uint32_t>(p0 >> 32) ^ x[3][g] ^ key.k1;
        x[1][g] = static_cast<uint32_t>(p1);
        x[3][g] = static_cast<uint32_t>(p0);
      }
      key.k0 += 0x9E3779B9u;
      key.k1 += 0xBB67AE85u;
    }
  }

  void factors(int j3, const Dropout& dropout, float* even, float* odd) const {
    for (int i3 = 0; i3 < 2; ++i3) {
      const uint32_t* words = x[2 * i3 + j3];
      for (int g = 0; g < 8; ++g) {
        even[8 * i3 + g] = (words[g] & 0xffff) >= dropout.threshold ? dropout.scale : 0.0f;
        odd[8 * i3 + g] = (words[g] >> 16) >= dropout.threshold ? dropout.scale : 0.0f;
      }
    }
  }
#endif
};

// Writes factors[j - j0][lane]: 0 if query i0 + lane drops key j, else the dropout scale. The range of keys, j0 + begin
// to j0 + end, is rounded out to multiples of 16. i0 and j0 must be multiples of 16, because one counter serves keys j,
// j + 1, j + 8 and j + 9 of queries i and i + 8.
inline void dropout_tile(const Dropout& dropout, int64_t b, int64_t i0, int64_t j0, int64_t begin, int64_t end,
                         float* factors) {
  for (int64_t J = begin / 16; J * 16 < end; ++J) {
    for (int64_t t = 0; t < 4; ++t) {
      for (int64_t I = 0; I < kPanel / 16; ++I) {
        const PhiloxColumn column(static_cast<uint32_t>((j0 / 16 + J) * 4 + t),
                                  static_cast<uint32_t>((i0 / 16 + I) * 8), static_cast<uint32_t>(b), dropout.site,
                                  dropout.key);
        for (int j3 = 0; j3 < 2; ++j3) {
          float* even = factors + (J * 16 + j3 * 8 + t * 2) * kPanel + I * 16;
          column.factors(j3, dropout, even, even + kPanel);
        }
      }
    }
  }
}

}  // namespace
}  // namespace gpt_fast::attention
