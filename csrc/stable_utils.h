// SPDX-License-Identifier: Apache-2.0
// What every launcher needs, once: the last line of checks, the level table, dtype dispatch.
// User-facing errors are raised in Python (vitadapter_ops/_checks.py); a check that fails here
// means that the raw operator was called with inconsistent arguments, and it must still never read
// out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>
#include <vector>

#include "params.h"
#include "storage.h"

namespace vitadapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Problem make_problem(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                            const std::vector<int64_t>& level_start_index, const Tensor& locations,
                            const Tensor& weights) {
  STD_TORCH_CHECK(value.dim() == 4, "value: expected 4 dimensions, got ", value.dim());
  STD_TORCH_CHECK(locations.dim() == 6, "sampling_locations: expected 6 dimensions, got ",
                  locations.dim());
  STD_TORCH_CHECK(weights.dim() == 5, "attention_weights: expected 5 dimensions, got ",
                  weights.dim());
  STD_TORCH_CHECK(locations.scalar_type() == weights.scalar_type(),
                  "attention_weights: expected the dtype of sampling_locations");
  const int64_t levels = locations.size(3);
  STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels, "sampling_locations: expected 1 to ",
                  kMaxLevels, " levels, got ", levels);
  STD_TORCH_CHECK(static_cast<int64_t>(spatial_shapes.size()) == 2 * levels &&
                      static_cast<int64_t>(level_start_index.size()) == levels,
                  "spatial_shapes, level_start_index: expected ", levels, " levels");

  Problem p{};
  p.batch = value.size(0);
  p.pixels = value.size(1);
  p.heads = value.size(2);
  p.channels = value.size(3);
  p.queries = locations.size(1);
  p.points = locations.size(4);
  p.levels = static_cast<int>(levels);
  STD_TORCH_CHECK(
      locations.size(0) == p.batch && locations.size(2) == p.heads && locations.size(5) == 2,
      "sampling_locations: expected [B, Q, M, L, P, 2] with B, M of value");
  for (int64_t d = 0; d < 5; ++d) {
    STD_TORCH_CHECK(weights.size(d) == locations.size(d),
                    "attention_weights: expected the first 5 sizes of sampling_locations");
  }
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t height = spatial_shapes[2 * l], width = spatial_shapes[2 * l + 1];
    const int64_t start = level_start_index[l];
    STD_TORCH_CHECK(height > 0 && width > 0 && height <= INT32_MAX && width <= INT32_MAX &&
                        start >= 0 && start <= p.pixels && height <= (p.pixels - start) / width,
                    "spatial_shapes: level ", l, " does not lie inside value's ", p.pixels,
                    " pixels");
    p.level[l] = Level{static_cast<int32_t>(height), static_cast<int32_t>(width), start};
  }
  return p;
}

// value as a kernel reads it: channels contiguous, any stride over batch, pixels and heads.
inline Tensor with_contiguous_channels(const Tensor& value) {
  return value.stride(3) == 1 || value.size(3) == 1 ? value : torch::stable::contiguous(value);
}

inline ValueStrides value_strides(const Tensor& value) {
  return ValueStrides{value.stride(0), value.stride(1), value.stride(2)};
}

template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<double> {
  static constexpr ScalarType value = ScalarType::Double;
};
template <>
struct DtypeOf<float> {
  static constexpr ScalarType value = ScalarType::Float;
};
template <>
struct DtypeOf<float16> {
  static constexpr ScalarType value = ScalarType::Half;
};
template <>
struct DtypeOf<bfloat16> {
  static constexpr ScalarType value = ScalarType::BFloat16;
};

// The storage types of this header are layout-compatible with torch's, whose typed accessors would
// tie the kernels to torch headers.
template <typename T>
const T* const_ptr(const Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == DtypeOf<T>::value, "unexpected dtype of an argument");
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_ptr(Tensor& t) {
  STD_TORCH_CHECK(t.scalar_type() == DtypeOf<T>::value, "unexpected dtype of an argument");
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename value_type, typename loc_type>
struct Types {
  using value_t = value_type;
  using loc_t = loc_type;
};

// Calls launch(Types<value_t, loc_t>{}) for the supported dtype pairs: locations and weights have
// the dtype of value, or fp32 beside a 16-bit value.
template <typename Launch>
void dispatch_dtypes(ScalarType value, ScalarType loc, const Launch& launch) {
  if (value == loc) {
    switch (value) {
      case ScalarType::Double:
        return launch(Types<double, double>{});
      case ScalarType::Float:
        return launch(Types<float, float>{});
      case ScalarType::Half:
        return launch(Types<float16, float16>{});
      case ScalarType::BFloat16:
        return launch(Types<bfloat16, bfloat16>{});
      default:
        break;
    }
  } else if (loc == ScalarType::Float) {
    switch (value) {
      case ScalarType::Half:
        return launch(Types<float16, float>{});
      case ScalarType::BFloat16:
        return launch(Types<bfloat16, float>{});
      default:
        break;
    }
  }
  STD_TORCH_CHECK(false, "value, sampling_locations: unsupported pair of dtypes");
}

// One launcher for both devices. A device provides `forward(params)` and `backward(params)`; what
// is allocated, checked and skipped is the same everywhere.
template <typename Device>
Tensor launch_forward(const Tensor& value_in, const std::vector<int64_t>& spatial_shapes,
                      const std::vector<int64_t>& level_start_index, const Tensor& locations_in,
                      const Tensor& weights_in) {
  const typename Device::Guard guard(value_in);
  const Problem problem =
      make_problem(value_in, spatial_shapes, level_start_index, locations_in, weights_in);
  const Tensor value = with_contiguous_channels(value_in);
  const Tensor locations = torch::stable::contiguous(locations_in);
  const Tensor weights = torch::stable::contiguous(weights_in);
  Tensor out = torch::stable::new_empty(
      value, {problem.batch, problem.queries, problem.heads * problem.channels});
  if (out.numel() == 0) return out;
  dispatch_dtypes(value.scalar_type(), locations.scalar_type(), [&](auto types) {
    using value_t = typename decltype(types)::value_t;
    using loc_t = typename decltype(types)::loc_t;
    Device::forward(ForwardParams<value_t, loc_t>{
        problem, const_ptr<value_t>(value), value_strides(value), const_ptr<loc_t>(locations),
        const_ptr<loc_t>(weights), mutable_ptr<value_t>(out)});
  });
  return out;
}

// A gradient that is not needed is returned as an empty tensor and never computed.
template <typename Device>
std::tuple<Tensor, Tensor, Tensor> launch_backward(
    const Tensor& grad_out_in, const Tensor& value_in, const std::vector<int64_t>& spatial_shapes,
    const std::vector<int64_t>& level_start_index, const Tensor& locations_in,
    const Tensor& weights_in, bool need_value, bool need_locations, bool need_weights) {
  const typename Device::Guard guard(value_in);
  const Problem problem =
      make_problem(value_in, spatial_shapes, level_start_index, locations_in, weights_in);
  STD_TORCH_CHECK(grad_out_in.dim() == 3 && grad_out_in.size(0) == problem.batch &&
                      grad_out_in.size(1) == problem.queries &&
                      grad_out_in.size(2) == problem.heads * problem.channels &&
                      grad_out_in.scalar_type() == value_in.scalar_type(),
                  "grad_output: expected the shape and dtype of the output");
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  const Tensor value = with_contiguous_channels(value_in);
  const Tensor locations = torch::stable::contiguous(locations_in);
  const Tensor weights = torch::stable::contiguous(weights_in);

  // Sums into one pixel may have thousands of terms. A device that adds to the gradient in memory
  // does so in fp32 for 16-bit values.
  const ScalarType value_dtype = value.scalar_type();
  const ScalarType grad_dtype = Device::kAddsToGradient && value_dtype != ScalarType::Double
                                    ? ScalarType::Float
                                    : value_dtype;
  const std::vector<int64_t> value_size =
      need_value
          ? std::vector<int64_t>{problem.batch, problem.pixels, problem.heads, problem.channels}
          : std::vector<int64_t>{0};
  const bool work =
      problem.rows() * problem.points > 0 && (need_value || need_locations || need_weights);
  Tensor grad_value = Device::kAddsToGradient || !work
                          ? torch::stable::new_zeros(value, value_size, grad_dtype)
                          : torch::stable::new_empty(value, value_size, grad_dtype);
  const auto like = [](const Tensor& t, bool needed) {
    return needed ? torch::stable::empty_like(t) : torch::stable::new_empty(t, {0});
  };
  Tensor grad_locations = like(locations, need_locations);
  Tensor grad_weights = like(weights, need_weights);

  if (work) {
    dispatch_dtypes(value_dtype, locations.scalar_type(), [&](auto types) {
      using value_t = typename decltype(types)::value_t;
      using loc_t = typename decltype(types)::loc_t;
      using grad_t = typename Device::template grad_t<value_t>;
      Device::backward(BackwardParams<value_t, loc_t, grad_t>{
          problem, const_ptr<value_t>(grad_out), const_ptr<value_t>(value), value_strides(value),
          const_ptr<loc_t>(locations), const_ptr<loc_t>(weights),
          need_value ? mutable_ptr<grad_t>(grad_value) : nullptr,
          need_locations ? mutable_ptr<loc_t>(grad_locations) : nullptr,
          need_weights ? mutable_ptr<loc_t>(grad_weights) : nullptr});
    });
  }
  if (value_dtype != grad_dtype) grad_value = torch::stable::to(grad_value, value_dtype);
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace vitadapter
