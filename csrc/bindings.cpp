// The Python module gpt_fast._C. Importing it loads this library, which runs the TORCH_LIBRARY_IMPL block at the end of
// each kernel file. gpt_fast/ops defines the schemas of these operators, before or after the import.

#include <ATen/cpu/vec/vec.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "bindings.h"

#ifndef _OPENMP
#error "gpt_fast._C needs OpenMP: at::parallel_for would run on one thread only"
#endif

namespace {

namespace py = pybind11;

py::dict build_info() {
  py::dict info;
  info["compiler"] = __VERSION__;
  info["cxx"] = static_cast<int64_t>(__cplusplus);
  info["openmp"] = static_cast<int64_t>(_OPENMP);
  info["torch"] = TORCH_VERSION;
  info["vector"] = C10_STRINGIZE(CPU_CAPABILITY);
  info["vector_bytes"] = static_cast<int64_t>(sizeof(at::vec::Vectorized<float>));
  return info;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ kernels of gpt_fast: importing this module registers them with PyTorch's dispatcher.";
  m.def("build_info", &build_info, "What this library was compiled with and for.");
  for (const auto bind : gpt_fast::Binding::all()) bind(m);
}
