// Memory that grows, on huge pages where the system gives them.
#pragma once

#include <cstdint>

#include "cpu/core/common.h"

namespace gpt_fast::decode {

// Memory for 32-bit values, aligned to 64 bytes. Growing it loses its contents.
template <typename T>
class Memory {
  static_assert(sizeof(T) == sizeof(float));

 public:
  void reserve(int64_t size) {
    if (size <= size_) return;
    memory_ = at::empty({size}, at::TensorOptions().dtype(at::kFloat));
    ask_for_huge_pages(memory_);
    size_ = size;
  }
  T* data() { return static_cast<T*>(size_ == 0 ? nullptr : memory_.mutable_data_ptr()); }
  const T* data() const { return static_cast<const T*>(size_ == 0 ? nullptr : memory_.const_data_ptr()); }
  int64_t size() const { return size_; }

 private:
  at::Tensor memory_;
  int64_t size_ = 0;
};

}  // namespace gpt_fast::decode
