// SPDX-License-Identifier: Apache-2.0
// The launchers of launchers.h: what a unit (*.cu) instantiates. No torch header.
#pragma once

#include <algorithm>

#include "../fail.h"
#include "launch.cuh"
#include "launchers.h"

namespace vitadapter::cuda {

// Enough blocks of `threads` for `total` threads; kernels stride over what exceeds the grid's
// limit. The caller has set the device and knows that there is work: a grid of 0 blocks is an
// error.
template <typename Params>
void launch(void (*kernel)(Params), int64_t total, int threads, const Params& params,
            int64_t memory = 0) {
  const int64_t blocks = std::min<int64_t>((total + threads - 1) / threads, 0x7fffffff);
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(memory), current_stream()>>>(
      params);
  check(cudaGetLastError());
}

// A thread reads some of what the fixed-point kernels pass over.
constexpr int64_t kElementsPerThread = 16;

// Launches the kernel that all dtypes share; defined in float64.cu, the smallest unit.
void finish(const FinishArguments<float>& p);

struct Launchers {
  template <typename value_t, typename Points>
  static void forward(const ForwardParams<value_t, Points>& params) {
    const ForwardArguments<value_t, Points> p(params);
    dispatch(p, p.out, false, [&](auto channels) {
      using stage = Stage<value_t, channels()>;
      const int64_t threads = p.problem.rows() * stage::group::kLanes;
      launch(ms_deform_attn_forward_kernel<value_t, Points, channels()>, threads, kForwardThreads,
             p, kForwardThreads / kWarp * stage::kWarpBytes);
    });
  }

  template <typename value_t, typename Points>
  static void backward(const BackwardParams<value_t, Points, acc_t<value_t>>& params,
                       bool deterministic, const Zeros& zeros) {
    BackwardArguments<value_t, Points> p(params);
    const Problem& n = p.problem;
    const bool fixed = deterministic && p.grad_value != nullptr;
    const int64_t elements = n.batch * n.pixels * n.heads * n.channels;
    if (fixed) {
      if (sizeof(value_t) == 8) {
        fail(
            "value: expected dtype float32, float16, bfloat16 for the deterministic CUDA backward, "
            "got float64");
      }
      p.fixed.sums = static_cast<unsigned long long*>(zeros(
          elements * sizeof(*p.fixed.sums), "the integer sums of the deterministic backward"));
      p.fixed.state =
          static_cast<uint32_t*>(zeros(FixedPoint::state_size(elements) * sizeof(*p.fixed.state),
                                       "the state of the deterministic backward"));
      p.fixed.fraction = FixedPoint::fraction_for(n.queries * n.points);
      const auto measured = measure(p);
      launch(ms_deform_attn_measure_kernel<value_t, typename Points::point_t>,
             std::max(measured.grad_count, measured.weight_count) / kElementsPerThread + 1,
             kFixedPointThreads, measured);
    }
    dispatch(p, p.grad_out, false, [&](auto channels) {
      using memory = BackwardMemory<value_t, Points, channels()>;
      // 48 KiB is what a block may have without asking; with very many points blocks get smaller.
      constexpr int64_t kMemory = 48 << 10;
      int threads = kBackwardThreads;
      while (threads > kWarp && threads / kWarp * memory::warp_bytes(n.points) > kMemory) {
        threads /= 2;
      }
      const int64_t bytes = threads / kWarp * memory::warp_bytes(n.points);
      if (bytes > kMemory) {
        fail("sampling_offsets: expected points of a query and head that ", kMemory,
             " bytes of shared memory hold in the CUDA backward, got ", n.points);
      }
      launch(ms_deform_attn_backward_kernel<value_t, Points, channels()>,
             n.rows() * memory::stage::group::kLanes, threads, p, bytes);
    });
    if constexpr (std::is_same<acc_t<value_t>, float>::value) {
      if (fixed) finish({p.fixed, p.grad_value, elements});
    }
  }
};

template <typename value_t, typename Points>
void forward(const ForwardParams<value_t, Points>& params) {
  Launchers::forward(params);
}
template <typename value_t, typename Points>
void backward(const BackwardParams<value_t, Points, acc_t<value_t>>& params, bool deterministic,
              const Zeros& zeros) {
  Launchers::backward(params, deterministic, zeros);
}

}  // namespace vitadapter::cuda

// Of one pair of dtypes, for a unit to instantiate.
#define VITADAPTER_FORWARD(value_t, point_t)                              \
  template void forward(const ForwardParams<value_t, Located<point_t>>&); \
  template void forward(const ForwardParams<value_t, Offsets<point_t>>&)
#define VITADAPTER_BACKWARD(value_t, point_t)                                                    \
  template void backward(const BackwardParams<value_t, Located<point_t>, acc_t<value_t>>&, bool, \
                         const Zeros&);                                                          \
  template void backward(const BackwardParams<value_t, Offsets<point_t>, acc_t<value_t>>&, bool, \
                         const Zeros&)
