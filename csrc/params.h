// SPDX-License-Identifier: Apache-2.0
// What a kernel is given: plain structs passed by value, so that kernels need no torch header and
// share no state between threads. B batch, S pixels of all levels, Q queries, M heads, D channels
// per head, L levels, P points.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace vitadapter {

struct Level {
  int32_t height, width;
  int64_t start;  // index of the level's first pixel along S

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
// its channels and all other tensors are contiguous.
struct ValueStrides {
  int64_t b, s, m;

  // Offset of head m of image b.
  VITADAPTER_HD int64_t plane(int64_t image, int64_t head) const { return image * b + head * m; }
};

template <typename value_t, typename loc_t>
struct ForwardParams {
  Problem problem;
  // inputs
  const value_t* value;  // [B, S, M, D]
  ValueStrides stride;
  const loc_t* locations;  // [B, Q, M, L, P, 2], (x, y)
  const loc_t* weights;    // [B, Q, M, L, P]
  // outputs
  value_t* out;  // [B, Q, M, D], every element is written
};

// A null output pointer means that this gradient is not wanted.
template <typename value_t, typename loc_t, typename grad_t>
struct BackwardParams {
  Problem problem;
  // inputs
  const value_t* grad_out;  // [B, Q, M, D]
  const value_t* value;     // [B, S, M, D]
  ValueStrides stride;
  const loc_t* locations;  // [B, Q, M, L, P, 2]
  const loc_t* weights;    // [B, Q, M, L, P]
  // outputs
  grad_t* grad_value;     // [B, S, M, D]; CPU: written; CUDA: zeroed by the caller, added to
  loc_t* grad_locations;  // [B, Q, M, L, P, 2], every element is written
  loc_t* grad_weights;    // [B, Q, M, L, P], every element is written

  // Whether the dot products of grad_out with value are needed.
  VITADAPTER_HD bool wants_points() const {
    return grad_locations != nullptr || grad_weights != nullptr;
  }
};

}  // namespace vitadapter
