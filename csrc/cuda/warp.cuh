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
// mutant: half of the warp in the mask
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
  static constexpr bool kFull = kPacks == kLanes;  // every lane has channels
  // Points are placed kPoints at a time, by each lane two of its own row, or one by a whole warp.
  static constexpr int kEach = kGeneral ? 1 : 2;
  static constexpr int kPoints = kEach * kLanes;
  // Channels of a lane that takes every kLanes-th of them.
  static constexpr int kSpread = (CHANNELS + kLanes - 1) / kLanes;
  static_assert(CHANNELS % kVec == 0 && kLanes <= kWarp, "no kernel for this number of channels");

  // 32 bits hold every row and pixel, which the launcher checks; addresses have 64 bits anyway.
  using index_t = std::conditional_t<kGeneral, int64_t, uint32_t>;
  using pack = Pack<value_t, kVec>;

  // D, known to the compiler where it can be.
  __device__ __forceinline__ static auto channels(const Problem& n) {
    if constexpr (kGeneral)
      return n.channels;
    else
      return uint32_t{CHANNELS};
  }
};

__device__ __forceinline__ int64_t product(int64_t a, int64_t b) { return a * b; }
// As one instruction, which together with an addition stays one: the compiler sees the factors' 32
// bits, but adds a zero to the upper half.
__device__ __forceinline__ uint64_t product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint64_t result;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(result) : "r"(a), "r"(b));
  return result;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

// Where a pixel of a head's plane is, `step` bytes from one to the next.
template <typename pack, typename value_t, typename index_t>
__device__ __forceinline__ const pack* pixel_of(const value_t* plane, index_t pixel, index_t step) {
  const char* first = reinterpret_cast<const char*>(plane);
  return reinterpret_cast<const pack*>(first + product(pixel, step));
}

// The numbers of a pack. bf16 is the upper half of an fp32: one operation for each.
template <typename value_t, int VEC, typename acc>
__device__ __forceinline__ void unpack(const Pack<value_t, VEC>& from, acc (&to)[VEC]) {
  if constexpr (std::is_same<value_t, bfloat16>::value && VEC % 2 == 0) {
    uint32_t words[VEC / 2];
    memcpy(words, &from, sizeof(words));
#pragma unroll
    for (int i = 0; i < VEC / 2; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int e = 0; e < VEC; ++e) to[e] = to_acc(from.v[e]);
  }
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
  // mutant: a lane that finishes another corner's sum
  T sum = (high ? b : a) + __shfl_xor_sync(kAllLanes, high ? a : b, 2);
#pragma unroll
  for (int offset = 4; offset < LANES; offset *= 2) {
    // mutant: four sums that miss half of the group
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

// Adds w * v to four consecutive numbers in memory, unless `some` is 0; other lanes may do so at
// the same time.
__device__ __forceinline__ void add_four(float* to, float w, const float v[4], float some) {
#if defined(__CUDA_ARCH__) && VITADAPTER_VECTOR_REDUCTIONS
  asm volatile(
      "{\n"
      " .reg .pred any;\n"
      " setp.neu.f32 any, %1, 0f00000000;\n"
      " @any red.relaxed.gpu.global.add.v4.f32 [%0], {%2, %3, %4, %5};\n"
      "}"
      :
      : "l"(to), "f"(some), "f"(w * v[0]), "f"(w * v[1]), "f"(w * v[2]), "f"(w * v[3]));
#else
  if (some == 0.0f) return;
  for (int e = 0; e < 4; ++e) atomicAdd(to + e, w * v[e]);
#endif
}

}  // namespace vitadapter::cuda
