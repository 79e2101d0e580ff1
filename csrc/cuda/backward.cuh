// SPDX-License-Identifier: Apache-2.0
// Backward kernel of multi-scale deformable attention. No torch header.
#pragma once

#include "points.cuh"

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

// The memory that a launch asks for, shared by the threads of a block.
template <typename T>
__device__ __forceinline__ T* block_memory() {
  extern __shared__ __align__(16) unsigned char vitadapter_block_memory[];
  return reinterpret_cast<T*>(vitadapter_block_memory);
}

// With g = grad_out[b,q,m,:], v_i the value at corner i of a point and s_i = <g, v_i>:
//   gradients of the point = point_gradient(s_0..s_3)              (bilinear.h, points.cuh)
//   grad_value[corner i] += w * (bilinear weight of i) * g
//
// One warp per row (b, q, m); lanes stride over the channels, so that the four dot products of a
// point are four shuffle reductions. Gradients of points have one writer each and need no zeroing.
// grad_value takes floating-point atomics, whose order, and so whose last bits, change from run to
// run. All lanes of a warp take the same branches: the shuffles always see the full warp.
// For Offsets a launch has K numbers of block memory for each warp.
template <typename value_t, typename Points>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks) ms_deform_attn_backward_kernel(
    const __grid_constant__ BackwardParams<value_t, Points, acc_t<value_t>> p) {
  using acc = acc_t<value_t>;
  const Problem& n = p.problem;
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  const int64_t rows = n.rows();
  const bool need_dots = p.grads.any();
  acc* memory = nullptr;
  if constexpr (RowGradients<Points>::kNeedsMemory) {
    memory = block_memory<acc>() + threadIdx.x / kWarp * n.points;
  }
  for (int64_t r = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp; r < rows;
       r += warps) {
    const RowIndex index(n, r);
    const int64_t m = index.m, b = index.b;
    const value_t* plane = p.value + p.stride.plane(b, m);
    const value_t* grad_out = p.grad_out + r * n.channels;
    const bool* mask = p.mask == nullptr ? nullptr : p.mask + b * n.pixels;
    Row<Points> row(n, p.points, index);
    RowGradients<Points> gradients(n, p.points, p.grads, index, memory);
    for (int l = 0; l < n.levels; ++l) {
      const Level level = n.level[l];
      row.turn_to(level, l);
      if (lane == 0) gradients.begin_level(l);
      for (int64_t k = level.first; k < level.first + level.points; ++k) {
        PointGradient<acc> g{0, 0, 0};
        acc x, y;
        row.position(k, x, y);
        const acc attention = row.weight(k);
        if (keep_on_map(x, y, row.height, row.width)) {
          const auto f = footprint(x, y, level.height, level.width);
          acc s[4] = {};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int64_t pixel = level.pixel(f.row[i / 2], f.column[i % 2]);
            if (mask != nullptr && mask[pixel]) continue;
            const value_t* v = plane + pixel * p.stride.s;
            const acc w = attention * f.wy[i / 2] * f.wx[i % 2];
            acc* grad_value =
                p.grad_value == nullptr
                    ? nullptr
                    : p.grad_value + ((b * n.pixels + pixel) * n.heads + m) * n.channels;
            for (int64_t c = lane; c < n.channels; c += kWarp) {
              const acc go = to_acc(grad_out[c]);
              if (need_dots) s[i] += go * to_acc(v[c]);
              if (grad_value != nullptr && w != acc(0)) atomicAdd(grad_value + c, w * go);
            }
          }
          if (need_dots) {
#pragma unroll
            for (int i = 0; i < 4; ++i) s[i] = warp_sum(s[i]);
            g = point_gradient(f, s, attention);
          }
        }
        if (lane == 0 && need_dots) gradients.add(row, level, k, attention, g);
      }
    }
    gradients.finish(row, n.points, lane, kWarp);
  }
}

}  // namespace vitadapter::cuda
