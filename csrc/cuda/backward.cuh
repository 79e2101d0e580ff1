// SPDX-License-Identifier: Apache-2.0
// Backward kernel of multi-scale deformable attention. No torch header.
#pragma once

#include "fixed_point.cuh"
#include "points.cuh"

namespace vitadapter::cuda {

constexpr int kBackwardThreads = 256;
// Two blocks on a multiprocessor: 16 warps, 128 registers for a thread. What a lane keeps of its
// row and its points while the dot products of others are summed does not fit the 80 of three.
template <typename value_t>
constexpr int kBackwardBlocks = sizeof(value_t) == 8 ? 1 : 2;

template <typename value_t, typename Points>
struct BackwardArguments : BackwardParams<value_t, Points, acc_t<value_t>> {
  Plan plan;
  bool need_points;  // any gradient of points: asked for each point, so by one comparison
  FixedPoint fixed;  // where the gradient of value is summed instead, if it has a place

  explicit BackwardArguments(const BackwardParams<value_t, Points, acc_t<value_t>>& p)
      : BackwardParams<value_t, Points, acc_t<value_t>>(p),
        plan(p.problem),
        need_points(p.grads.any()) {}
};

template <typename value_t, typename Points, int CHANNELS>
struct BackwardMemory {
  using stage = Stage<value_t, CHANNELS>;
  using gradients = RowGradients<Points, Group<value_t, CHANNELS>>;
  static constexpr int kAlignment = 16;

  // Bytes for each warp: the Samples of its rows, then K numbers for each row.
  VITADAPTER_HD static int64_t warp_bytes(int64_t points) {
    const int64_t numbers = gradients::kNeedsMemory ? stage::group::kRows * points : 0;
    const int64_t bytes = stage::kWarpBytes + numbers * sizeof(acc_t<value_t>);
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};

// What a lane reads of the pixels of a point's corners. The general kernel has no such packs.
template <typename Group, typename value_t, typename sample>
__device__ __forceinline__ void load_corners(const sample& at, const value_t* plane,
                                             typename Group::index_t step,
                                             typename Group::pack v[4]) {
  if constexpr (!Group::kGeneral) {
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = *pixel_of<typename Group::pack>(plane, at.pixel[i], step);
  }
}

// The products of grad_out with the pixels of a point's corners, over a lane's channels: those of
// `v` with g, or in the general kernel every kWarp-th channel from c on, where `plane` starts.
template <typename Group, typename value_t, typename sample, typename acc>
__device__ __forceinline__ void dot_products(const sample& at, const typename Group::pack v[4],
                                             const value_t* plane, typename Group::index_t step,
                                             const value_t* grad_out, const acc g[Group::kVec],
                                             typename Group::index_t c,
                                             typename Group::index_t channels, acc s[4]) {
  if constexpr (Group::kGeneral) {
    for (; c < channels; c += kWarp, plane += kWarp) {
      const acc go = to_acc(grad_out[c]);
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] += go * to_acc(*pixel_of<value_t>(plane, at.pixel[i], step));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc number[Group::kVec];
      unpack(v[i], number);
#pragma unroll
      for (int e = 0; e < Group::kVec; ++e) s[i] += g[e] * number[e];
    }
  }
}

// Adds the shares of a point's corners to the gradient of value: in packs of four channels where
// memory can, otherwise lane beside lane, so that each instruction adds to whole sectors. `to`
// starts at the lane's first channel in the former case, at the head's in the latter. `bad`: 0 if
// all of g are finite, otherwise NaN, which a weight of 0 does not hide.
template <typename Group, typename Sum, typename value_t, typename sample, typename acc>
__device__ __forceinline__ void add_shares(const sample& at, const Sum& to, const value_t* grad_out,
                                           const acc g[Group::kVec], acc bad, bool has_channels,
                                           typename Group::index_t channels, int lane) {
  if constexpr (Sum::kVectors && !Group::kGeneral) {
    if (!has_channels) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc* pixel = to.pixel(at.pixel[i]);
#pragma unroll
      for (int e = 0; e < Group::kVec; e += 4) {
        add_four(pixel + e, at.weight[i], g + e, at.weight[i] + bad);
      }
    }
  } else {
    for (typename Group::index_t c = lane % Group::kLanes; c < channels; c += Group::kLanes) {
      const acc go = to_acc(grad_out[c]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to.add(to.pixel(at.pixel[i]) + c, at.weight[i], go);
      }
    }
  }
}

// With g = grad_out[b,q,m,:], v_i the value at corner i of a point and s_i = <g, v_i>:
//   gradients of the point = point_gradient(s_0..s_3)              (bilinear.h, points.cuh)
//   grad_value[corner i] += w * (bilinear weight of i) * g
//
// A group of lanes for each row, as in the forward kernel. The four dot products of a point are
// summed over the group by shuffles and take the place of its corners' weights in memory, where the
// lane that placed the point finds them: its gradients have one writer and need no zeroing.
// grad_value takes floating-point atomics, whose order, and so whose last bits, change from run to
// run; or integer ones, which add to the same bits in any order (fixed_point.cuh).
template <typename value_t, typename Points, int CHANNELS>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocks<value_t>)
    ms_deform_attn_backward_kernel(const __grid_constant__ BackwardArguments<value_t, Points> p) {
  using acc = acc_t<value_t>;
  using group = Group<value_t, CHANNELS>;
  using stage = Stage<value_t, CHANNELS>;
  using index_t = typename group::index_t;
  using pack = typename group::pack;
  const Problem& n = p.problem;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  unsigned char* memory =
      block_memory() + warp * BackwardMemory<value_t, Points, CHANNELS>::warp_bytes(n.points);
  const auto samples = stage::of_row(memory, lane);
  // mutant: one row's memory for all
  acc* numbers =
      reinterpret_cast<acc*>(memory + stage::kWarpBytes) + lane / group::kLanes * n.points;
  const int64_t rows = n.rows();
  const index_t channels = group::channels(n);
  const index_t step = static_cast<index_t>(p.stride.s) * static_cast<index_t>(sizeof(value_t));
  const index_t sum_step = static_cast<index_t>(n.heads) * channels;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps * group::kRows;
  for (int64_t r0 = (static_cast<int64_t>(blockIdx.x) * warps + warp) * group::kRows; r0 < rows;
       r0 += stride) {
    // mutant: a lane that leaves early
    const auto [exists, index, points, mask] = GroupRow<group>(n, p.plan, p.mask, r0, lane);
    const Row<Points, group> row(n, p.points, index, points, lane);
    RowGradients<Points, group> gradients(n, p.points, p.grads, index, points, lane, numbers);
    const index_t c = group::kGeneral ? lane : lane % group::kLanes * group::kVec;
    const bool has_channels = group::kFull || c < channels;
    const value_t* plane =
        p.value + p.stride.plane(index.b, index.m) + (has_channels ? c : index_t(0));
    const value_t* grad_out = p.grad_out + product(index.row, channels);
    acc g[group::kVec] = {};
    if constexpr (!group::kGeneral) {
      if (has_channels) unpack(*reinterpret_cast<const pack*>(grad_out + c), g);
    }
    acc bad = 0;
#pragma unroll
    for (int e = 0; e < group::kVec; ++e) bad += acc(0) * g[e];
    const int64_t first_pixel = (index.b * n.pixels * n.heads + index.m) * n.channels;
    constexpr bool kPacks = FloatSum<acc, index_t>::kVectors && !group::kGeneral;
    const FloatSum<acc, index_t> sum(p.grad_value, first_pixel + (kPacks ? c : 0), sum_step);
    for (int first = 0; first < static_cast<int>(n.points); first += stage::kPoints) {
      Placed<acc> placed[stage::kEach];
      const int count = stage::template place<Points::kMasked>(n, p.plan, row, mask, first, points,
                                                               lane, samples, placed);
      const int most = group_max<kWarp>(count);
      __syncwarp();
      for (int i = 0; i < most; ++i) {
        acc s[4] = {};
        if (i < count) {
          const auto at = samples[i];
          // The corners are on their way while the shares are added.
          pack v[4];
          if (p.need_points) load_corners<group>(at, plane, step, v);
          if constexpr (std::is_same<acc, float>::value) {
            if (p.fixed.fraction != 0) {
              const FixedPointSum<index_t> fixed(p.fixed, first_pixel, sum_step);
              add_shares<group>(at, fixed, grad_out, g, bad, has_channels, channels, lane);
            }
          }
          if (p.grad_value != nullptr && p.fixed.fraction == 0) {
            add_shares<group>(at, sum, grad_out, g, bad, has_channels, channels, lane);
          }
          if (p.need_points) {
            dot_products<group>(at, v, plane, step, grad_out, g, c, channels, s);
          }
        }
        if (p.need_points) {
          const acc of_corner = group_sum_of_four<group::kLanes>(s, lane);
          __syncwarp();
          if (i < count && lane % group::kLanes < 4) {
            // mutant: dot products in the place of weights that are still read
            samples[i].weight[lane % group::kLanes] = of_corner;
          }
        }
      }
      __syncwarp();
      if (p.need_points) {
        PointGradient<acc> by[stage::kEach];
#pragma unroll
        for (int j = 0; j < stage::kEach; ++j) {
          by[j] = {0, 0, 0};
          const int k = stage::point(first, j, lane);
          if (k >= points) continue;
          const Level& level = n.level[placed[j].level];
          if (placed[j].slot >= 0) {
            const auto& at = samples[placed[j].slot];
            acc s[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              s[i] = placed[j].masked >> i & 1u ? acc(0) : at.weight[i];
            }
            const auto f = footprint(placed[j].x, placed[j].y, level.height, level.width);
            by[j] = point_gradient(f, s, placed[j].attention);
          }
          gradients.add(row, level, k, placed[j], by[j]);
        }
        gradients.add_references(n, row, first, placed, by);
      }
      __syncwarp();
    }
    if (p.need_points) gradients.finish(row);
  }
}

}  // namespace vitadapter::cuda
