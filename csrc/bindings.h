// Registry of functions that other files add to the Python module gpt_fast._C. A file adds its functions with a static
// object, as TORCH_LIBRARY_IMPL adds kernels:
//
//   static const Binding binding([](pybind11::module_& m) { ... });
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

namespace gpt_fast {

class Binding {
 public:
  using Function = void (*)(pybind11::module_&);
  explicit Binding(Function bind) { all().push_back(bind); }
  static std::vector<Function>& all() {
    static std::vector<Function> bindings;
    return bindings;
  }
};

}  // namespace gpt_fast
