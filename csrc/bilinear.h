// SPDX-License-Identifier: Apache-2.0
// One sampling point of multi-scale deformable attention: where it falls on a level, the four
// bilinear weights and their derivatives. Host and device; the only place with this maths.
//
// Convention (Zhu et al. 2021, eq. 2): a location (x, y) is a fraction of the level's width and
// height, the centre of pixel (row i, column j) lies at ((j + 0.5) / W, (i + 0.5) / H), and the map
// is zero outside: grid_sample with align_corners=False and padding_mode="zeros".
//
//        x0      x0+1
//   y0   [0]-----[1]      corners, in this order everywhere
//         | fy  .  |      fx, fy: the point's distance from corner 0, in [0, 1)
//  y0+1  [2]-----[3]
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VITADAPTER_HD __host__ __device__ __forceinline__
#else
// Always inlined, so that code compiled for one instruction set never ends up in another's callers.
#define VITADAPTER_HD inline __attribute__((always_inline))
#endif

namespace vitadapter {

template <typename T>
struct Footprint {
  bool valid[4];     // the corner is a pixel of the map
  int64_t pixel[4];  // row-major index of the corner in the level; 0 where not valid
  T weight[4];       // bilinear weight; 0 where not valid
  T fx, fy;
};

// Places a location on a level. False when the point touches no pixel, which includes every
// non-finite coordinate: such a point contributes nothing and receives no gradient. The test is
// made in floating point, before any conversion to an integer can overflow.
template <typename T>
VITADAPTER_HD bool locate(T loc_x, T loc_y, int64_t height, int64_t width, Footprint<T>& f) {
  const T x = loc_x * static_cast<T>(width) - static_cast<T>(0.5);
  const T y = loc_y * static_cast<T>(height) - static_cast<T>(0.5);
  if (!(x > T(-1) && y > T(-1) && x < static_cast<T>(width) && y < static_cast<T>(height))) {
    return false;
  }
  // floor: truncation rounds the one negative pixel, -1, up.
  const int64_t x0 = static_cast<int64_t>(x) - (x < 0);
  const int64_t y0 = static_cast<int64_t>(y) - (y < 0);
  f.fx = x - static_cast<T>(x0);
  f.fy = y - static_cast<T>(y0);
  // The upper bound too: a width above 2^24 rounds in fp32, and x may reach it.
  const bool left = x0 >= 0 && x0 < width, right = x0 + 1 < width;
  const bool top = y0 >= 0 && y0 < height, bottom = y0 + 1 < height;
  f.valid[0] = top && left;
  f.valid[1] = top && right;
  f.valid[2] = bottom && left;
  f.valid[3] = bottom && right;
  const T wx[2] = {T(1) - f.fx, f.fx};
  const T wy[2] = {T(1) - f.fy, f.fy};
  for (int k = 0; k < 4; ++k) {
    f.pixel[k] = f.valid[k] ? (y0 + (k >> 1)) * width + x0 + (k & 1) : 0;
    f.weight[k] = f.valid[k] ? wy[k >> 1] * wx[k & 1] : T(0);
  }
  return true;
}

// Gradients of one point from s[k] = <grad_out, value at corner k>, with s[k] = 0 where corner k is
// not valid:   d sample / d w = sum_k weight[k] s[k],
//              d sample / d x = (1 - fy) (s1 - s0) + fy (s3 - s2),   per pixel, and likewise for y.
template <typename T>
struct PointGradient {
  T weight;        // with respect to the attention weight
  T loc_x, loc_y;  // with respect to the normalised location
};

template <typename T>
VITADAPTER_HD PointGradient<T> point_gradient(const Footprint<T>& f, const T s[4], T attention,
                                              int64_t height, int64_t width) {
  PointGradient<T> g;
  g.weight = f.weight[0] * s[0] + f.weight[1] * s[1] + f.weight[2] * s[2] + f.weight[3] * s[3];
  const T dx = (T(1) - f.fy) * (s[1] - s[0]) + f.fy * (s[3] - s[2]);
  const T dy = (T(1) - f.fx) * (s[2] - s[0]) + f.fx * (s[3] - s[1]);
  g.loc_x = attention * static_cast<T>(width) * dx;
  g.loc_y = attention * static_cast<T>(height) * dy;
  return g;
}

}  // namespace vitadapter
