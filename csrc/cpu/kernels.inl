// SPDX-License-Identifier: Apache-2.0
// The CPU kernels. Included once per instruction set by kernels_<isa>.cpp, which chooses the
// compiler's target and VITADAPTER_VECTOR_BYTES. Everything here has internal linkage, so that no
// instruction set's code can replace another's.
//
// forward:  out[b,q,m,:] = sum_k w[b,q,m,k] * bilinear(value_l[b,:,m,:], at point k of level l)
// backward: with s_k = <grad_out[b,q,m,:], value at corner k>, four dot products per point give the
//           gradients of location and weight (bilinear.h); value receives w * bilinear weight *
//           grad_out at each corner.
//
// What is slow is memory, so that everything is arranged for the caches. A task takes some heads of
// one image and some of its queries:
//   pack     copies the heads' planes of value: a head's pixels then lie side by side, instead of
//            M * D apart, where they would share a few cache sets;
//   fetch    reads locations and weights, or computes them from offsets and logits (and reads
//            grad_out), and asks for the rows to come;
// and for each head and tile of queries, whose points stay in L1,
//   place    footprints and weights of all points, vectorised over points;
//   sample   for each query, its points one after the other, vectorised over channels: what is
//            summed stays in registers, four loads and four multiply-adds per point and vector;
//   finish   (backward) gradients of the points from their four dot products, over points again.

// Here, so that its functions too are compiled for this instruction set.
#include "../bilinear.h"

namespace {

using namespace vitadapter;

#include "simd.inl"
// Each stage after those that it builds on.
// clang-format off
#include "kernels/tools.inl"
#include "kernels/fetch.inl"
#include "kernels/place.inl"
#include "kernels/sample.inl"
#include "kernels/tasks.inl"
#include "kernels/forward.inl"
#include "kernels/backward.inl"
// clang-format on

template <typename value_t, typename Points>
constexpr cpu::Kernels<value_t, Points> kernels_for() {
  return {&forward<value_t, Points>, &backward_points<value_t, Points>,
          &backward_value<value_t, Points>};
}

template <typename value_t, typename point_t>
constexpr cpu::KernelsOf<value_t, point_t> kernels_of() {
  return {kernels_for<value_t, Located<point_t>>(), kernels_for<value_t, Offsets<point_t>>()};
}

vitadapter::cpu::KernelTable kernel_table(const char* isa) {
#define VITADAPTER_ENTRY(name, value_t, point_t, value, points) , kernels_of<value_t, point_t>()
  return {isa VITADAPTER_DTYPE_PAIRS(VITADAPTER_ENTRY)};
#undef VITADAPTER_ENTRY
}

}  // namespace
