// SPDX-License-Identifier: Apache-2.0
// The sampling points of one row (b, q, m) as the kernels read them: given, or computed from
// offsets and logits. What follows is the same for both operators.
#pragma once

#include "../bilinear.h"
#include "../params.h"
#include "../storage.h"

namespace vitadapter::cuda {

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

// Which row a thread works on.
struct RowIndex {
  int64_t row, b, q, m;

  __device__ __forceinline__ RowIndex(const Problem& n, int64_t index)
      : row(index),
        b(index / (n.heads * n.queries)),
        q(index / n.heads % n.queries),
        m(index % n.heads) {}
};

template <typename Points>
struct Row;

template <typename point_t>
struct Row<Located<point_t>> {
  using acc = acc_t<point_t>;

  __device__ __forceinline__ Row(const Problem& n, const Located<point_t>& p, const RowIndex& i)
      : locations_(p.locations + 2 * i.row * n.points), weights_(p.weights + i.row * n.points) {}

  __device__ __forceinline__ void turn_to(const Level& level, int) {
    height = static_cast<acc>(level.height);
    width = static_cast<acc>(level.width);
  }
  __device__ __forceinline__ void position(int64_t k, acc& x, acc& y) const {
    x = located(to_acc(locations_[2 * k]), width);
    y = located(to_acc(locations_[2 * k + 1]), height);
  }
  __device__ __forceinline__ acc weight(int64_t k) const { return to_acc(weights_[k]); }

  acc height, width;  // of the level

 private:
  const point_t* locations_;
  const point_t* weights_;
};

template <typename point_t>
struct Row<Offsets<point_t>> {
  using acc = acc_t<point_t>;

  // Two passes over the logits find their maximum and the sum of exponentials. They lie side by
  // side and are read by all threads of the row: no shuffle is needed.
  __device__ __forceinline__ Row(const Problem& n, const Offsets<point_t>& p, const RowIndex& i)
      : p_(p),
        offsets_(p.offsets + i.b * p.offset.b + i.q * p.offset.q + 2 * i.m * n.points),
        logits_(p.logits + i.b * p.logit.b + i.q * p.logit.q + i.m * n.points),
        box_(p.box(i.b, i.q)) {
    for (int64_t k = 0; k < n.points; ++k) {
      const acc logit = to_acc(logits_[k]);
      most_ = k == 0 || logit > most_ ? logit : most_;
    }
    acc sum = 0;
    for (int64_t k = 0; k < n.points; ++k) sum += exponential(to_acc(logits_[k]) - most_);
    scale_ = acc(1) / sum;
  }

  __device__ __forceinline__ void turn_to(const Level& level, int l) {
    height = static_cast<acc>(level.height);
    width = static_cast<acc>(level.width);
    const acc* box = box_ + l * p_.reference_l;
    if (p_.width == 2) {
      x_ = beside_point(box[0], width);
      y_ = beside_point(box[1], height);
    } else {
      const acc scale = p_.scale != nullptr ? acc(1) : p_.scale_of(level, 0);
      x_ = beside_box(box[0], box[2], scale, width);
      y_ = beside_box(box[1], box[3], scale, height);
    }
  }
  // How many pixels of the level an offset of 1 is.
  __device__ __forceinline__ acc step_x(int64_t k) const {
    return p_.scale != nullptr ? p_.scale[k] * x_.step : x_.step;
  }
  __device__ __forceinline__ acc step_y(int64_t k) const {
    return p_.scale != nullptr ? p_.scale[k] * y_.step : y_.step;
  }
  __device__ __forceinline__ acc offset_x(int64_t k) const { return to_acc(offsets_[2 * k]); }
  __device__ __forceinline__ acc offset_y(int64_t k) const { return to_acc(offsets_[2 * k + 1]); }

  __device__ __forceinline__ void position(int64_t k, acc& x, acc& y) const {
    x = x_.base + offset_x(k) * step_x(k);
    y = y_.base + offset_y(k) * step_y(k);
  }
  __device__ __forceinline__ acc weight(int64_t k) const {
    return exponential(to_acc(logits_[k]) - most_) * scale_;
  }

  acc height, width;  // of the level

 private:
  const Offsets<point_t>& p_;
  const point_t* offsets_;
  const point_t* logits_;
  const acc* box_;
  acc most_ = 0, scale_ = 0;
  Axis<acc> x_, y_;
};

// The gradients of one row's points, written by one lane of the warp as they come, and finished by
// all lanes: the gradient of a logit needs those of all weights of the row, which wait in `memory`,
// K numbers of the warp's own.
template <typename Points>
struct RowGradients;

template <typename point_t>
struct RowGradients<Located<point_t>> {
  using acc = acc_t<point_t>;
  static constexpr bool kNeedsMemory = false;

  __device__ __forceinline__ RowGradients(const Problem& n, const Located<point_t>&,
                                          const LocatedGradients<point_t>& grads, const RowIndex& i,
                                          acc*)
      : grads_(grads), first_(i.row * n.points) {}

  __device__ __forceinline__ void begin_level(int) {}
  __device__ __forceinline__ void add(const Row<Located<point_t>>& row, const Level&, int64_t k,
                                      acc, const PointGradient<acc>& g) {
    if (grads_.locations != nullptr) {
      from_acc(g.x * row.width, grads_.locations[2 * (first_ + k)]);
      from_acc(g.y * row.height, grads_.locations[2 * (first_ + k) + 1]);
    }
    if (grads_.weights != nullptr) from_acc(g.weight, grads_.weights[first_ + k]);
  }
  __device__ __forceinline__ void finish(const Row<Located<point_t>>&, int64_t, int, int) {}

 private:
  const LocatedGradients<point_t>& grads_;
  int64_t first_;
};

template <typename point_t>
struct RowGradients<Offsets<point_t>> {
  using acc = acc_t<point_t>;
  static constexpr bool kNeedsMemory = true;

  __device__ __forceinline__ RowGradients(const Problem& n, const Offsets<point_t>& p,
                                          const OffsetsGradients<point_t>& grads, const RowIndex& i,
                                          acc* memory)
      : p_(p),
        grads_(grads),
        first_(i.row * n.points),
        reference_(grads.reference == nullptr
                       ? nullptr
                       : grads.reference + i.row * p.reference_levels * p.width),
        memory_(memory) {}

  // By one lane: the reference of a level gathers the gradients of its points.
  __device__ __forceinline__ void begin_level(int l) {
    if (reference_ == nullptr) return;
    box_ = reference_ + l * p_.reference_l;
    if (l > 0 && p_.reference_l == 0) return;
    for (int i = 0; i < p_.width; ++i) box_[i] = 0;
  }
  __device__ __forceinline__ void add(const Row<Offsets<point_t>>& row, const Level& level,
                                      int64_t k, acc weight, const PointGradient<acc>& g) {
    if (grads_.offsets != nullptr) {
      from_acc(chain(g.x, row.step_x(k)), grads_.offsets[2 * (first_ + k)]);
      from_acc(chain(g.y, row.step_y(k)), grads_.offsets[2 * (first_ + k) + 1]);
    }
    if (reference_ != nullptr) {
      const acc x = g.x * row.width, y = g.y * row.height;
      box_[0] += x;
      box_[1] += y;
      if (p_.width == 4) {
        const acc scale = p_.scale_of(level, k);
        box_[2] += chain(x, scale * row.offset_x(k));
        box_[3] += chain(y, scale * row.offset_y(k));
      }
    }
    if (grads_.logits != nullptr) {
      const acc total =
          grads_.weights == nullptr ? g.weight : g.weight + to_acc(grads_.weights[first_ + k]);
      memory_[k] = total;
      mean_ += weight * total;
    }
  }
  // By all lanes, once `memory` is written; lane 0 has the mean.
  __device__ __forceinline__ void finish(const Row<Offsets<point_t>>& row, int64_t points, int lane,
                                         int lanes) {
    if (grads_.logits == nullptr) return;
    __syncwarp();
    const acc mean = __shfl_sync(0xffffffffu, mean_, 0);
    for (int64_t k = lane; k < points; k += lanes) {
      from_acc(row.weight(k) * (memory_[k] - mean), grads_.logits[first_ + k]);
    }
    __syncwarp();
  }

 private:
  const Offsets<point_t>& p_;
  const OffsetsGradients<point_t>& grads_;
  int64_t first_;
  acc* reference_;
  acc* box_ = nullptr;
  acc* memory_;
  acc mean_ = 0;
};

}  // namespace vitadapter::cuda
