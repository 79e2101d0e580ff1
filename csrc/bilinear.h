// SPDX-License-Identifier: Apache-2.0
// One sampling point of multi-scale deformable attention: where it falls on a level, the four
// bilinear weights and their derivatives. Host and device; the only place with this maths.
//
// Convention (Zhu et al. 2021, eq. 2): a location (x, y) is a fraction of the level's width and
// height, the centre of pixel (row i, column j) lies at ((j + 0.5) / W, (i + 0.5) / H), and the map
// is zero outside: grid_sample with align_corners=False and padding_mode="zeros".
//
//            column[0]  column[1]
//   row[0]      [0]-------[1]        corners, in this order everywhere:
//                |  .      |         corner k lies at row[k / 2], column[k % 2]
//   row[1]      [2]-------[3]
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VITADAPTER_HD __host__ __device__ __forceinline__
#else
// Always inlined, so that code compiled for one instruction set never ends up in another's callers.
#define VITADAPTER_HD inline __attribute__((always_inline))
#endif

namespace vitadapter {

// A location in pixels of its level. False, with x = y = 0, when the point touches no pixel, which
// includes every non-finite coordinate: such a point contributes nothing and gets no gradient. The
// test is made in floating point, before any conversion to an integer could overflow.
template <typename T>
VITADAPTER_HD bool to_pixels(T loc_x, T loc_y, int32_t height, int32_t width, T& x, T& y) {
  const T w = static_cast<T>(width), h = static_cast<T>(height);
  x = loc_x * w - static_cast<T>(0.5);
  y = loc_y * h - static_cast<T>(0.5);
  const bool inside = (x > T(-1)) & (y > T(-1)) & (x < w) & (y < h);
  x = inside ? x : T(0);
  y = inside ? y : T(0);
  return inside;
}

// Separable: the weight of corner k is wy[k / 2] * wx[k % 2], its derivative by x in pixels
// wy[k / 2] * dx[k % 2], by y dy[k / 2] * wx[k % 2]. A row or column outside the map has weight and
// derivative 0, and its index is that of the neighbour inside: it can always be read, and reads
// nothing that the point does not touch anyway.
template <typename T>
struct Footprint {
  int32_t column[2], row[2];
  T wx[2], wy[2];
  T dx[2], dy[2];
};

// One axis of a footprint; x in pixels, -1 < x < size. Comparisons count as 0 or 1 in the
// arithmetic: written with conditions, the compiler finds branches, and does not vectorise loops
// over points.
template <typename T>
VITADAPTER_HD void place_on_axis(T x, int32_t size, int32_t index[2], T weight[2],
                                 T derivative[2]) {
  // floor: truncation rounds the one negative pixel, -1, up.
  const int32_t low = static_cast<int32_t>(x) - static_cast<int32_t>(x < T(0));
  const int32_t high = low + 1;
  const T fraction = x - static_cast<T>(low);
  // Sizes above 2^24 round in fp32, so that low may reach size: hence both bounds for both.
  const int32_t low_in = static_cast<int32_t>(low >= 0) & static_cast<int32_t>(low < size);
  const int32_t high_in = static_cast<int32_t>(high < size);
  index[0] = low + static_cast<int32_t>(low < 0) - static_cast<int32_t>(low >= size);
  index[1] = high_in * high + (1 - high_in) * (size - 1);
  derivative[0] = -static_cast<T>(low_in);
  derivative[1] = static_cast<T>(high_in);
  weight[0] = static_cast<T>(low_in) * (T(1) - fraction);
  weight[1] = static_cast<T>(high_in) * fraction;
}

// The four corners around (x, y), which are pixels from `to_pixels`.
template <typename T>
VITADAPTER_HD Footprint<T> footprint(T x, T y, int32_t height, int32_t width) {
  Footprint<T> f;
  place_on_axis(x, width, f.column, f.wx, f.dx);
  place_on_axis(y, height, f.row, f.wy, f.dy);
  return f;
}

// Gradients of one point, from s[k] = <grad_out, value at corner k>.
template <typename T>
struct PointGradient {
  T weight;        // with respect to the attention weight
  T loc_x, loc_y;  // with respect to the normalised location
};

template <typename T>
VITADAPTER_HD PointGradient<T> point_gradient(const Footprint<T>& f, const T s[4], T attention,
                                              int32_t height, int32_t width) {
  const T top = f.wx[0] * s[0] + f.wx[1] * s[1], bottom = f.wx[0] * s[2] + f.wx[1] * s[3];
  const T left = f.wy[0] * s[0] + f.wy[1] * s[2], right = f.wy[0] * s[1] + f.wy[1] * s[3];
  PointGradient<T> g;
  g.weight = f.wy[0] * top + f.wy[1] * bottom;
  g.loc_x = attention * static_cast<T>(width) * (f.dx[0] * left + f.dx[1] * right);
  g.loc_y = attention * static_cast<T>(height) * (f.dy[0] * top + f.dy[1] * bottom);
  return g;
}

}  // namespace vitadapter
