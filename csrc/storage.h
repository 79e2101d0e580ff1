// SPDX-License-Identifier: Apache-2.0
// How numbers are stored and computed. value_t is what lies in memory (fp64, fp32, fp16, bf16);
// acc_t<value_t> is what arithmetic is done in: fp64 for fp64, fp32 for everything else.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(USE_CUDA)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include "host_device.h"

namespace vitadapter {

#if defined(__CUDACC__) || defined(USE_CUDA)

using float16 = __half;
using bfloat16 = __nv_bfloat16;

VITADAPTER_HD float to_acc(float16 v) { return __half2float(v); }
VITADAPTER_HD float to_acc(bfloat16 v) { return __bfloat162float(v); }
VITADAPTER_HD void from_acc(float v, float16& out) { out = __float2half_rn(v); }
VITADAPTER_HD void from_acc(float v, bfloat16& out) { out = __float2bfloat16_rn(v); }

#else

// The host has no portable 16-bit float before C++23; these hold the bits and convert with round to
// nearest even, in integer arithmetic that the compiler can vectorise.
struct float16 {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

VITADAPTER_HD uint32_t float_bits(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof(u));
  return u;
}
VITADAPTER_HD float bits_float(uint32_t u) {
  float v;
  std::memcpy(&v, &u, sizeof(v));
  return v;
}

VITADAPTER_HD float to_acc(bfloat16 v) { return bits_float(static_cast<uint32_t>(v.bits) << 16); }

VITADAPTER_HD void from_acc(float v, bfloat16& out) {
  const uint32_t u = float_bits(v);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = u + 0x7fffu + ((u >> 16) & 1u);
  out.bits = nan ? uint16_t(0x7fc0) : static_cast<uint16_t>(rounded >> 16);
}

VITADAPTER_HD float to_acc(float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(v.bits & 0x7fffu) << 13;
  // Re-bias the exponent from 15 to 127 by a multiplication, which also normalises subnormals.
  const float scaled = bits_float(magnitude) * bits_float(0x77800000u);  // 2^112
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // inf and NaN
  return bits_float(float_bits(scaled) | special | sign);
}

VITADAPTER_HD void from_acc(float v, float16& out) {
  const uint32_t u = float_bits(v);
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // Below 2^-14: 0.5f has the spacing of half's subnormals, so the addition rounds for us.
    half = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(half | ((u >> 16) & 0x8000u));
}

#endif

VITADAPTER_HD float to_acc(float v) { return v; }
VITADAPTER_HD double to_acc(double v) { return v; }
VITADAPTER_HD void from_acc(float v, float& out) { out = v; }
VITADAPTER_HD void from_acc(double v, double& out) { out = v; }

// Of no other type: what is stored in another way does not compile.
template <typename T>
struct Accumulator;
template <>
struct Accumulator<double> {
  using type = double;
};
template <>
struct Accumulator<float> {
  using type = float;
};
template <>
struct Accumulator<float16> {
  using type = float;
};
template <>
struct Accumulator<bfloat16> {
  using type = float;
};
template <typename T>
using acc_t = typename Accumulator<T>::type;

}  // namespace vitadapter
