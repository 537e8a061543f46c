// cuBLASLt stores matrices by columns, so it sees a matrix stored by rows as the transpose. Therefore it computes
// outᵀ [N, M] = b aᵀ: b is its operand A, and a is its operand B. cuBLASLt adds its bias to each column of outᵀ, which
// is a row of out. Its sum over columns is the sum over rows here.
#include "cublaslt.h"

#include <array>
#include <map>
#include <mutex>
#include <utility>

namespace gpt_fast {
namespace {

using Key = std::array<int64_t, 11>;  // everything that the choice of an algorithm depends on, except the device

struct Device {
  cublasLtHandle_t handle = nullptr;  // lives as long as the process
  std::map<Key, cublasLtMatmulAlgo_t> algorithms;
};

std::mutex devices_mutex;
std::map<int, Device>& devices() {
  static auto* const all = new std::map<int, Device>();  // never destroyed: threads may outlive main
  return *all;
}

cublasLtEpilogue_t epilogue_of(const Product& problem) {
  const bool bias = problem.bias != nullptr, aux = problem.aux != nullptr;
  switch (problem.epilogue) {
    case Epilogue::kNone:
      return bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
    case Epilogue::kRelu:
      if (aux) return bias ? CUBLASLT_EPILOGUE_RELU_AUX_BIAS : CUBLASLT_EPILOGUE_RELU_AUX;
      return bias ? CUBLASLT_EPILOGUE_RELU_BIAS : CUBLASLT_EPILOGUE_RELU;
    case Epilogue::kGelu:
      if (aux) return bias ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
      return bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    case Epilogue::kReluGradient:
      return bias ? CUBLASLT_EPILOGUE_DRELU_BGRAD : CUBLASLT_EPILOGUE_DRELU;
    case Epilogue::kGeluGradient:
      return bias ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_DGELU;
    case Epilogue::kSumA:
      if (!bias) return CUBLASLT_EPILOGUE_DEFAULT;
      return problem.out.transposed ? CUBLASLT_EPILOGUE_BGRADA : CUBLASLT_EPILOGUE_BGRADB;
  }
  return CUBLASLT_EPILOGUE_DEFAULT;
}

// Sequence of calls that stops at the first failure. Its status is that of the failed call, or success.
class Calls {
 public:
  template <class Function, class... Args>
  Calls& then(Function function, Args... args) {
    if (status_ == CUBLAS_STATUS_SUCCESS) status_ = function(args...);
    return *this;
  }
  cublasStatus_t status() const { return status_; }

 private:
  cublasStatus_t status_ = CUBLAS_STATUS_SUCCESS;
};

class Problem {
 public:
  explicit Problem(const Product& p) {
    Matrix first = p.b, second = p.a;
    int64_t rows = p.N, columns = p.M;
    if (p.out.transposed) {
      std::swap(first, second);
      std::swap(rows, columns);
    }
    // The first operand is stored by rows, [rows, K]. cuBLASLt sees it as [K, rows] and has to transpose it. The second
    // operand, [columns, K] by rows, is [K, columns] to cuBLASLt, as it should be.
    const int32_t first_op = first.transposed ? CUBLAS_OP_N : CUBLAS_OP_T;
    const int32_t second_op = second.transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    const uint32_t epilogue = epilogue_of(p);
    key_ = {p.type, epilogue, rows, columns, p.K, first_op, second_op, first.ld, second.ld, p.out.ld, p.ld_aux};

    calls_.then(cublasLtMatmulDescInit, &operation, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    set(CUBLASLT_MATMUL_DESC_TRANSA, first_op);
    set(CUBLASLT_MATMUL_DESC_TRANSB, second_op);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue);
    if (p.bias != nullptr) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    if (p.aux != nullptr) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.ld_aux);
    }
    describe(a, first, rows, p.K, first.transposed, p.type);
    describe(b, second, columns, p.K, second.transposed, p.type);
    describe(d, p.out, rows, columns, true, p.type);
    first_data = first.data;
    second_data = second.data;
  }

  cublasStatus_t choose(Device& device, cublasLtMatmulAlgo_t& algorithm) {
    if (calls_.status() != CUBLAS_STATUS_SUCCESS) return calls_.status();
    const auto known = device.algorithms.find(key_);
    if (known != device.algorithms.end()) {
      algorithm = known->second;
      return CUBLAS_STATUS_SUCCESS;
    }
    cublasLtMatmulPreferenceOpaque_t preference;
    calls_.then(cublasLtMatmulPreferenceInit, &preference);
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      calls_.then(cublasLtMatmulPreferenceSetAttribute, &preference, attribute, &value, sizeof(value));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kWorkspace));
    // If K is split, the partial sums must be float32 and added in their order.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      prefer(attribute, static_cast<uint32_t>(kAlignment));
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    calls_.then(cublasLtMatmulAlgoGetHeuristic, device.handle, &operation, &a, &b, &d, &d, &preference, 1, &result,
                &found);
    if (calls_.status() != CUBLAS_STATUS_SUCCESS) return calls_.status();
    if (found == 0) return CUBLAS_STATUS_NOT_SUPPORTED;
    if (result.state != CUBLAS_STATUS_SUCCESS) return result.state;
    algorithm = device.algorithms[key_] = result.algo;
    return CUBLAS_STATUS_SUCCESS;
  }

  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t a, b, d;
  const void *first_data, *second_data;

 private:
  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    calls_.then(cublasLtMatmulDescSetAttribute, &operation, attribute, &value, sizeof(value));
  }

  // Describes a matrix [rows, inner] that is stored by rows, or by columns if `by_columns`.
  void describe(cublasLtMatrixLayoutOpaque_t& layout, const Matrix& x, int64_t rows, int64_t inner, bool by_columns,
                cudaDataType type) {
    calls_.then(cublasLtMatrixLayoutInit, &layout, type, static_cast<uint64_t>(by_columns ? rows : inner),
                static_cast<uint64_t>(by_columns ? inner : rows), x.ld);
  }

  Calls calls_;
  Key key_;
};

}  // namespace

cublasStatus_t product(const Product& p, cudaStream_t stream) {
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess) return CUBLAS_STATUS_NOT_INITIALIZED;
  Problem problem(p);
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulAlgo_t algorithm;
  {
    const std::lock_guard<std::mutex> lock(devices_mutex);
    Device& device = devices()[index];
    if (device.handle == nullptr) {
      const cublasStatus_t status = cublasLtCreate(&device.handle);
      if (status != CUBLAS_STATUS_SUCCESS) return status;
    }
    const cublasStatus_t status = problem.choose(device, algorithm);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    handle = device.handle;
  }
  const float one = 1.0f, zero = 0.0f;
  return cublasLtMatmul(handle, &problem.operation, &one, problem.first_data, &problem.a, problem.second_data,
                        &problem.b, &zero, p.out.data, &problem.d, p.out.data, &problem.d, &algorithm, p.workspace,
                        kWorkspace, stream);
}

}  // namespace gpt_fast
