// SPDX-License-Identifier: Apache-2.0
// New tensors, and what is said when there is no memory for them: as much as torch says, in the
// words that people's handlers look for. The stable ABI turns torch's exceptions into error codes;
// on a GPU vitadapter_ops/_memory.py makes torch's own class of error of the text.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>
#include <vector>

// The text of the calling thread's last exception; torch has it from 2.13 on.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace vitadapter {

using torch::stable::Tensor;

// `what`: needs the memory.
[[noreturn]] inline void fail_without_memory(int64_t bytes, const char* what) {
  throw std::runtime_error("DefaultCPUAllocator: can't allocate memory: you tried to allocate " +
                           std::to_string(bytes) + " bytes (for " + what + ")");
}

// After a call into torch that failed to allocate `bytes` beside a tensor.
[[noreturn]] inline void fail_as_torch(int64_t bytes, const char* what, const Tensor& beside) {
  if (torch_exception_get_what_without_backtrace != nullptr) {
    throw std::runtime_error(std::string(torch_exception_get_what_without_backtrace()) + " (for " +
                             what + ")");
  }
  if (!beside.is_cuda()) fail_without_memory(bytes, what);
  throw std::runtime_error("CUDA out of memory. Tried to allocate " + std::to_string(bytes) +
                           " bytes on cuda:" + std::to_string(beside.get_device_index()) +
                           " (for " + what + ")");
}

// What a tensor of these sizes takes; the largest number where none holds it.
inline int64_t bytes_of(const int64_t* sizes, size_t dim, int64_t element) {
  int64_t bytes = element;
  for (size_t d = 0; d < dim; ++d) {
    if (__builtin_mul_overflow(bytes, sizes[d], &bytes)) return INT64_MAX;
  }
  return bytes;
}

// Makes a call into torch that allocates `bytes` beside a tensor.
template <typename Call>
auto allocating(const Tensor& beside, int64_t bytes, const char* what, const Call& call) {
  try {
    return call();
  } catch (const std::runtime_error&) {
    fail_as_torch(bytes, what, beside);
  }
}

// aoti_torch_aten_new_empty or aoti_torch_aten_new_zeros. At a decoder's sizes a call is bound by
// the host: torch::stable::new_empty and new_zeros find their operators by name, at about a
// microsecond each; these do not.
using Allocator = decltype(aoti_torch_aten_new_empty);

inline Tensor allocate(Allocator& allocator, const Tensor& like, const std::vector<int64_t>& sizes,
                       int32_t dtype, const char* what) {
  int32_t layout = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  if (allocator(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, &layout,
                &device_type, device_index, nullptr, &made) != TORCH_SUCCESS) {
    const auto element = static_cast<int64_t>(aoti_torch_dtype_element_size(dtype));
    fail_as_torch(bytes_of(sizes.data(), sizes.size(), element), what, like);
  }
  return Tensor(made);
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline Tensor make_empty(const Tensor& like, const std::vector<int64_t>& sizes, const char* what) {
  return allocate(aoti_torch_aten_new_empty, like, sizes, dtype_code(like), what);
}

// As make_empty; torch::stable::contiguous is as slow as new_empty.
inline Tensor as_contiguous(const Tensor& t) {
  if (t.is_contiguous()) return t;
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  return allocating(t, bytes, "a contiguous copy", [&] { return torch::stable::contiguous(t); });
}

}  // namespace vitadapter
