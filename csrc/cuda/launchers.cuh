// SPDX-License-Identifier: Apache-2.0
// The launchers of launchers.h: what a unit (*.cu) instantiates. No torch header.
#pragma once

#include <algorithm>

#include "../dtypes.h"
#include "../fail.h"
#include "launch.cuh"
#include "launchers.h"

namespace vitadapter::cuda {

// Enough blocks for `total` threads; kernels stride over what exceeds the grid's limit. The caller
// has set the device and knows that there is work: a grid of 0 blocks is an error.
template <typename Params>
void launch(void (*kernel)(Params), int64_t total, const LaunchShape& shape, const Params& params) {
  const int64_t blocks = std::min<int64_t>((total + shape.threads - 1) / shape.threads, 0x7fffffff);
  kernel<<<static_cast<unsigned>(blocks), shape.threads, static_cast<size_t>(shape.bytes),
           current_stream()>>>(params);
  check(cudaGetLastError());
}

// A thread reads some of what the fixed-point kernels pass over.
constexpr int64_t kElementsPerThread = 16;

// Launches the kernel that all dtypes share; defined in fp64.cu, the smallest unit.
void finish(const FinishArguments<float>& p);

struct Launchers {
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
                       bool deterministic, const Zeros& zeros) {
    BackwardArguments<value_t, Points> p(params);
    const Problem& n = p.problem;
    const bool fixed = deterministic && p.grad_value != nullptr;
    const int64_t elements = n.batch * n.pixels * n.heads * n.channels;
    if (fixed) {
      if (sizeof(value_t) == 8) {
        fail(
            "value: expected a dtype that is summed in float32 for the deterministic CUDA "
            "backward, got float64");
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

// Of one pair of dtypes (dtypes.h), for a unit to instantiate.
#define VITADAPTER_FORWARD(pair)                                                    \
  template void forward(                                                            \
      const ForwardParams<dtypes::pair::value_t, Located<dtypes::pair::point_t>>&); \
  template void forward(const ForwardParams<dtypes::pair::value_t, Offsets<dtypes::pair::point_t>>&)
#define VITADAPTER_BACKWARD(pair)                                                 \
  template void backward(                                                         \
      const BackwardParams<dtypes::pair::value_t, Located<dtypes::pair::point_t>, \
                           acc_t<dtypes::pair::value_t>>&,                        \
      bool, const Zeros&);                                                        \
  template void backward(                                                         \
      const BackwardParams<dtypes::pair::value_t, Offsets<dtypes::pair::point_t>, \
                           acc_t<dtypes::pair::value_t>>&,                        \
      bool, const Zeros&)
