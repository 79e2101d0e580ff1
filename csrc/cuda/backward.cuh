// SPDX-License-Identifier: Apache-2.0
// Backward kernel of multi-scale deformable attention. No torch header.
#pragma once

#include "../bilinear.h"
#include "../params.h"
#include "../storage.h"

namespace vitadapter::cuda {

constexpr int kWarp = 32;
constexpr int kBackwardThreads = 256;
// Two blocks per multiprocessor leave 128 registers a thread; unasked, the compiler aims at 64 for
// sm_90 and spills.
constexpr int kBackwardBlocks = 2;

// The sum over a full warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    v += __shfl_xor_sync(0xffffffffu, v, offset);
  }
  return v;
}

// With g = grad_out[b,q,m,:], v_k the value at corner k of a point and s_k = <g, v_k>:
//   grad_w, grad_loc = point_gradient(s_0..s_3)                    (bilinear.h)
//   grad_value[corner k] += w * (bilinear weight of k) * g
//
// One warp per row (b, q, m); lanes stride over the channels, so that the four dot products of a
// point are four shuffle reductions. Locations and weights have one writer each and need no
// zeroing. grad_value takes floating-point atomics, whose order, and so whose last bits, change
// from run to run. All lanes of a warp take the same branches: the shuffles always see the full
// warp.
template <typename value_t, typename loc_t>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks) ms_deform_attn_backward_kernel(
    const __grid_constant__ BackwardParams<value_t, loc_t, acc_t<value_t>> p) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  const int64_t rows = n.rows();
  const bool need_dots = p.wants_points();
  for (int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
       row < rows; row += warps) {
    const int64_t m = row % n.heads, b = row / (n.heads * n.queries);
    const value_t* plane = p.value + p.stride.plane(b, m);
    const value_t* grad_out = p.grad_out + row * n.channels;
    int64_t i = row * n.levels * n.points;
    for (int l = 0; l < n.levels; ++l) {
      const Level level = n.level[l];
      const acc height = static_cast<acc>(level.height), width = static_cast<acc>(level.width);
      for (int64_t j = 0; j < n.points; ++j, ++i) {
        PointGradient<acc> g{0, 0, 0};
        acc x, y;
        if (to_pixels(to_acc(p.locations[2 * i]), to_acc(p.locations[2 * i + 1]), height, width, x,
                      y)) {
          const auto f = footprint(x, y, level.height, level.width);
          const acc attention = to_acc(p.weights[i]);
          acc s[4] = {};
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int64_t pixel = level.pixel(f.row[k / 2], f.column[k % 2]);
            const value_t* v = plane + pixel * p.stride.s;
            const acc w = attention * f.wy[k / 2] * f.wx[k % 2];
            acc* grad_value =
                p.grad_value == nullptr
                    ? nullptr
                    : p.grad_value + ((b * n.pixels + pixel) * n.heads + m) * n.channels;
            for (int64_t c = lane; c < n.channels; c += kWarp) {
              const acc go = to_acc(grad_out[c]);
              if (need_dots) s[k] += go * to_acc(v[c]);
              if (grad_value != nullptr && w != acc(0)) atomicAdd(grad_value + c, w * go);
            }
          }
          if (need_dots) {
#pragma unroll
            for (int k = 0; k < 4; ++k) s[k] = warp_sum(s[k]);
            g = point_gradient(f, s, attention, height, width);
          }
        }
        if (lane == 0 && p.grad_locations != nullptr) {
          from_acc(g.loc_x, p.grad_locations[2 * i]);
          from_acc(g.loc_y, p.grad_locations[2 * i + 1]);
        }
        if (lane == 0 && p.grad_weights != nullptr) from_acc(g.weight, p.grad_weights[i]);
      }
    }
  }
}

}  // namespace vitadapter::cuda
