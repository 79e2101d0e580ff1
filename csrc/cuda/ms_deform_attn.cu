// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn on CUDA: checks and allocation (stable_utils.h), then one launch.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../stable_utils.h"
#include "backward.cuh"
#include "forward.cuh"

namespace vitadapter::cuda {
namespace {

cudaStream_t current_stream() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Enough blocks of `threads` for `total` threads; kernels stride over what exceeds the grid's
// limit. The caller has set the device and knows that there is work: a grid of 0 blocks is an
// error.
template <typename Params>
void launch(void (*kernel)(Params), int64_t total, int threads, const Params& params,
            int64_t memory = 0) {
  const int64_t blocks = std::min<int64_t>((total + threads - 1) / threads, 0x7fffffff);
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(memory), current_stream()>>>(
      params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Whether every corner can be read as packs of `vec` channels: the width divides, and all addresses
// are multiples of the pack's size.
template <typename value_t, typename Points>
bool can_pack(const ForwardParams<value_t, Points>& p, int64_t vec) {
  const auto aligned = [&](const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % (vec * sizeof(value_t)) == 0;
  };
  return p.problem.channels % vec == 0 && p.stride.b % vec == 0 && p.stride.s % vec == 0 &&
         p.stride.m % vec == 0 && aligned(p.value) && aligned(p.out);
}

struct Cuda {
  struct Guard {
    explicit Guard(const Tensor& t) : guard(t.get_device_index()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  template <typename value_t>
  using grad_t = acc_t<value_t>;
  static constexpr bool kAddsToGradient = true;

  template <typename value_t, typename Points>
  static void forward(const ForwardParams<value_t, Points>& p) {
    constexpr int kVec = 16 / sizeof(value_t);
    const int64_t elements = p.problem.rows() * p.problem.channels;
    if (can_pack(p, kVec)) {
      launch(ms_deform_attn_forward_kernel<value_t, Points, kVec>, elements / kVec, kForwardThreads,
             p);
    } else {
      launch(ms_deform_attn_forward_kernel<value_t, Points, 1>, elements, kForwardThreads, p);
    }
  }

  template <typename value_t, typename Points>
  static void backward(const BackwardParams<value_t, Points, acc_t<value_t>>& p) {
    // 48 KiB is what a block may have without asking; with very many points blocks get smaller.
    constexpr int64_t kMemory = 48 << 10;
    int threads = kBackwardThreads;
    int64_t memory = 0;
    if (RowGradients<Points>::kNeedsMemory) {
      const int64_t each = p.problem.points * static_cast<int64_t>(sizeof(acc_t<value_t>));
      STD_TORCH_CHECK(each <= kMemory, "sampling_offsets: the CUDA backward takes at most ",
                      kMemory / static_cast<int64_t>(sizeof(acc_t<value_t>)),
                      " points for each query and head, got ", p.problem.points);
      while (threads > kWarp && threads / kWarp * each > kMemory) threads /= 2;
      memory = threads / kWarp * each;
    }
    launch(ms_deform_attn_backward_kernel<value_t, Points>, p.problem.rows() * kWarp, threads, p,
           memory);
  }
};

}  // namespace
}  // namespace vitadapter::cuda

STABLE_TORCH_LIBRARY_IMPL(vitadapter_ops, CUDA, m) {
  using vitadapter::cuda::Cuda;
  m.impl("ms_deform_attn", TORCH_BOX(&vitadapter::launch_forward<Cuda>));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&vitadapter::launch_backward<Cuda>));
  m.impl("ms_deform_attn_from_offsets", TORCH_BOX(&vitadapter::launch_forward_from_offsets<Cuda>));
  m.impl("ms_deform_attn_from_offsets_backward",
         TORCH_BOX(&vitadapter::launch_backward_from_offsets<Cuda>));
}
