// Emulation of the functions of cuBLASLt that csrc/cuda/cublaslt.cpp calls, on the host's memory, as the header of
// cuBLASLt documents them: layouts by columns, operations, epilogues, and the conditions on alignment and leading
// dimensions, whose violation fails as in cuBLASLt. The bits of a mask lie in an unusual order, because callers must
// not depend on the order. This file includes the operators of csrc/cuda and registers them for CPU tensors, so that
// everything except cuBLASLt itself is tested without a GPU.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <vector>

namespace {

struct Layout {
  int64_t type;  // 64 bits leave no padding in the struct, so that layouts can be compared byte by byte
  uint64_t rows, columns;
  int64_t ld;
};

struct Operation {
  int32_t transa, transb;
  uint32_t epilogue;
  void *bias, *aux;
  int64_t ld_aux;
  cublasComputeType_t compute;
};

struct Preference {
  uint64_t workspace;
  uint32_t reduction, alignment;
};

static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t));
static_assert(sizeof(Operation) <= sizeof(cublasLtMatmulDescOpaque_t));
static_assert(sizeof(Preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t));

template <class T, class Opaque>
T& in(Opaque* opaque) {
  return *reinterpret_cast<T*>(opaque);
}

int64_t heuristics = 0;  // number of calls of cublasLtMatmulAlgoGetHeuristic

double load(const Layout& layout, const void* data, int64_t row, int64_t column) {
  const int64_t at = row + column * layout.ld;
  if (layout.type == CUDA_R_16F) return static_cast<const at::Half*>(data)[at];
  return static_cast<const at::BFloat16*>(data)[at];
}

void store(int64_t type, void* data, int64_t at, double value) {
  if (type == CUDA_R_16F)
    static_cast<at::Half*>(data)[at] = static_cast<float>(value);
  else
    static_cast<at::BFloat16*>(data)[at] = static_cast<float>(value);
}

double gelu(double z) { return 0.5 * z * (1 + std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z))); }

double gelu_slope(double z) {
  const double t = std::tanh(std::sqrt(2 / M_PI) * (z + 0.044715 * z * z * z));
  return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * z * z);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is(uint32_t epilogue, uint32_t bits) { return (epilogue & bits) == bits; }

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(1);
  return CUBLAS_STATUS_SUCCESS;
}

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED ? "not supported" : "invalid value";
}

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t operation, size_t, cublasComputeType_t compute,
                                               cudaDataType_t) {
  in<Operation>(operation) = {CUBLAS_OP_N, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, 0, compute};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t size) {
  Operation& o = in<Operation>(operation);
  const auto put = [&](auto& field) {
    if (size != sizeof(field)) return CUBLAS_STATUS_INVALID_VALUE;
    std::memcpy(&field, value, size);
    return CUBLAS_STATUS_SUCCESS;
  };
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return put(o.transa);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return put(o.transb);
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      return put(o.epilogue);
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      return put(o.bias);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      return put(o.aux);
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      return put(o.ld_aux);
    default:
      return CUBLAS_STATUS_INVALID_VALUE;
  }
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t, cudaDataType type,
                                                 uint64_t rows, uint64_t columns, int64_t ld) {
  in<Layout>(layout) = {type, rows, columns, ld};
  return ld >= static_cast<int64_t>(rows) ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference, size_t) {
  in<Preference>(preference) = {0, CUBLASLT_REDUCTION_SCHEME_MASK, 256};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t size) {
  Preference& p = in<Preference>(preference);
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && size == sizeof(uint64_t))
    std::memcpy(&p.workspace, value, size);
  else if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK && size == sizeof(uint32_t))
    std::memcpy(&p.reduction, value, size);
  else if (size == sizeof(uint32_t))
    std::memcpy(&p.alignment, value, size);
  else
    return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
  const Preference& p = in<Preference>(preference);
  ++heuristics;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  std::memcpy(&results[0].algo, &in<Layout>(a), sizeof(Layout));  // cublasLtMatmul refuses another layout's algorithm
  *found = p.alignment <= 16 && p.reduction == CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE && in<Layout>(b).rows > 0;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha,
                              const void* a_data, cublasLtMatrixLayout_t a_layout, const void* b_data,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void*, cublasLtMatrixLayout_t,
                              void* d_data, cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm,
                              void* workspace, size_t workspace_size, cudaStream_t) {
  const Operation& o = in<Operation>(operation);
  const Layout &a = in<Layout>(a_layout), &b = in<Layout>(b_layout), &d = in<Layout>(d_layout);
  const int64_t m = d.rows, n = d.columns, k = o.transa == CUBLAS_OP_T ? a.rows : a.columns;
  const uint32_t e = o.epilogue;
  const bool relu = is(e, CUBLASLT_EPILOGUE_RELU), drelu = is(e, CUBLASLT_EPILOGUE_DRELU);
  const bool is_gelu = is(e, CUBLASLT_EPILOGUE_GELU), dgelu = is(e, CUBLASLT_EPILOGUE_DGELU);
  const bool a_fits =
      o.transa == CUBLAS_OP_T ? static_cast<int64_t>(a.columns) == m : static_cast<int64_t>(a.rows) == m;
  const bool b_fits = o.transb == CUBLAS_OP_T
                          ? static_cast<int64_t>(b.rows) == n && static_cast<int64_t>(b.columns) == k
                          : static_cast<int64_t>(b.columns) == n && static_cast<int64_t>(b.rows) == k;
  bool valid = handle != nullptr && a_fits && b_fits && o.compute == CUBLAS_COMPUTE_32F && workspace_size > 0;
  valid = valid && *static_cast<const float*>(alpha) == 1.0f && *static_cast<const float*>(beta) == 0.0f;
  for (const void* pointer : {a_data, b_data, const_cast<const void*>(d_data), const_cast<const void*>(workspace),
                              const_cast<const void*>(o.bias), const_cast<const void*>(o.aux)})
    valid = valid && aligned(pointer);
  for (const Layout* layout : {&a, &b, &d}) valid = valid && layout->ld % 8 == 0;
  if (e & 128) valid = valid && o.aux != nullptr && o.ld_aux >= m && o.ld_aux % (relu || drelu ? 128 : 8) == 0;
  if (e & (CUBLASLT_EPILOGUE_BIAS | 16 | CUBLASLT_EPILOGUE_BGRADA | CUBLASLT_EPILOGUE_BGRADB))
    valid = valid && o.bias != nullptr;
  valid = valid && std::memcmp(algorithm, &a, sizeof(Layout)) == 0;
  if (!valid) return CUBLAS_STATUS_INVALID_VALUE;

  const auto at_a = [&](int64_t i, int64_t l) {
    return o.transa == CUBLAS_OP_T ? load(a, a_data, l, i) : load(a, a_data, i, l);
  };
  const auto at_b = [&](int64_t l, int64_t j) {
    return o.transb == CUBLAS_OP_T ? load(b, b_data, j, l) : load(b, b_data, l, j);
  };
  const Layout bias{d.type, d.rows, 1, m}, aux{d.type, d.rows, d.columns, o.ld_aux};
  auto* const bits = static_cast<uint8_t*>(o.aux);
  const auto bit = [&](int64_t i, int64_t j) { return j * o.ld_aux + (i ^ 5); };
  std::vector<double> sums(m);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      double value = 0;
      for (int64_t l = 0; l < k; ++l) value += at_a(i, l) * at_b(l, j);
      if (is(e, CUBLASLT_EPILOGUE_BIAS)) value += load(bias, o.bias, i, 0);
      if (relu) {
        const bool positive = value > 0;
        if (e & 128) {
          uint8_t& byte = bits[bit(i, j) / 8];
          const uint8_t one = 1u << bit(i, j) % 8;
          byte = positive ? byte | one : byte & ~one;
        }
        value = positive ? value : 0;
      } else if (is_gelu) {
        if (e & 128) store(d.type, o.aux, i + j * o.ld_aux, value);
        value = gelu(value);
      } else if (drelu) {
        value *= bits[bit(i, j) / 8] >> bit(i, j) % 8 & 1;
      } else if (dgelu) {
        value *= gelu_slope(load(aux, o.aux, i, j));
      }
      sums[i] += value;
      store(d.type, d_data, i + j * d.ld, value);
    }
  }
  if (is(e, 16))
    for (int64_t i = 0; i < m; ++i) store(d.type, o.bias, i, sums[i]);
  if (is(e, CUBLASLT_EPILOGUE_BGRADA) || is(e, CUBLASLT_EPILOGUE_BGRADB)) {
    const bool of_a = is(e, CUBLASLT_EPILOGUE_BGRADA);
    for (int64_t i = 0; i < (of_a ? m : n); ++i) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += of_a ? at_a(i, l) : at_b(l, i);
      store(d.type, o.bias, i, sum);
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

int64_t cublaslt_emulation_heuristics() { return heuristics; }
}

#define CUDA CPU                     // after all headers, this changes only the device of the registered operators
#include "../../csrc/cuda/bind.cpp"  // no other test compiles this file; the kernel that it calls is replaced below
#include "../../csrc/cuda/linear.cpp"
#include "../../csrc/cuda/mlp.cpp"

cudaError_t gpt_fast::decode_attention(const DecodeAttention&, cudaStream_t) { return cudaErrorNotSupported; }
