// gpt_fast._C.read_all: reads memory once with all threads. What it takes is the floor of everything that reads
// weights.
#include <omp.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"
#include "cpu/core/common.h"

namespace gpt_fast {
namespace {

constexpr int64_t kStreams = 4;  // one thread reads faster in a few places far apart than in one
constexpr int64_t kVectors = 2;  // of each stream at a time

// Adds up a float32 tensor; each thread reads a stretch of it.
double read_all(const at::Tensor& x) {
  if (x.scalar_type() != at::kFloat || !x.is_contiguous()) {
    throw pybind11::value_error("gpt_fast.read_all: wanted a contiguous float32 tensor");
  }
  constexpr int64_t STEP = kVectors * Vec::size();
  const float* data = x.const_data_ptr<float>();
  double total = 0.0;
#pragma omp parallel num_threads(at::get_num_threads()) reduction(+ : total)
  {
    const int64_t streams = kStreams * omp_get_num_threads(), n = x.numel() / streams / STEP * STEP;
    const float* stream = data + kStreams * omp_get_thread_num() * n;
    Vec sum[kStreams][kVectors];
    for (auto& row : sum) row[0] = row[1] = Vec(0.0f);
    for (int64_t i = 0; i < n; i += STEP) {
#pragma GCC unroll 4
      for (int64_t s = 0; s < kStreams; ++s) {
        sum[s][0] = sum[s][0] + Vec::loadu(stream + s * n + i);
        sum[s][1] = sum[s][1] + Vec::loadu(stream + s * n + i + Vec::size());
      }
    }
    for (const auto& row : sum)
      total += at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return a + b; }, row[0] + row[1]);
    if (omp_get_thread_num() == 0) {
      for (int64_t i = streams * n; i < x.numel(); ++i) total += data[i];
    }
  }
  return total;
}

const Binding binding([](pybind11::module_& m) {
  m.def("read_all", &read_all, pybind11::arg("x"), pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Reads a contiguous float32 tensor once with all threads, and returns its sum: the floor of a decode step.");
});

}  // namespace
}  // namespace gpt_fast
