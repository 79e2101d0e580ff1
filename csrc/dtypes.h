// SPDX-License-Identifier: Apache-2.0
// The pairs of dtypes that there are kernels for, once: everything that is compiled, launched or
// checked for each pair comes from this list. tests/ops/test_native_lists.py holds Python to it.
#pragma once

#include "storage.h"

// X(name, value_t, point_t, value, points): how tests and the units of csrc/cuda call the pair; how
// value and its points (locations and weights, or offsets and logits) are stored (storage.h); and
// torch's ScalarType of each.
#define VITADAPTER_DTYPE_PAIRS(X)                  \
  X(fp64, double, double, Double, Double)          \
  X(fp32, float, float, Float, Float)              \
  X(fp16, float16, float16, Half, Half)            \
  X(bf16, bfloat16, bfloat16, BFloat16, BFloat16)  \
  X(fp16_points_fp32, float16, float, Half, Float) \
  X(bf16_points_fp32, bfloat16, float, BFloat16, Float)

namespace vitadapter {

template <typename value_type, typename point_type>
struct DtypePair {
  using value_t = value_type;
  using point_t = point_type;
};

// Each pair by its name.
namespace dtypes {
#define VITADAPTER_NAME(name, value_t, point_t, value, points) \
  using name = DtypePair<value_t, point_t>;
VITADAPTER_DTYPE_PAIRS(VITADAPTER_NAME)
#undef VITADAPTER_NAME
}  // namespace dtypes

}  // namespace vitadapter
