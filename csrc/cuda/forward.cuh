// SPDX-License-Identifier: Apache-2.0
// Forward kernel of multi-scale deformable attention. No torch header.
#pragma once

#include "points.cuh"

namespace vitadapter::cuda {

constexpr int kForwardThreads = 256;

// VEC consecutive channels, moved by one load or store of up to 16 bytes.
template <typename value_t, int VEC>
struct alignas(VEC * sizeof(value_t)) Pack {
  value_t v[VEC];
};

// out[b,q,m,:] = sum_k w[b,q,m,k] * bilinear(value_l[b,:,m,:], at point k of level l)
// (Zhu et al. 2021, eq. 2; the convention is in bilinear.h, where points come from in points.cuh)
//
// One thread per row (b, q, m) and group of VEC channels, neighbouring threads on neighbouring
// groups: a corner of D channels is one coalesced read, and the threads of a row read the same
// points, which the L1 cache broadcasts. Sums in acc_t; every output is written once. All offsets
// are int64.
template <typename value_t, typename Points, int VEC>
__global__ void __launch_bounds__(kForwardThreads)
    ms_deform_attn_forward_kernel(const __grid_constant__ ForwardParams<value_t, Points> p) {
  using acc = acc_t<value_t>;
  using pack = Pack<value_t, VEC>;
  const Problem& n = p.problem;
  const int64_t groups = n.channels / VEC;
  const int64_t total = n.rows() * groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < total;
       t += step) {
    const RowIndex index(n, t / groups);
    const int64_t c = (t - index.row * groups) * VEC;
    const value_t* plane = p.value + p.stride.plane(index.b, index.m) + c;
    const bool* mask = p.mask == nullptr ? nullptr : p.mask + index.b * n.pixels;
    Row<Points> row(n, p.points, index);
    acc sum[VEC] = {};
    for (int l = 0; l < n.levels; ++l) {
      const Level level = n.level[l];
      row.turn_to(level, l);
      for (int64_t k = level.first; k < level.first + level.points; ++k) {
        acc x, y;
        row.position(k, x, y);
        if (!keep_on_map(x, y, row.height, row.width)) continue;
        const auto f = footprint(x, y, level.height, level.width);
        const acc attention = row.weight(k);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const acc w = attention * f.wy[i / 2] * f.wx[i % 2];
          const int64_t pixel = level.pixel(f.row[i / 2], f.column[i % 2]);
          if (mask != nullptr && mask[pixel]) continue;
          const pack v = *reinterpret_cast<const pack*>(plane + pixel * p.stride.s);
#pragma unroll
          for (int e = 0; e < VEC; ++e) sum[e] += w * to_acc(v.v[e]);
        }
      }
    }
    pack result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) from_acc(sum[e], result.v[e]);
    *reinterpret_cast<pack*>(p.out + index.row * n.channels + c) = result;
    if (c == 0 && p.weights != nullptr) {
      for (int64_t k = 0; k < n.points; ++k) {
        from_acc(row.weight(k), p.weights[index.row * n.points + k]);
      }
    }
  }
}

}  // namespace vitadapter::cuda
