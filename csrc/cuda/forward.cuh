// SPDX-License-Identifier: Apache-2.0
// Forward kernel of multi-scale deformable attention. No torch header.
#pragma once

#include "points.cuh"

namespace vitadapter::cuda {

constexpr int kForwardThreads = 256;
// Blocks on a multiprocessor: three leave 80 registers for a thread, two 128. With four, and 64,
// some kernels spill on sm_80.
template <int CHANNELS>
constexpr int kForwardBlocks = CHANNELS == 0 ? 2 : 3;

// sum += the samples of COUNT points, in order; all pixels are asked for before the first is used.
template <int COUNT, typename Group, typename value_t, typename sample, typename acc>
__device__ __forceinline__ void add_samples(const sample* samples, const value_t* plane,
                                            typename Group::index_t step, acc sum[Group::kVec]) {
  using pack = typename Group::pack;
  acc weight[COUNT][4];
  pack v[COUNT][4];
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
    const sample s = samples[u];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weight[u][i] = s.weight[i];
      v[u][i] = *pixel_of<pack>(plane, s.pixel[i], step);
    }
  }
#pragma unroll
  for (int u = 0; u < COUNT; ++u) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      acc number[Group::kVec];
      unpack(v[u][i], number);
#pragma unroll
      for (int e = 0; e < Group::kVec; ++e) sum[e] += weight[u][i] * number[e];
    }
  }
}

template <typename value_t, typename Points>
struct ForwardArguments : ForwardParams<value_t, Points> {
  Plan plan;

  explicit ForwardArguments(const ForwardParams<value_t, Points>& p)
      : ForwardParams<value_t, Points>(p), plan(p.problem) {}
};

// out[b,q,m,:] = sum_k w[b,q,m,k] * bilinear(value_l[b,:,m,:], at point k of level l)
// (Zhu et al. 2021, eq. 2; the convention is in bilinear.h, where points come from in points.cuh)
//
// A group of lanes for each row. Its lanes place the points, two each, and share them through the
// block's memory; then each sums its channels over the points. Every output is written once.
template <typename value_t, typename Points, int CHANNELS>
__global__ void __launch_bounds__(kForwardThreads, kForwardBlocks<CHANNELS>)
    ms_deform_attn_forward_kernel(const __grid_constant__ ForwardArguments<value_t, Points> p) {
  using acc = acc_t<value_t>;
  using group = Group<value_t, CHANNELS>;
  using stage = Stage<value_t, CHANNELS>;
  using index_t = typename group::index_t;
  const Problem& n = p.problem;
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const auto samples = stage::of_row(block_memory() + warp * stage::kWarpBytes, lane);
  const int64_t rows = n.rows();
  const auto channels = group::channels(n);
  const index_t step = static_cast<index_t>(p.stride.s) * static_cast<index_t>(sizeof(value_t));
  const int64_t stride = static_cast<int64_t>(gridDim.x) * warps * group::kRows;
  for (int64_t r0 = (static_cast<int64_t>(blockIdx.x) * warps + warp) * group::kRows; r0 < rows;
       r0 += stride) {
    const auto [exists, index, points, mask] = GroupRow<group>(n, p.plan, p.mask, r0, lane);
    const Row<Points, group> row(n, p.points, index, points, lane);
    for (index_t c0 = 0; c0 < channels; c0 += group::kLanes * group::kVec) {
      const index_t c = c0 + lane % group::kLanes * group::kVec;
      const bool has_channels = group::kFull || c < channels;
      const value_t* plane = p.value + p.stride.plane(index.b, index.m) + c;
      acc sum[group::kVec] = {};
      for (int first = 0; first < static_cast<int>(n.points); first += stage::kPoints) {
        Placed<acc> placed[stage::kEach];
        const int count = stage::template place<Points::kMasked>(n, p.plan, row, mask, first,
                                                                 points, lane, samples, placed);
        if (p.weights != nullptr && c0 == 0) {
          const auto weights = p.weights + product(index.row, static_cast<index_t>(n.points));
#pragma unroll
          for (int j = 0; j < stage::kEach; ++j) {
            const int k = stage::point(first, j, lane);
            if (k < points) from_acc(placed[j].attention, weights[k]);
          }
        }
        // mutant: samples read before they are written
        __syncwarp();
        if (has_channels) {
          int i = 0;
          for (; i + 2 <= count; i += 2) add_samples<2, group>(samples + i, plane, step, sum);
          if (i < count) add_samples<1, group>(samples + i, plane, step, sum);
        }
        __syncwarp();
      }
      if (exists && has_channels) {
        typename group::pack result;
#pragma unroll
        for (int e = 0; e < group::kVec; ++e) from_acc(sum[e], result.v[e]);
        *reinterpret_cast<typename group::pack*>(p.out + product(index.row, channels) + c) = result;
      }
      if constexpr (!group::kGeneral) break;
    }
  }
}

}  // namespace vitadapter::cuda
