// SPDX-License-Identifier: Apache-2.0
// What a kernel is given: plain structs passed by value, so that kernels need no torch header and
// share no state between threads. B batch, S pixels of all levels, Q queries, M heads, D channels
// per head, L levels, K sampling points of all levels.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "storage.h"

namespace vitadapter {

struct Level {
  int32_t height, width;
  int64_t start;  // index of the level's first pixel along S
  int32_t first;  // index of the level's first point among the K
  int32_t points;

  VITADAPTER_HD int64_t pixel(int32_t row, int32_t column) const {
    return start + static_cast<int64_t>(row) * width + column;
  }
};

// The level table travels inside the kernel's parameters (4 KiB at most on every GPU), so reading
// it costs no global load. Published models use at most 5 levels.
constexpr int kMaxLevels = 64;

struct Problem {
  int64_t batch, pixels, queries, heads, channels, points;
  int levels;
  Level level[kMaxLevels];

  VITADAPTER_HD int64_t rows() const {
    return batch * queries * heads;
  }  // one output row is D channels
};

// value may be strided over B, S and M (a head-major [B, M, S, D] tensor needs no copy);
// its channels are contiguous.
struct ValueStrides {
  int64_t b, s, m;

  // Offset of head m of image b.
  VITADAPTER_HD int64_t plane(int64_t image, int64_t head) const { return image * b + head * m; }
};

// Where sampling points come from. Located: each has its location and weight (ms_deform_attn).
template <typename point_type>
struct Located {
  using point_t = point_type;
  static constexpr bool kMasked = false;  // no pixels that read as zero
  const point_t* locations;               // [B, Q, M, K, 2], (x, y) as fractions of the level
  const point_t* weights;                 // [B, Q, M, K]
};

// A null pointer means that this gradient is not wanted; every element is written.
template <typename point_type>
struct LocatedGradients {
  point_type* locations;  // [B, Q, M, K, 2]
  point_type* weights;    // [B, Q, M, K]

  VITADAPTER_HD bool any() const { return locations != nullptr || weights != nullptr; }
};

// Offsets: a point lies at its query's reference plus an offset, and its weight is the softmax of
// the K logits of its query and head (ms_deform_attn_from_offsets). Offsets and logits may be
// strided over B and Q, as slices of one Linear's output are.
template <typename point_type>
struct Offsets {
  using point_t = point_type;
  using acc = acc_t<point_type>;
  static constexpr bool kMasked = true;
  struct Strides {
    int64_t b, q;
  };
  const point_t* offsets;  // [B, Q, M, K, 2], (x, y) in pixels, or in boxes times scale
  const point_t* logits;   // [B, Q, M, K]
  Strides offset, logit;
  const acc* reference;  // [B or 1, Q, L or 1, 2 or 4]: (x, y), then a box's (width, height)
  int64_t reference_b;   // its strides over B and L: 0 where one serves all
  int reference_l, reference_levels;
  int width;         // 2, or 4 for boxes
  const acc* scale;  // [K] for boxes, or null: 0.5 / (points of the level)

  VITADAPTER_HD const acc* box(int64_t b, int64_t q) const {
    return reference + b * reference_b + q * (reference_levels * width);
  }
  VITADAPTER_HD acc scale_of(const Level& level, int64_t k) const {
    return scale != nullptr ? scale[k] : acc(0.5) / static_cast<acc>(level.points);
  }
};

template <typename point_type>
struct OffsetsGradients {
  point_type* offsets;           // [B, Q, M, K, 2]
  point_type* logits;            // [B, Q, M, K]
  acc_t<point_type>* reference;  // [B, Q, M, L or 1, 2 or 4], for the caller to sum over heads
  const point_type* weights;  // input: the gradient by the returned weights [B, Q, M, K], or null

  VITADAPTER_HD bool any() const {
    return offsets != nullptr || logits != nullptr || reference != nullptr;
  }
};

template <typename Points>
struct GradientsOf;
template <typename point_t>
struct GradientsOf<Located<point_t>> {
  using type = LocatedGradients<point_t>;
};
template <typename point_t>
struct GradientsOf<Offsets<point_t>> {
  using type = OffsetsGradients<point_t>;
};

template <typename value_type, typename points_type>
struct ForwardParams {
  using value_t = value_type;
  using Points = points_type;
  using point_t = typename Points::point_t;
  Problem problem;
  // inputs
  const value_t* value;  // [B, S, M, D]
  ValueStrides stride;
  const uint8_t* mask;  // [B, S], not 0 where value reads as zero; or null (always for Located)
  Points points;
  // outputs
  value_t* out;      // [B, Q, M, D], every element is written
  point_t* weights;  // [B, Q, M, K], the softmax of the logits; null where it is not wanted
};

template <typename value_type, typename points_type, typename grad_type>
struct BackwardParams {
  using value_t = value_type;
  using Points = points_type;
  using grad_t = grad_type;
  using point_t = typename Points::point_t;
  Problem problem;
  // inputs
  const value_t* grad_out;  // [B, Q, M, D]
  const value_t* value;     // [B, S, M, D]
  ValueStrides stride;
  const uint8_t* mask;  // [B, S] or null
  Points points;
  // outputs
  // [B, S, M, D], or null; CPU and deterministic CUDA: written; CUDA: zeroed by the caller, added
  // to
  grad_t* grad_value;
  typename GradientsOf<Points>::type grads;
};

}  // namespace vitadapter
