// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn on CUDA: checks and allocation (stable_utils.h), then one launch.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../stable_utils.h"
#include "launch.cuh"

namespace vitadapter::cuda {
namespace {

cudaStream_t current_stream() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Enough blocks for `total` threads; kernels stride over what exceeds the grid's limit. The caller
// has set the device and knows that there is work: a grid of 0 blocks is an error.
template <typename Params>
void launch(void (*kernel)(Params), int64_t total, const LaunchShape& shape, const Params& params) {
  const int64_t blocks = std::min<int64_t>((total + shape.threads - 1) / shape.threads, 0x7fffffff);
  kernel<<<static_cast<unsigned>(blocks), shape.threads, static_cast<size_t>(shape.bytes),
           current_stream()>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// A thread reads some of what the fixed-point kernels pass over.
constexpr int64_t kElementsPerThread = 16;

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
    const ForwardArguments<value_t, Points> p(params);
    dispatch(p, p.out, false, [&](auto channels) {
      launch(ms_deform_attn_forward_kernel<value_t, Points, channels()>,
             p.problem.rows() * Group<value_t, channels()>::kLanes,
             forward_shape<value_t, channels()>(), p);
    });
  }

  template <typename value_t, typename Points>
  static void backward(const BackwardParams<value_t, Points, acc_t<value_t>>& params,
                       bool deterministic, const Tensor& value) {
    BackwardArguments<value_t, Points> p(params);
    const Problem& n = p.problem;
    const bool fixed = deterministic && p.grad_value != nullptr;
    Tensor sums, state;
    if (fixed) {
      if (sizeof(value_t) == 8) {
        fail(
            "value: expected dtype float32, float16, bfloat16 for the deterministic CUDA backward, "
            "got float64");
      }
      const int64_t elements = n.batch * n.pixels * n.heads * n.channels;
      sums = allocate(aoti_torch_aten_new_zeros, value, {elements}, aoti_torch_dtype_int64(),
                      "the integer sums of the deterministic backward");
      state = allocate(aoti_torch_aten_new_zeros, value, {FixedPoint::state_size(elements)},
                       aoti_torch_dtype_int32(), "the state of the deterministic backward");
      p.fixed.sums = static_cast<unsigned long long*>(sums.mutable_data_ptr());
      p.fixed.state = static_cast<uint32_t*>(state.mutable_data_ptr());
      p.fixed.fraction = FixedPoint::fraction_for(n.queries * n.points);
      const auto measured = measure(p);
      launch(ms_deform_attn_measure_kernel<value_t, typename Points::point_t>,
             std::max(measured.grad_count, measured.weight_count) / kElementsPerThread + 1,
             {kFixedPointThreads, 0}, measured);
    }
    dispatch(p, p.grad_out, false, [&](auto channels) {
      const LaunchShape shape = backward_shape<value_t, Points, channels()>(n.points);
      if (shape.bytes > kMaxBlockMemory) {
        fail("sampling_offsets: expected points of a query and head that ", kMaxBlockMemory,
             " bytes of shared memory hold in the CUDA backward, got ", n.points);
      }
      launch(ms_deform_attn_backward_kernel<value_t, Points, channels()>,
             n.rows() * Group<value_t, channels()>::kLanes, shape, p);
    });
    if constexpr (std::is_same<acc_t<value_t>, float>::value) {
      if (fixed) {
        const FinishArguments finish{p.fixed, p.grad_value, sums.numel()};
        launch(ms_deform_attn_finish_kernel, finish.count / kElementsPerThread + 1,
               {kFixedPointThreads, 0}, finish);
      }
    }
  }
};

}  // namespace
}  // namespace vitadapter::cuda

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
