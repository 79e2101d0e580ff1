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
#include <type_traits>
#include <utility>

#include "host_device.h"

namespace vitadapter {

// The functions below take one point, or a vector of points (the compiler's vector types): T is a
// float or a vector of floats, I an integer of the same number of lanes. Written with selections
// instead of branches, so that one text serves both.
template <typename To, typename From>
VITADAPTER_HD To convert(const From& v) {
#if !defined(__CUDACC__)
  if constexpr (!std::is_arithmetic<From>::value) {
    return __builtin_convertvector(v, To);
  } else
#endif
  {
    return static_cast<To>(v);
  }
}

template <typename T>
struct LaneOf {
  using type = std::remove_reference_t<decltype(std::declval<T&>()[0])>;
};
template <>
struct LaneOf<float> {
  using type = float;
};
template <>
struct LaneOf<double> {
  using type = double;
};

// The position of a location, a fraction of the level's size, in pixels: 0 is the first centre.
template <typename T>
VITADAPTER_HD T located(const T& location, const T& size) {
  return location * size - typename LaneOf<T>::type(0.5);
}

// A position in pixels that is linear in an offset: base + offset * step. Beside a reference point
// offsets are pixels; beside a box its extent, times a scale, is a unit of offset.
template <typename T>
struct Axis {
  T base, step;
};
template <typename T>
VITADAPTER_HD Axis<T> beside_point(const T& reference, const T& size) {
  return {located(reference, size), T{} + typename LaneOf<T>::type(1)};
}
template <typename T>
VITADAPTER_HD Axis<T> beside_box(const T& reference, const T& extent, const T& scale,
                                 const T& size) {
  return {located(reference, size), scale * (extent * size)};
}

// False, and x = y = 0, when the point touches no pixel, which includes every non-finite position:
// such a point contributes nothing and gets no gradient. The test is made in floating point, before
// any conversion to an integer could overflow.
template <typename T>
VITADAPTER_HD auto keep_on_map(T& x, T& y, const T& height, const T& width) {
  using lane = typename LaneOf<T>::type;
  const auto inside = (x > lane(-1)) & (y > lane(-1)) & (x < width) & (y < height);
  x = inside ? x : T{};
  y = inside ? y : T{};
  return inside;
}

// Separable: the weight of corner k is wy[k / 2] * wx[k % 2], its derivative by x in pixels
// wy[k / 2] * dx[k % 2], by y dy[k / 2] * wx[k % 2]. A row or column outside the map has weight and
// derivative 0, and its index is that of the neighbour inside: it can always be read, and reads
// nothing that the point does not touch anyway.
template <typename T, typename I>
struct Footprint {
  I column[2], row[2];
  T wx[2], wy[2];
  T dx[2], dy[2];
};

// One axis of a footprint; x in pixels, -1 < x < size.
template <typename T, typename I>
VITADAPTER_HD void place_on_axis(const T& x, const I& size, I index[2], T weight[2],
                                 T derivative[2]) {
  const I zero{}, one = zero + 1;
  const T nothing{}, unit = nothing + typename LaneOf<T>::type(1);
  // floor: truncation rounds the one negative pixel, -1, up.
  const I low = convert<I>(x) - (x < nothing ? one : zero);
  const I high = low + one;
  const T fraction = x - convert<T>(low);
  // Sizes above 2^24 round in fp32, so that low may reach size: hence both bounds for both.
  const auto low_in = (low >= zero) & (low < size);
  // mutant: corner off by one
  const auto high_in = high < size;
  index[0] = low < zero ? zero : (low < size ? low : size - one);
  // mutant: column beyond the map
  index[1] = high_in ? high : size - one;
  derivative[0] = low_in ? -unit : nothing;
  derivative[1] = high_in ? unit : nothing;
  weight[0] = low_in ? unit - fraction : nothing;
  weight[1] = high_in ? fraction : nothing;
}

// The four corners around (x, y), which are pixels from `keep_on_map`.
template <typename T, typename I>
VITADAPTER_HD Footprint<T, I> footprint(const T& x, const T& y, const I& height, const I& width) {
  Footprint<T, I> f;
  place_on_axis(x, width, f.column, f.wx, f.dx);
  place_on_axis(y, height, f.row, f.wy, f.dy);
  return f;
}

// Gradients of one point, from s[k] = <grad_out, value at corner k>.
template <typename T>
struct PointGradient {
  T weight;  // with respect to the attention weight
  T x, y;    // with respect to the position in pixels
};

template <typename T, typename I>
VITADAPTER_HD PointGradient<T> point_gradient(const Footprint<T, I>& f, const T s[4],
                                              const T& attention) {
  const T top = f.wx[0] * s[0] + f.wx[1] * s[1], bottom = f.wx[0] * s[2] + f.wx[1] * s[3];
  const T left = f.wy[0] * s[0] + f.wy[1] * s[2], right = f.wy[0] * s[1] + f.wy[1] * s[3];
  PointGradient<T> g;
  g.weight = f.wy[0] * top + f.wy[1] * bottom;
  g.x = attention * (f.dx[0] * left + f.dx[1] * right);
  g.y = attention * (f.dy[0] * top + f.dy[1] * bottom);
  return g;
}

// A gradient by a position, times what the position is multiplied with. Points outside have the
// gradient 0, and keep it beside factors that are not finite.
template <typename T>
VITADAPTER_HD T chain(const T& grad, const T& factor) {
  return grad == T{} ? T{} : grad * factor;
}

}  // namespace vitadapter
