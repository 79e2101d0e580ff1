// SPDX-License-Identifier: Apache-2.0
// The sampling points of one row (b, q, m): where they come from (given, or computed from offsets
// and logits), how the lanes of a group place them once for all, and where their gradients go.
#pragma once

#include "../bilinear.h"
#include "rows.cuh"

namespace vitadapter::cuda {

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

// The k-th pair of numbers. Only the general kernel takes addresses that no pair may have.
template <typename Group, typename point_t, typename acc>
__device__ __forceinline__ void load_pair(const point_t* from, int k, acc& x, acc& y) {
  Pack<point_t, 2> pair;
  if constexpr (Group::kGeneral) {
    pair = {{from[2 * k], from[2 * k + 1]}};
  } else {
    pair = reinterpret_cast<const Pack<point_t, 2>*>(from)[k];
  }
  x = to_acc(pair.v[0]);
  y = to_acc(pair.v[1]);
}

template <typename point_t, typename acc>
__device__ __forceinline__ void store_pair(point_t* to, int64_t k, acc x, acc y) {
  Pack<point_t, 2> pair;
  from_acc(x, pair.v[0]);
  from_acc(y, pair.v[1]);
  reinterpret_cast<Pack<point_t, 2>*>(to)[k] = pair;
}

// A point as it lies in memory: a location and a weight, or an offset and a logit.
template <typename acc>
struct Stored {
  acc x, y, weight;
};

// The points of one row as a lane of its group reads them. `points` is 0 for a group that has no
// row: it reads nothing, and takes part in what the warp does together.
template <typename Points, typename Group>
struct Row;

template <typename point_t, typename Group>
struct Row<Located<point_t>, Group> {
  using acc = acc_t<point_t>;
  using index_t = typename Group::index_t;
  using Index = RowIndex<index_t>;

  __device__ __forceinline__ Row(const Problem& n, const Located<point_t>& p, const Index& i, int,
                                 int)
      : locations_(p.locations + product(i.row, static_cast<index_t>(2 * n.points))),
        weights_(p.weights + product(i.row, static_cast<index_t>(n.points))) {}

  __device__ __forceinline__ Stored<acc> read(int k) const {
    Stored<acc> at;
    load_pair<Group>(locations_, k, at.x, at.y);
    at.weight = to_acc(weights_[k]);
    return at;
  }
  // Position in pixels and attention weight.
  __device__ __forceinline__ Stored<acc> resolve(const Stored<acc>& at, const Level& level, int,
                                                 int) const {
    return {located(at.x, static_cast<acc>(level.width)),
            located(at.y, static_cast<acc>(level.height)), at.weight};
  }

 private:
  const point_t* locations_;
  const point_t* weights_;
};

template <typename point_t, typename Group>
struct Row<Offsets<point_t>, Group> {
  using acc = acc_t<point_t>;
  using Index = RowIndex<typename Group::index_t>;
  static constexpr int kLanes = Group::kLanes;

  __device__ __forceinline__ Row(const Problem& n, const Offsets<point_t>& p, const Index& i,
                                 int points, int lane)
      : p_(p),
        offsets_(p.offsets + i.b * p.offset.b + i.q * p.offset.q + 2 * i.m * n.points),
        logits_(p.logits + i.b * p.logit.b + i.q * p.logit.q + i.m * n.points),
        box_(p.box(i.b, i.q)) {
    // The first points' logits stay in registers; mostly there are no others.
    const int first = lane % kLanes;
    acc logit[Group::kEach];
    most_ = -INFINITY;
#pragma unroll
    for (int j = 0; j < Group::kEach; ++j) {
      const int k = first + j * kLanes;
      logit[j] = k < points ? to_acc(logits_[k]) : static_cast<acc>(-INFINITY);
      most_ = logit[j] > most_ ? logit[j] : most_;
    }
    for (int k = first + Group::kPoints; k < points; k += kLanes) {
      const acc other = to_acc(logits_[k]);
      most_ = other > most_ ? other : most_;
    }
    most_ = group_max<kLanes>(most_);
    acc sum = 0;
#pragma unroll
    for (int j = 0; j < Group::kEach; ++j) {
      if (first + j * kLanes < points) sum += exponential(logit[j] - most_);
    }
    for (int k = first + Group::kPoints; k < points; k += kLanes) {
      sum += exponential(to_acc(logits_[k]) - most_);
    }
    scale_ = acc(1) / group_sum<kLanes>(sum);
  }

  // Position = base + offset * step, on both axes.
  __device__ __forceinline__ void axes(const Level& level, int l, int k, Axis<acc>& x,
                                       Axis<acc>& y) const {
    const acc height = static_cast<acc>(level.height), width = static_cast<acc>(level.width);
    const acc* box = box_ + l * p_.reference_l;
    if (p_.width == 2) {
      x = beside_point(box[0], width);
      y = beside_point(box[1], height);
    } else {
      // The scale of a point multiplies last, as in the other backends.
      const acc all = p_.scale != nullptr ? acc(1) : p_.scale_of(level, k);
      x = beside_box(box[0], box[2], all, width);
      y = beside_box(box[1], box[3], all, height);
      if (p_.scale != nullptr) x.step *= p_.scale[k], y.step *= p_.scale[k];
    }
  }
  __device__ __forceinline__ void offset(int k, acc& x, acc& y) const {
    load_pair<Group>(offsets_, k, x, y);
  }
  __device__ __forceinline__ Stored<acc> read(int k) const {
    Stored<acc> at;
    offset(k, at.x, at.y);
    at.weight = to_acc(logits_[k]);
    return at;
  }
  __device__ __forceinline__ Stored<acc> resolve(const Stored<acc>& at, const Level& level, int l,
                                                 int k) const {
    Axis<acc> x, y;
    axes(level, l, k, x, y);
    return {x.base + at.x * x.step, y.base + at.y * y.step, attention(at.weight)};
  }
  __device__ __forceinline__ acc attention(acc logit) const {
    // mutant: softmax without its sum
    return exponential(logit - most_) * scale_;
  }
  __device__ __forceinline__ acc weight(int k) const { return attention(to_acc(logits_[k])); }

 private:
  const Offsets<point_t>& p_;
  const point_t* offsets_;
  const point_t* logits_;
  const acc* box_;
  acc most_, scale_;
};

// A point as its row's lanes read it from the block's memory: everything that does not depend on
// the channel. The weight of corner i is its bilinear weight times the point's attention weight.
template <typename acc, typename index_t>
struct alignas(16) Sample {
  acc weight[4];
  index_t pixel[4];
};

// A point in the lane that placed it.
template <typename acc>
struct Placed {
  acc x, y, attention;
  int level;
  int slot;         // where its Sample is; -1 where the point touches no pixel
  uint32_t masked;  // bit i: corner i reads as zero
};

// Where the lanes of a group keep the points that they have placed.
template <typename value_t, int CHANNELS>
struct Stage {
  using group = Group<value_t, CHANNELS>;
  using acc = acc_t<value_t>;
  using sample = Sample<acc, typename group::index_t>;
  static constexpr int kEach = group::kEach, kPoints = group::kPoints;
  // Between the rows of a warp, so that they read different banks.
  static constexpr int kPadding = 16;
  static constexpr int kRowBytes = kPoints * sizeof(sample) + kPadding;
  static constexpr int kWarpBytes = group::kRows * kRowBytes - kPadding;

  __device__ __forceinline__ static sample* of_row(unsigned char* memory, int lane) {
    return reinterpret_cast<sample*>(memory + lane / group::kLanes * kRowBytes);
  }

  // The j-th point of a lane.
  __device__ __forceinline__ static int point(int first, int j, int lane) {
    return first + j * group::kLanes + lane % group::kLanes;
  }

  // Places the points [first, first + kPoints) of a row that has `points`, and returns how many of
  // them touch the map: only those have a Sample, one after the other, in order. A corner beside
  // the map, or masked, has weight 0 and the pixel of another corner of the point: all four can be
  // read without a question, and nothing is read that the point does not touch. To be called by the
  // whole warp, and the warp to be synchronised before the Samples are read.
  template <bool MASKED, typename SomeRow>
  __device__ __forceinline__ static int place(const Problem& n, const Plan& plan,
                                              const SomeRow& row, const uint8_t* mask, int first,
                                              int points, int lane, sample* samples,
                                              Placed<acc> placed[kEach]) {
    // All are asked for before the first is used.
    Stored<acc> stored[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int k = point(first, j, lane);
      if (k < points) stored[j] = row.read(k);
    }
    int count = 0, l = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      // The same for all lanes of a warp.
      placed[j].slot = -1;
      if (j > 0 && first + j * group::kLanes >= static_cast<int>(n.points)) continue;
      const int k = point(first, j, lane);
      bool on_map = false;
      sample s;
      Placed<acc>& at = placed[j];
      if (k < points) {
        l = plan.level_of(n, k, l);
        const Level& level = n.level[l];
        const Stored<acc> resolved = row.resolve(stored[j], level, l, k);
        at.x = resolved.x;
        at.y = resolved.y;
        at.attention = resolved.weight;
        at.level = l;
        at.masked = 0;
        on_map =
            keep_on_map(at.x, at.y, static_cast<acc>(level.height), static_cast<acc>(level.width));
        // Of no use where it is not on the map, but then nothing has to be skipped either.
        const auto f = footprint(at.x, at.y, level.height, level.width);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // mutant: gradient without the attention weight
          s.weight[i] = at.attention * f.wy[i / 2] * f.wx[i % 2];
          s.pixel[i] = static_cast<index_t>(level.pixel(f.row[i / 2], f.column[i % 2]));
        }
        if constexpr (MASKED) {
          if (on_map && mask != nullptr) on_map = leave_out_masked(mask, s, at.masked);
        }
      }
      const uint32_t on = group_ballot<group::kLanes>(on_map, lane);
      if (on_map) {
        at.slot = count + __popc(on & ((1u << lane % group::kLanes) - 1u));
        samples[at.slot] = s;
      }
      // mutant: points that take the place of earlier ones
      count += __popc(on);
    }
    return count;
  }

 private:
  using index_t = typename group::index_t;

  // False where all four corners are masked.
  __device__ __forceinline__ static bool leave_out_masked(const uint8_t* mask, sample& s,
                                                          uint32_t& masked) {
    index_t readable = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (mask[s.pixel[i]])
        masked |= 1u << i;
      else
        readable = s.pixel[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (masked >> i & 1u) s.weight[i] = 0, s.pixel[i] = readable;
    }
    return masked != 15u;
  }
};

// Where the gradients of a row's points go. `add` is called for each point, by the lane that placed
// it; the others by the whole warp. `memory` is K numbers of the row's own.
template <typename Points, typename Group>
struct RowGradients;

template <typename point_t, typename Group>
struct RowGradients<Located<point_t>, Group> {
  using acc = acc_t<point_t>;
  using Index = RowIndex<typename Group::index_t>;
  using row_t = Row<Located<point_t>, Group>;
  static constexpr bool kNeedsMemory = false;

  __device__ __forceinline__ RowGradients(const Problem& n, const Located<point_t>&,
                                          const LocatedGradients<point_t>& grads, const Index& i,
                                          int, int, acc*)
      : grads_(grads), first_(i.row * n.points) {}

  __device__ __forceinline__ void add(const row_t&, const Level& level, int k, const Placed<acc>&,
                                      const PointGradient<acc>& g) {
    if (grads_.locations != nullptr) {
      store_pair(grads_.locations, first_ + k, g.x * static_cast<acc>(level.width),
                 g.y * static_cast<acc>(level.height));
    }
    if (grads_.weights != nullptr) from_acc(g.weight, grads_.weights[first_ + k]);
  }
  template <int EACH>
  __device__ __forceinline__ void add_references(const Problem&, const row_t&, int,
                                                 const Placed<acc> (&)[EACH],
                                                 const PointGradient<acc> (&)[EACH]) {}
  __device__ __forceinline__ void finish(const row_t&) {}

 private:
  const LocatedGradients<point_t>& grads_;
  int64_t first_;
};

template <typename point_t, typename Group>
struct RowGradients<Offsets<point_t>, Group> {
  using acc = acc_t<point_t>;
  using Index = RowIndex<typename Group::index_t>;
  using row_t = Row<Offsets<point_t>, Group>;
  static constexpr bool kNeedsMemory = true;
  static constexpr int kLanes = Group::kLanes;

  __device__ __forceinline__ RowGradients(const Problem& n, const Offsets<point_t>& p,
                                          const OffsetsGradients<point_t>& grads, const Index& i,
                                          int points, int lane, acc* memory)
      : p_(p),
        grads_(grads),
        first_(i.row * n.points),
        points_(points),
        lane_(lane % kLanes),
        memory_(memory) {
    const int size = p.reference_levels * p.width;
    if (grads.reference == nullptr) return;
    reference_ = grads.reference + static_cast<int64_t>(i.row) * size;
    for (int j = lane_; points > 0 && j < size; j += kLanes) reference_[j] = 0;
  }

  __device__ __forceinline__ void add(const row_t& row, const Level& level, int k,
                                      const Placed<acc>& point, const PointGradient<acc>& g) {
    if (grads_.offsets != nullptr) {
      Axis<acc> x, y;
      row.axes(level, point.level, k, x, y);
      store_pair(grads_.offsets, first_ + k, chain(g.x, x.step), chain(g.y, y.step));
    }
    if (grads_.logits != nullptr) {
      const acc total =
          grads_.weights == nullptr ? g.weight : g.weight + to_acc(grads_.weights[first_ + k]);
      memory_[k] = total;
      mean_ += point.attention * total;
    }
  }

  // A reference gathers the gradients of its level's points; those from `first` on have `g`.
  template <int EACH>
  __device__ __forceinline__ void add_references(const Problem& n, const row_t& row, int first,
                                                 const Placed<acc> (&placed)[EACH],
                                                 const PointGradient<acc> (&g)[EACH]) {
    if (grads_.reference == nullptr) return;
    for (int l = 0; l < n.levels; ++l) {
      const Level& level = n.level[l];
      if (level.first >= first + EACH * kLanes || level.first + level.points <= first) continue;
      acc box[4] = {};
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        const int k = first + j * kLanes + lane_;
        if (k >= points_ || placed[j].level != l) continue;
        const acc x = g[j].x * static_cast<acc>(level.width);
        const acc y = g[j].y * static_cast<acc>(level.height);
        box[0] += x;
        box[1] += y;
        if (p_.width == 4) {
          const acc scale = p_.scale_of(level, k);
          acc offset_x, offset_y;
          row.offset(k, offset_x, offset_y);
          box[2] += chain(x, scale * offset_x);
          box[3] += chain(y, scale * offset_y);
        }
      }
      // Of the row's first lane alone, which so adds to it in order.
      acc* to = reference_ + l * p_.reference_l;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const acc sum = group_sum<kLanes>(box[i]);
        // mutant: a reference that all lanes add to
        if (lane_ == 0 && points_ > 0 && i < p_.width) to[i] += sum;
      }
    }
  }

  // The gradient of a logit needs those of all weights of the row.
  __device__ __forceinline__ void finish(const row_t& row) {
    if (grads_.logits == nullptr) return;
    // mutant: the mean of one lane
    const acc mean = group_sum<kLanes>(mean_);
    __syncwarp();
    for (int k = lane_; k < points_; k += kLanes) {
      from_acc(row.weight(k) * (memory_[k] - mean), grads_.logits[first_ + k]);
    }
    __syncwarp();
  }

 private:
  const Offsets<point_t>& p_;
  const OffsetsGradients<point_t>& grads_;
  int64_t first_;
  int points_, lane_;
  acc* reference_ = nullptr;
  acc* memory_;
  acc mean_ = 0;
};

}  // namespace vitadapter::cuda
