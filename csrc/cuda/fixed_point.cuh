// SPDX-License-Identifier: Apache-2.0
// Sums whose bits do not depend on the order of their terms: the terms become integers. This makes
// the gradient of value repeatable although any number of threads adds to a pixel. No torch header.
//
// A term is w * b * g: attention weight, bilinear weight (at most 1), grad_out. With the largest
// |w| < 2^ew and |g| < 2^eg, w * b * g / 2^(ew + eg) is below 1, and a pixel gets at most N = Q * K
// of them, so that 62 - log2(N) bits after the point fit 64: 43 for an image of 800 x 1333 with 4
// levels and points. A term that is 2^19 times smaller than the largest possible one still has the
// 24 bits of fp32.
//
// A term that is not finite cannot be an integer, nor one of factors beyond 2^126. Either makes the
// element that it is added to NaN: a bit for each element says so.
#pragma once

#include "warp.cuh"

namespace vitadapter::cuda {

constexpr int kFixedPointThreads = 256;

struct FixedPoint {
  // Both zeroed by the caller.
  unsigned long long* sums = nullptr;  // like the gradient of value
  // Bits of the largest |grad_out| and |attention weight| below 2^126, 1 if some term is no
  // integer, and a bit for each sum that has such a term.
  uint32_t* state = nullptr;
  int fraction = 0;  // bits after the point; 0: there are no integer sums

  static constexpr int kGrad = 0, kWeight = 1, kSomeBad = 2, kBad = 3;
  static int64_t state_size(int64_t sums) { return kBad + (sums + 31) / 32; }

  static int fraction_for(int64_t terms) {
    int bits = 62;
    while (terms > 1) terms = (terms + 1) / 2, --bits;
    return bits;
  }
};

// The smallest e with v < 2^e, for a finite v >= 0 that is given by its bits.
__device__ __forceinline__ int exponent_above(uint32_t bits) {
  return static_cast<int>(bits >> 23) - 126;
}

// 2^e for -126 <= e <= 127.
__device__ __forceinline__ float power_of_two(int e) {
  return __uint_as_float(static_cast<uint32_t>(e + 127) << 23);
}

// The gradient of value of one head, as floating-point sums...
template <typename acc, typename index_t>
struct FloatSum {
  static constexpr bool kVectors = VITADAPTER_VECTOR_REDUCTIONS && std::is_same<acc, float>::value;
  acc* plane;
  index_t step;

  // `first`: of the plane; `pixel_step`: numbers from one pixel to the next.
  __device__ __forceinline__ FloatSum(acc* sums, int64_t first, index_t pixel_step)
      : plane(sums + first), step(pixel_step * static_cast<index_t>(sizeof(acc))) {}
  __device__ __forceinline__ acc* pixel(index_t index) const {
    return const_cast<acc*>(pixel_of<acc>(plane, index, step));
  }
  // A term of 0 costs nothing, and a weight of 0 is one unless g is not finite.
  __device__ __forceinline__ void add(acc* to, acc w, acc g) const {
    const acc term = w * g;
    if (term != acc(0)) atomicAdd(to, term);
  }
};

// ... and as integer ones.
template <typename index_t>
struct FixedPointSum {
  using sum_t = unsigned long long;
  static constexpr bool kVectors = false;
  const FixedPoint& fixed;
  sum_t* plane;
  index_t step;
  float weight_scale, grad_scale, one;

  __device__ __forceinline__ FixedPointSum(const FixedPoint& where, int64_t first,
                                           index_t pixel_step)
      : fixed(where),
        plane(where.sums + first),
        step(pixel_step * static_cast<index_t>(sizeof(sum_t))),
        weight_scale(power_of_two(-exponent_above(where.state[FixedPoint::kWeight]))),
        grad_scale(power_of_two(-exponent_above(where.state[FixedPoint::kGrad]))),
        one(power_of_two(where.fraction)) {}
  __device__ __forceinline__ sum_t* pixel(index_t index) const {
    return const_cast<sum_t*>(pixel_of<sum_t>(plane, index, step));
  }
  __device__ __forceinline__ void add(sum_t* to, float w, float g) const {
    const float term = (w * weight_scale) * (g * grad_scale) * one;
    if (term == 0.0f) return;
    if (fabsf(term) <= one) {
      atomicAdd(to, static_cast<sum_t>(__float2ll_rn(term)));
    } else {
      const int64_t index = to - fixed.sums;
      fixed.state[FixedPoint::kSomeBad] = 1;
      atomicOr(fixed.state + FixedPoint::kBad + index / 32, 1u << index % 32);
    }
  }
};

// What the sums are scaled by: the first two numbers of FixedPoint's state, zero before.
template <typename value_t, typename point_t>
struct MeasureArguments {
  const value_t* grad_out;
  int64_t grad_count;
  const point_t* weights;  // null where they are a softmax, at most 1
  int64_t weight_count;
  uint32_t* state;
};

// The bits of the largest |v| below 2^126 that this warp sees. Bits of numbers >= 0 have their
// order.
template <typename T>
__device__ __forceinline__ uint32_t largest_bits(const T* v, int64_t count) {
  float most = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += step) {
    const float magnitude = fabsf(to_acc(v[i]));
    if (magnitude < power_of_two(126) && magnitude > most) most = magnitude;
  }
  return __float_as_uint(group_max<kWarp>(most));
}

template <typename value_t, typename point_t>
__global__ void __launch_bounds__(kFixedPointThreads)
    ms_deform_attn_measure_kernel(const __grid_constant__ MeasureArguments<value_t, point_t> p) {
  const uint32_t grad = largest_bits(p.grad_out, p.grad_count);
  const uint32_t weight =
      p.weights == nullptr ? __float_as_uint(1.0f) : largest_bits(p.weights, p.weight_count);
  if (threadIdx.x % kWarp == 0) {
    atomicMax(p.state + FixedPoint::kGrad, grad);
    atomicMax(p.state + FixedPoint::kWeight, weight);
  }
}

template <typename grad_t>
struct FinishArguments {
  FixedPoint fixed;
  grad_t* grad_value;
  int64_t count;
};

// A template, so that of all units only the one that launches it compiles it.
template <typename grad_t>
__global__ void __launch_bounds__(kFixedPointThreads)
    ms_deform_attn_finish_kernel(const __grid_constant__ FinishArguments<grad_t> p) {
  const uint32_t* state = p.fixed.state;
  const int exponent = exponent_above(state[FixedPoint::kGrad]) +
                       exponent_above(state[FixedPoint::kWeight]) - p.fixed.fraction;
  const double scale = ldexp(1.0, exponent);
  const bool some_bad = state[FixedPoint::kSomeBad] != 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < p.count;
       i += step) {
    const double sum = static_cast<double>(static_cast<long long>(p.fixed.sums[i]));
    const bool bad = some_bad && state[FixedPoint::kBad + i / 32] >> i % 32 & 1u;
    p.grad_value[i] = bad ? NAN : static_cast<grad_t>(sum * scale);
  }
}

}  // namespace vitadapter::cuda
