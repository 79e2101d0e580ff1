// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn on CUDA: checks and allocation (stable_utils.h), then what launchers.h declares.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../stable_utils.h"
#include "launchers.h"

namespace vitadapter::cuda {

cudaStream_t current_stream() {
  int device = 0;
  check(cudaGetDevice(&device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error, const char* file, const char* function, int line) {
  char* message = nullptr;
  torch_c10_cuda_check_msg(static_cast<int32_t>(error), file, function, static_cast<uint32_t>(line),
                           true, &message);
  if (message != nullptr) {
    const std::string text(message);
    torch_c10_cuda_free_error_msg(message);
    throw std::runtime_error(text);
  }
}

namespace {

struct Cuda {
  static int32_t type() { return aoti_torch_device_type_cuda(); }

  struct Guard {
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  template <typename value_t>
  using grad_t = acc_t<value_t>;
  static constexpr bool kAddsToGradient = true;

  template <typename value_t, typename Points>
  static void forward(const ForwardParams<value_t, Points>& params) {
    cuda::forward(params);
  }

  template <typename value_t, typename Points>
  static void backward(const BackwardParams<value_t, Points, acc_t<value_t>>& params,
                       bool deterministic, const Tensor& value) {
    std::vector<Tensor> kept;
    cuda::backward(params, deterministic, [&](int64_t bytes, const char* what) {
      kept.push_back(
          allocate(aoti_torch_aten_new_zeros, value, {bytes}, aoti_torch_dtype_uint8(), what));
      return kept.back().mutable_data_ptr();
    });
  }
};

}  // namespace
}  // namespace vitadapter::cuda

// What nvcc made the kernels for, as "sm_90,compute_90": for _extension.py, through ctypes.
#define VITADAPTER_TEXT(...) #__VA_ARGS__
#define VITADAPTER_TEXT_OF(...) VITADAPTER_TEXT(__VA_ARGS__)
extern "C" __attribute__((visibility("default"))) const char* vitadapter_ops_cuda_archs() {
#if defined(VITADAPTER_CUDA_ARCHS)
  return VITADAPTER_TEXT_OF(VITADAPTER_CUDA_ARCHS);
#else
  return "";
#endif
}

STABLE_TORCH_LIBRARY_IMPL(vitadapter_ops, CUDA, m) {
  using vitadapter::cuda::Cuda;
  m.impl("ms_deform_attn", TORCH_BOX(&vitadapter::launch_forward<Cuda>));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&vitadapter::launch_backward<Cuda>));
  m.impl("ms_deform_attn_deterministic_backward",
         TORCH_BOX((&vitadapter::launch_backward<Cuda, true>)));
  m.impl("ms_deform_attn_from_offsets", TORCH_BOX(&vitadapter::launch_forward_from_offsets<Cuda>));
  m.impl("ms_deform_attn_from_offsets_backward",
         TORCH_BOX(&vitadapter::launch_backward_from_offsets<Cuda>));
  m.impl("ms_deform_attn_from_offsets_deterministic_backward",
         TORCH_BOX((&vitadapter::launch_backward_from_offsets<Cuda, true>)));
}
