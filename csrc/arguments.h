// SPDX-License-Identifier: Apache-2.0
// The last line of checks, for whoever calls a raw operator: every tensor is dense, lies on the
// device of value and has the dtype and sizes that the kernels read, before a pointer is taken.
// An error names the argument, what was expected and what came; it is a ValueError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <string>

#include "fail.h"

namespace vitadapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string device_text(int32_t type, int32_t index) {
  std::string name = "device type " + std::to_string(type);
  if (type == aoti_torch_device_type_cpu()) return "cpu";
  if (type == aoti_torch_device_type_meta()) return "meta";
  if (type == aoti_torch_device_type_cuda()) name = "cuda";
  return name + ":" + std::to_string(index);
}

// A size that the checks leave to the caller.
constexpr int64_t kAnySize = -1;

// A tensor under the name that its caller knows, with what the checks ask of it: read once, because
// each question is a call into torch.
class Argument {
 public:
  // What decides for the others: `device_type` is that of the kernels.
  Argument(const char* name, const Tensor& tensor, int32_t device_type) : Argument(name, tensor) {
    if (device_type_ != device_type) {
      fail(name_, ": expected a tensor on ", device_text(device_type, 0), ", got one on ",
           device());
    }
  }
  // One beside `value`.
  Argument(const char* name, const Tensor& tensor, const Argument& value) : Argument(name, tensor) {
    if (device_type_ != value.device_type_ || device_index_ != value.device_index_) {
      fail(name_, ": expected device ", value.device(), " (from ", value.name_, "), got ",
           device());
    }
  }

  ScalarType dtype() const { return dtype_; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t d) const { return sizes_[d]; }

  // Raises unless the tensor has so many dimensions; `layout` says which.
  void expect_rank(int64_t rank, const char* layout) const {
    if (dim_ != rank) {
      fail(name_, ": expected ", rank, " dimensions ", layout, ", got ", sizes());
    }
  }
  // ... unless it has the sizes, which come `from` other arguments.
  void expect_sizes(std::initializer_list<int64_t> expected, const char* from) const {
    bool same = dim_ == static_cast<int64_t>(expected.size());
    const int64_t* size = sizes_;
    for (auto e = expected.begin(); same && e != expected.end(); ++e, ++size) {
      same = *e == kAnySize || *e == *size;
    }
    if (!same) {
      fail(name_, ": expected ", sizes_text(expected.begin(), expected.size()), " (from ", from,
           "), got ", sizes());
    }
  }
  // ... unless its dtype is one of those; `why` follows them in the text. They may repeat, and
  // ScalarType::Undefined is none.
  void expect_dtype(std::initializer_list<ScalarType> expected, const char* why = "") const {
    for (const ScalarType dtype : expected) {
      if (dtype_ == dtype) return;
    }
    std::string names;
    for (auto dtype = expected.begin(); dtype != expected.end(); ++dtype) {
      if (*dtype == ScalarType::Undefined) continue;
      if (std::find(expected.begin(), dtype, *dtype) != dtype) continue;
      names += (names.empty() ? "" : ", ") + dtype_text(*dtype);
    }
    fail(name_, ": expected dtype ", names, why, ", got ", dtype_text(dtype_));
  }

  std::string sizes() const { return sizes_text(sizes_, static_cast<size_t>(dim_)); }

 private:
  Argument(const char* name, const Tensor& tensor) : name_(name) {
    const AtenTensorHandle handle = tensor.get();
    int32_t layout = 0;
    bool defined = false;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_defined(handle, &defined));
    if (!defined) fail(name_, ": expected a tensor, got none");
    // A layout that the stable ABI does not know is an error there.
    if (aoti_torch_get_layout(handle, &layout) != TORCH_SUCCESS ||
        layout != aoti_torch_layout_strided()) {
      fail(name_, ": expected a dense tensor, got one with another layout than torch.strided");
    }
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device_type_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handle, &device_index_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(handle, &dim_));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(handle, &sizes_));
    dtype_ = tensor.scalar_type();
  }

  std::string device() const { return device_text(device_type_, device_index_); }

  static std::string sizes_text(const int64_t* sizes, size_t count) {
    std::string text = "[";
    for (size_t d = 0; d < count; ++d) {
      if (d > 0) text += ", ";
      text += sizes[d] == kAnySize ? "any" : std::to_string(sizes[d]);
    }
    return text + "]";
  }

  const char* name_;
  int32_t device_type_ = 0, device_index_ = 0;
  int64_t dim_ = 0;
  int64_t* sizes_ = nullptr;  // the tensor's own
  ScalarType dtype_;
};

}  // namespace vitadapter
