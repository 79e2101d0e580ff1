// SPDX-License-Identifier: Apache-2.0
// How the kernels divide a warp, and what its lanes do together. No torch header.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "../storage.h"

// Whether memory takes four fp32 sums in one instruction.
#if !defined(VITADAPTER_VECTOR_REDUCTIONS)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define VITADAPTER_VECTOR_REDUCTIONS 1
#else
#define VITADAPTER_VECTOR_REDUCTIONS 0
#endif
#endif

namespace vitadapter::cuda {

constexpr int kWarp = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;

// VEC consecutive channels, moved by one load or store of up to 16 bytes.
template <typename value_t, int VEC>
struct alignas(VEC * sizeof(value_t)) Pack {
  value_t v[VEC];
};

// The lanes of a warp form groups, each of which works on one row (b, q, m): lane after lane has
// the next kVec of its D channels. CHANNELS is D; 0 is the general kernel, for any D and any size:
// one row for each warp, one channel for each lane, as often as it takes.
//
// A group has a power of two of lanes, so that sums over it are a few shuffles, and at least four,
// one for each corner of a point; with D = 12, 24 and 40 a few lanes have no channels.
template <typename value_t, int CHANNELS>
struct Group {
  static constexpr bool kGeneral = CHANNELS == 0;
  static constexpr int kWide = 16 / sizeof(value_t);
  static constexpr int kVec = kGeneral                                         ? 1
                              : CHANNELS % kWide == 0 && CHANNELS / kWide >= 3 ? kWide
                                                                               : 4;
  static constexpr int kPacks = CHANNELS / kVec;
  static constexpr int lanes_for(int packs) {
    int lanes = 4;
    while (lanes < packs) lanes *= 2;
    return lanes;
  }
  static constexpr int kLanes = kGeneral ? kWarp : lanes_for(kPacks);
  static constexpr int kRows = kWarp / kLanes;
  // Channels of a lane that takes every kLanes-th of them.
  static constexpr int kSpread = (CHANNELS + kLanes - 1) / kLanes;
  static_assert(CHANNELS % kVec == 0 && kLanes <= kWarp, "no kernel for this number of channels");

  // 32 bits hold every row and pixel, which the launcher checks; addresses have 64 bits anyway.
  using index_t = std::conditional_t<kGeneral, int64_t, uint32_t>;
  using pack = Pack<value_t, kVec>;
};

// Where a pixel of a head's plane is, `step` numbers from one to the next. With 32 bits for both
// this is one multiply-add of 64 bits.
template <typename pack, typename value_t, typename index_t>
__device__ __forceinline__ const pack* pixel_of(const value_t* plane, index_t pixel, index_t step) {
  using bytes_t = std::conditional_t<std::is_signed<index_t>::value, int64_t, uint64_t>;
  const bytes_t bytes = static_cast<bytes_t>(pixel) * static_cast<index_t>(step * sizeof(value_t));
  return reinterpret_cast<const pack*>(reinterpret_cast<const char*>(plane) + bytes);
}

template <int LANES, typename T>
__device__ __forceinline__ T group_sum(T v) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    v += __shfl_xor_sync(kAllLanes, v, offset);
  }
  return v;
}

template <int LANES, typename T>
__device__ __forceinline__ T group_max(T v) {
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, v, offset);
    v = other > v ? other : v;
  }
  return v;
}

// Four sums over a group at the price of two: lanes give away what they will not finish. Returns
// the sum of s[lane % 4].
template <int LANES, typename T>
__device__ __forceinline__ T group_sum_of_four(const T s[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const T a = (odd ? s[1] : s[0]) + __shfl_xor_sync(kAllLanes, odd ? s[0] : s[1], 1);
  const T b = (odd ? s[3] : s[2]) + __shfl_xor_sync(kAllLanes, odd ? s[2] : s[3], 1);
  T sum = (high ? b : a) + __shfl_xor_sync(kAllLanes, high ? a : b, 2);
#pragma unroll
  for (int offset = 4; offset < LANES; offset *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  return sum;
}

// Bit i: `predicate` of lane i of the caller's group.
template <int LANES>
__device__ __forceinline__ uint32_t group_ballot(bool predicate, int lane) {
  const uint32_t warp = __ballot_sync(kAllLanes, predicate);
  if constexpr (LANES == kWarp) return warp;
  return warp >> (lane / LANES * LANES) & ((1u << LANES % kWarp) - 1u);
}

// The memory that a launch asks for, shared by the threads of a block.
__device__ __forceinline__ unsigned char* block_memory() {
  extern __shared__ __align__(16) unsigned char vitadapter_block_memory[];
  return vitadapter_block_memory;
}

// Adds to four consecutive numbers in memory; other lanes may do so at the same time.
__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && VITADAPTER_VECTOR_REDUCTIONS
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(to), "f"(a), "f"(b), "f"(c), "f"(d));
#else
  atomicAdd(to, a), atomicAdd(to + 1, b), atomicAdd(to + 2, c), atomicAdd(to + 3, d);
#endif
}

}  // namespace vitadapter::cuda
