// SPDX-License-Identifier: Apache-2.0
// Which kernel serves a problem, and how it is launched. No torch header.
#pragma once

#include <iterator>
#include <type_traits>
#include <utility>

#include "../head_dims.h"
#include "backward.cuh"
#include "forward.cuh"

namespace vitadapter::cuda {

template <typename Run, size_t... i>
bool dispatch_channels(int64_t channels, const Run& run, std::index_sequence<i...>) {
  return ((channels == kHeadDims[i] && run(std::integral_constant<int, kHeadDims[i]>{})) || ...);
}

// Returns run(std::integral_constant<int, D>{}) if there are kernels for D = channels, otherwise
// false. fp64 has none of its own for any D.
template <typename value_t, typename Run>
bool dispatch_channels(int64_t channels, const Run& run) {
  if constexpr (std::is_same<acc_t<value_t>, float>::value) {
    return dispatch_channels(channels, run, std::make_index_sequence<std::size(kHeadDims)>{});
  } else {
    return false;
  }
}

inline bool aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

template <typename point_t>
bool has_pairs(const Located<point_t>& p) {
  return aligned(p.locations, 2 * sizeof(point_t));
}
template <typename point_t>
bool has_pairs(const Offsets<point_t>& p) {
  return aligned(p.offsets, 2 * sizeof(point_t)) && p.offset.b % 2 == 0 && p.offset.q % 2 == 0;
}

// Whether a kernel for one D can move value and `dense` (the output or its gradient) in the packs
// of its Group: all their addresses have to be multiples of a pack. Only the width of the pack
// counts: bf16 with D = 12 has packs of 8 bytes and heads of 24.
template <typename Group, typename Params>
bool has_packs(const Params& p, const void* dense) {
  constexpr size_t kBytes = sizeof(typename Group::pack);
  const auto steps = [](int64_t stride) { return stride % Group::kVec == 0; };
  return aligned(p.value, kBytes) && aligned(dense, kBytes) && steps(p.stride.b) &&
         steps(p.stride.s) && steps(p.stride.m);
}

// Whether rows, pixels and the bytes between them fit the 32 bits of the kernels for one D.
template <typename Params>
bool fits_32_bits(const Params& p) {
  using value_t = typename Params::value_t;
  const Problem& n = p.problem;
  const auto fits = [](int64_t number) { return number < (int64_t{1} << 31); };
  // 8 bytes: of the integer sums of fixed_point.cuh.
  return fits(n.rows()) && fits(n.pixels) &&
         fits(p.stride.s * static_cast<int64_t>(sizeof(value_t))) && fits(n.heads * n.channels * 8);
}

// Calls run(std::integral_constant<int, CHANNELS>{}) for the kernel that serves: 0 is the general
// one, which serves everything.
template <typename Params, typename Run>
void dispatch(const Params& p, const void* dense, bool general, const Run& run) {
  using value_t = typename Params::value_t;
  const auto specialised = [&](auto channels) {
    if (!has_packs<Group<value_t, channels()>>(p, dense)) return false;
    run(channels);
    return true;
  };
  if (general || !has_pairs(p.points) || !fits_32_bits(p) ||
      !dispatch_channels<value_t>(p.problem.channels, specialised)) {
    run(std::integral_constant<int, 0>{});
  }
}

// The dynamic shared memory of a block that the launch needs no attribute for.
constexpr int64_t kMaxBlockMemory = 48 << 10;

// Threads and bytes of dynamic shared memory of each block.
struct LaunchShape {
  int threads;
  int64_t bytes;
};

template <typename value_t, int CHANNELS>
LaunchShape forward_shape() {
  // mutant: forward blocks with too little memory
  return {kForwardThreads, kForwardThreads / kWarp * Stage<value_t, CHANNELS>::kWarpBytes};
}

// Blocks get smaller where a row has very many points. Beyond some number not even a block of one
// warp stays within kMaxBlockMemory: no launch is possible then.
template <typename value_t, typename Points, int CHANNELS>
LaunchShape backward_shape(int64_t points) {
  const int64_t warp_bytes = BackwardMemory<value_t, Points, CHANNELS>::warp_bytes(points);
  int threads = kBackwardThreads;
  while (threads > kWarp && threads / kWarp * warp_bytes > kMaxBlockMemory) threads /= 2;
  // mutant: backward blocks with too little memory
  return {threads, threads / kWarp * warp_bytes};
}

// What the measuring kernel reads.
template <typename value_t, typename point_t>
MeasureArguments<value_t, point_t> measure(const BackwardArguments<value_t, Located<point_t>>& p) {
  const Problem& n = p.problem;
  return {p.grad_out, n.rows() * n.channels, p.points.weights, n.rows() * n.points, p.fixed.state};
}
template <typename value_t, typename point_t>
MeasureArguments<value_t, point_t> measure(const BackwardArguments<value_t, Offsets<point_t>>& p) {
  return {p.grad_out, p.problem.rows() * p.problem.channels, nullptr, 0, p.fixed.state};
}

}  // namespace vitadapter::cuda
