// SPDX-License-Identifier: Apache-2.0
// Forward kernel of multi-scale deformable attention. No torch header.
#pragma once

#include "../bilinear.h"
#include "../params.h"
#include "../storage.h"

namespace vitadapter::cuda {

constexpr int kForwardThreads = 256;

// VEC consecutive channels, moved by one load or store of up to 16 bytes.
template <typename value_t, int VEC>
struct alignas(VEC * sizeof(value_t)) Pack {
  value_t v[VEC];
};

// out[b,q,m,:] = sum_{l,p} w[b,q,m,l,p] * bilinear(value_l[b,:,m,:], loc[b,q,m,l,p])
// (Zhu et al. 2021, eq. 2; the convention is in bilinear.h)
//
// One thread per row (b, q, m) and group of VEC channels, neighbouring threads on neighbouring
// groups: a corner of D channels is one coalesced read, and the threads of a row read the same
// locations and weights, which the L1 cache broadcasts. Sums in acc_t; every output is written
// once. All offsets are int64.
template <typename value_t, typename loc_t, int VEC>
__global__ void __launch_bounds__(kForwardThreads)
    ms_deform_attn_forward_kernel(const __grid_constant__ ForwardParams<value_t, loc_t> p) {
  using acc = acc_t<value_t>;
  using pack = Pack<value_t, VEC>;
  const Problem& n = p.problem;
  const int64_t groups = n.channels / VEC;
  const int64_t total = n.rows() * groups;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; t < total;
       t += step) {
    const int64_t row = t / groups, c = (t - row * groups) * VEC;
    const int64_t m = row % n.heads, b = row / (n.heads * n.queries);
    const value_t* plane = p.value + p.stride.plane(b, m) + c;
    int64_t i = row * n.levels * n.points;
    acc sum[VEC] = {};
    for (int l = 0; l < n.levels; ++l) {
      const Level level = n.level[l];
      const acc height = static_cast<acc>(level.height), width = static_cast<acc>(level.width);
      for (int64_t j = 0; j < n.points; ++j, ++i) {
        acc x, y;
        if (!to_pixels(to_acc(p.locations[2 * i]), to_acc(p.locations[2 * i + 1]), height, width, x,
                       y)) {
          continue;
        }
        const auto f = footprint(x, y, level.height, level.width);
        const acc attention = to_acc(p.weights[i]);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const acc w = attention * f.wy[k / 2] * f.wx[k % 2];
          const int64_t pixel = level.pixel(f.row[k / 2], f.column[k % 2]);
          const pack v = *reinterpret_cast<const pack*>(plane + pixel * p.stride.s);
#pragma unroll
          for (int e = 0; e < VEC; ++e) sum[e] += w * to_acc(v.v[e]);
        }
      }
    }
    pack result;
#pragma unroll
    for (int e = 0; e < VEC; ++e) from_acc(sum[e], result.v[e]);
    *reinterpret_cast<pack*>(p.out + row * n.channels + c) = result;
  }
}

}  // namespace vitadapter::cuda
