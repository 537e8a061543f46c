// The entry points of cuBLAS and cuBLASLt whose results PyTorch reads. build.py writes stubs for the others.
#include <cublasLt.h>
#include <cublas_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "state.h"

namespace fakecuda {
namespace {

struct Handle {
  cudaStream_t stream = nullptr;
};

struct Layout {
  uint64_t rows, columns;
};

Layout* layout_in(void* place, uint64_t rows, uint64_t columns) { return new (place) Layout{rows, columns}; }

// Descriptors are opaque: as much memory as the largest of the real ones.
void* descriptor() { return calloc(1, 512); }

cublasStatus_t product(const char* name, const void* stream, long m, long n, long k) {
  char text[120];
  snprintf(text, sizeof text, "%s m=%ld n=%ld k=%ld", name, m, n, k);
  record("cublas", text, dim3(0, 0, 0), dim3(0, 0, 0), 0, stream);
  return CUBLAS_STATUS_SUCCESS;
}

const void* stream_in(const void* handle) { return static_cast<const Handle*>(handle)->stream; }

}  // namespace
}  // namespace fakecuda

using namespace fakecuda;  // NOLINT: every function below is cuBLAS's

FAKECUDA_EXPORT cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  *handle = reinterpret_cast<cublasHandle_t>(new Handle);
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  reinterpret_cast<Handle*>(handle)->stream = stream;
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasGetMathMode(cublasHandle_t, cublasMath_t* mode) {
  *mode = CUBLAS_DEFAULT_MATH;
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t, cublasPointerMode_t* mode) {
  *mode = CUBLAS_POINTER_MODE_HOST;
  return CUBLAS_STATUS_SUCCESS;
}

// The sizes of a product are recorded; the arguments after them are not read. cuBLAS declares these functions with all
// of their arguments, so each is defined under a name of ours.
#define FAKECUDA_PRODUCT(function)                                                                                \
  extern "C" __attribute__((visibility("default"))) int fakecuda_##function(void* handle, int, int, int m, int n, \
                                                                            int k, ...) __asm__(#function);       \
  int fakecuda_##function(void* handle, int, int, int m, int n, int k, ...) {                                     \
    return product(#function, stream_in(handle), m, n, k);                                                        \
  }
#undef cublasSgemm_v2
#undef cublasSgemmStridedBatched
FAKECUDA_PRODUCT(cublasGemmEx)
FAKECUDA_PRODUCT(cublasGemmStridedBatchedEx)
FAKECUDA_PRODUCT(cublasSgemmEx)
FAKECUDA_PRODUCT(cublasSgemm_v2)
FAKECUDA_PRODUCT(cublasSgemmStridedBatched)

// --- cuBLASLt

FAKECUDA_EXPORT size_t cublasLtGetVersion() { return 130000; }
FAKECUDA_EXPORT cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(new Handle);
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t, cudaDataType) {
  *made = static_cast<cublasLtMatmulDesc_t>(descriptor());
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t, size_t, cublasComputeType_t,
                                                               cudaDataType) {
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
  *made = static_cast<cublasLtMatmulPreference_t>(descriptor());
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t, size_t) {
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* made, cudaDataType, uint64_t rows,
                                                          uint64_t columns, int64_t) {
  *made = reinterpret_cast<cublasLtMatrixLayout_t>(layout_in(descriptor(), rows, columns));
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t, cudaDataType,
                                                                 uint64_t rows, uint64_t columns, int64_t) {
  layout_in(layout, rows, columns);
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                                              cublasLtMatmulPreference_t, int,
                                                              cublasLtMatmulHeuristicResult_t results[], int* count) {
  memset(results, 0, sizeof results[0]);
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}
FAKECUDA_EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*,
                                              cublasLtMatrixLayout_t a, const void*, cublasLtMatrixLayout_t,
                                              const void*, const void*, cublasLtMatrixLayout_t, void*,
                                              cublasLtMatrixLayout_t d, const cublasLtMatmulAlgo_t*, void*, size_t,
                                              cudaStream_t stream) {
  const auto* left = reinterpret_cast<const Layout*>(a);
  const auto* out = reinterpret_cast<const Layout*>(d);
  const uint64_t k = left->rows == out->rows ? left->columns : left->rows;
  return product("cublasLtMatmul", stream, long(out->rows), long(out->columns), long(k));
}

// --- cuDNN

// A version that PyTorch's attention does not take: cuDNN itself asks the driver for what the stand-in lacks.
FAKECUDA_EXPORT size_t cudnnGetVersion() { return 90000; }
