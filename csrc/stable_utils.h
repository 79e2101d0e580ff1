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

#include <optional>
#include <tuple>
#include <vector>

#include "params.h"
#include "storage.h"

namespace vitadapter {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A problem, from value and its levels; `points` of each level.
inline Problem make_problem(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                            const std::vector<int64_t>& level_start_index,
                            const std::vector<int64_t>& points, int64_t queries) {
  STD_TORCH_CHECK(value.dim() == 4, "value: expected 4 dimensions, got ", value.dim());
  const int64_t levels = static_cast<int64_t>(level_start_index.size());
  STD_TORCH_CHECK(levels >= 1 && levels <= kMaxLevels, "level_start_index: expected 1 to ",
                  kMaxLevels, " levels, got ", levels);
  STD_TORCH_CHECK(static_cast<int64_t>(spatial_shapes.size()) == 2 * levels &&
                      static_cast<int64_t>(points.size()) == levels,
                  "spatial_shapes, points_per_level: expected ", levels, " levels");
  Problem p{};
  p.batch = value.size(0);
  p.pixels = value.size(1);
  p.heads = value.size(2);
  p.channels = value.size(3);
  p.queries = queries;
  p.levels = static_cast<int>(levels);
  for (int64_t l = 0; l < levels; ++l) {
    const int64_t height = spatial_shapes[2 * l], width = spatial_shapes[2 * l + 1];
    const int64_t start = level_start_index[l];
    STD_TORCH_CHECK(height > 0 && width > 0 && height <= INT32_MAX && width <= INT32_MAX &&
                        start >= 0 && start <= p.pixels && height <= (p.pixels - start) / width,
                    "spatial_shapes: level ", l, " does not lie inside value's ", p.pixels,
                    " pixels");
    STD_TORCH_CHECK(points[l] >= 0 && points[l] <= INT32_MAX - p.points, "points_per_level: level ",
                    l, " has ", points[l], " points");
    p.level[l] = Level{static_cast<int32_t>(height), static_cast<int32_t>(width), start,
                       static_cast<int32_t>(p.points), static_cast<int32_t>(points[l])};
    p.points += points[l];
  }
  return p;
}

// Whether `t` has the sizes; -1 fits any.
inline bool has_sizes(const Tensor& t, const std::vector<int64_t>& sizes) {
  if (t.dim() != static_cast<int64_t>(sizes.size())) return false;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != -1 && t.size(static_cast<int64_t>(d)) != sizes[d]) return false;
  }
  return true;
}

inline Problem located_problem(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                               const std::vector<int64_t>& level_start_index,
                               const Tensor& locations, const Tensor& weights) {
  STD_TORCH_CHECK(locations.dim() == 6, "sampling_locations: expected 6 dimensions, got ",
                  locations.dim());
  STD_TORCH_CHECK(locations.scalar_type() == weights.scalar_type(),
                  "attention_weights: expected the dtype of sampling_locations");
  const int64_t levels = static_cast<int64_t>(level_start_index.size()), each = locations.size(4);
  const Problem p =
      make_problem(value, spatial_shapes, level_start_index,
                   std::vector<int64_t>(level_start_index.size(), each), locations.size(1));
  STD_TORCH_CHECK(has_sizes(locations, {p.batch, p.queries, p.heads, levels, each, 2}),
                  "sampling_locations: expected [B, Q, M, L, P, 2] with B, M of value");
  STD_TORCH_CHECK(has_sizes(weights, {p.batch, p.queries, p.heads, levels, each}),
                  "attention_weights: expected the first 5 sizes of sampling_locations");
  return p;
}

inline Problem offsets_problem(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                               const std::vector<int64_t>& level_start_index,
                               const std::vector<int64_t>& points_per_level,
                               const Tensor& reference, const Tensor& offsets, const Tensor& logits,
                               const std::optional<Tensor>& mask,
                               const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(offsets.dim() == 5, "sampling_offsets: expected 5 dimensions, got ",
                  offsets.dim());
  const Problem p =
      make_problem(value, spatial_shapes, level_start_index, points_per_level, offsets.size(1));
  STD_TORCH_CHECK(has_sizes(offsets, {p.batch, p.queries, p.heads, p.points, 2}),
                  "sampling_offsets: expected [B, Q, M, K, 2] with B, M of value and K points in "
                  "points_per_level");
  STD_TORCH_CHECK(has_sizes(logits, {p.batch, p.queries, p.heads, p.points}) &&
                      logits.scalar_type() == offsets.scalar_type(),
                  "attention_logits: expected the first 4 sizes and the dtype of sampling_offsets");
  STD_TORCH_CHECK(has_sizes(reference, {-1, p.queries, -1, -1}) &&
                      (reference.size(0) == 1 || reference.size(0) == p.batch) &&
                      (reference.size(2) == 1 || reference.size(2) == p.levels) &&
                      (reference.size(3) == 2 || reference.size(3) == 4),
                  "reference_points: expected [B or 1, Q, L or 1, 2 or 4]");
  STD_TORCH_CHECK(!mask.has_value() || (has_sizes(*mask, {p.batch, p.pixels}) &&
                                        mask->scalar_type() == ScalarType::Bool),
                  "padding_mask: expected bool [B, S]");
  STD_TORCH_CHECK(!scale.has_value() || (has_sizes(*scale, {p.points}) && reference.size(3) == 4),
                  "offset_scale: expected [K], beside boxes");
  return p;
}

// At a decoder's sizes a call is bound by the host. torch::stable::contiguous, new_empty and
// new_zeros find their operators by name, at about a microsecond each; these do not.
inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// aoti_torch_aten_new_empty or aoti_torch_aten_new_zeros.
using Allocator = decltype(aoti_torch_aten_new_empty);

inline Tensor allocate(Allocator& allocator, const Tensor& like, const std::vector<int64_t>& sizes,
                       int32_t dtype) {
  int32_t layout = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(allocator(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()),
                                   &dtype, &layout, &device_type, device_index, nullptr, &made));
  return Tensor(made);
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline Tensor make_empty(const Tensor& like, const std::vector<int64_t>& sizes) {
  return allocate(aoti_torch_aten_new_empty, like, sizes, dtype_code(like));
}

// value as a kernel reads it: channels contiguous, any stride over batch, pixels and heads.
inline Tensor with_contiguous_channels(const Tensor& value) {
  return value.stride(3) == 1 || value.size(3) == 1 ? value : as_contiguous(value);
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

// A tensor with a stride over B and Q, contiguous beyond: as it is where it is so.
inline Tensor with_contiguous_rows(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    if (t.size(d) != 1 && t.stride(d) != expected) return as_contiguous(t);
    expected *= t.size(d);
  }
  return t;
}

// The tensors of ms_deform_attn_from_offsets that place and weigh its points, kept alive beside the
// struct that points into them.
struct OffsetsTensors {
  Tensor reference, offsets, logits;
  std::optional<Tensor> mask, scale;

  OffsetsTensors(const Tensor& reference_in, const Tensor& offsets_in, const Tensor& logits_in,
                 const std::optional<Tensor>& mask_in, const std::optional<Tensor>& scale_in)
      : reference(as_contiguous(reference_in)),
        offsets(with_contiguous_rows(offsets_in)),
        logits(with_contiguous_rows(logits_in)) {
    if (mask_in.has_value()) mask = as_contiguous(*mask_in);
    if (scale_in.has_value()) scale = as_contiguous(*scale_in);
  }

  const bool* mask_ptr() const {
    return mask.has_value() ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  }

  template <typename point_t>
  Offsets<point_t> points() const {
    using acc = acc_t<point_t>;
    const int width = static_cast<int>(reference.size(3));
    const int levels = static_cast<int>(reference.size(2));
    Offsets<point_t> p{};
    p.offsets = const_ptr<point_t>(offsets);
    p.logits = const_ptr<point_t>(logits);
    p.offset = {offsets.stride(0), offsets.stride(1)};
    p.logit = {logits.stride(0), logits.stride(1)};
    p.reference = const_ptr<acc>(reference);
    p.reference_b = reference.size(0) == 1 ? 0 : reference.stride(0);
    p.reference_l = levels == 1 ? 0 : width;
    p.reference_levels = levels;
    p.width = width;
    p.scale = scale.has_value() ? const_ptr<acc>(*scale) : nullptr;
    return p;
  }
};

// A tensor like `t` for a gradient that is needed, an empty one otherwise. Contiguous.
inline Tensor gradient_like(const Tensor& t, bool needed) {
  std::vector<int64_t> sizes{0};
  if (needed) sizes.assign(t.sizes().begin(), t.sizes().end());
  return make_empty(t, sizes);
}

// The gradient of value, to be filled by the kernels; `finished` turns it into the dtype of value.
// Sums into one pixel may have thousands of terms: a device that adds to the gradient in memory
// does so in fp32 for 16-bit values.
template <typename Device>
struct ValueGradient {
  ScalarType dtype;
  Tensor tensor;

  // added_to: the kernels add to what is there, so that it has to be zero.
  ValueGradient(const Tensor& value, bool needed, bool work, bool added_to)
      : dtype(value.scalar_type()), tensor(make(value, needed, added_to || !work)) {}

  Tensor finished() const {
    return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  }

 private:
  static Tensor make(const Tensor& value, bool needed, bool zeros) {
    const int32_t dtype = Device::kAddsToGradient && value.scalar_type() != ScalarType::Double
                              ? aoti_torch_dtype_float32()
                              : dtype_code(value);
    std::vector<int64_t> sizes{0};
    if (needed) sizes.assign(value.sizes().begin(), value.sizes().end());
    return allocate(needed && zeros ? aoti_torch_aten_new_zeros : aoti_torch_aten_new_empty, value,
                    sizes, dtype);
  }
};

inline void check_grad_output(const Tensor& grad, const Tensor& value, const Problem& n) {
  STD_TORCH_CHECK(has_sizes(grad, {n.batch, n.queries, n.heads * n.channels}) &&
                      grad.scalar_type() == value.scalar_type(),
                  "grad_output: expected the shape and dtype of the output");
}

// One launcher for both devices. A device provides `forward(params)` and `backward(params,
// deterministic, value)`, whose last argument is there to allocate beside; what is allocated,
// checked and skipped is the same everywhere.
template <typename Device>
Tensor launch_forward(const Tensor& value_in, const std::vector<int64_t>& spatial_shapes,
                      const std::vector<int64_t>& level_start_index, const Tensor& locations_in,
                      const Tensor& weights_in) {
  const typename Device::Guard guard(value_in);
  const Problem problem =
      located_problem(value_in, spatial_shapes, level_start_index, locations_in, weights_in);
  const Tensor value = with_contiguous_channels(value_in);
  const Tensor locations = as_contiguous(locations_in);
  const Tensor weights = as_contiguous(weights_in);
  Tensor out =
      make_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels});
  if (out.numel() == 0) return out;
  dispatch_dtypes(value.scalar_type(), locations.scalar_type(), [&](auto types) {
    using value_t = typename decltype(types)::value_t;
    using point_t = typename decltype(types)::loc_t;
    Device::forward(ForwardParams<value_t, Located<point_t>>{
        problem,
        const_ptr<value_t>(value),
        value_strides(value),
        nullptr,
        {const_ptr<point_t>(locations), const_ptr<point_t>(weights)},
        mutable_ptr<value_t>(out),
        nullptr});
  });
  return out;
}

// A gradient that is not needed is returned as an empty tensor and never computed.
template <typename Device, bool deterministic = false>
std::tuple<Tensor, Tensor, Tensor> launch_backward(
    const Tensor& grad_out_in, const Tensor& value_in, const std::vector<int64_t>& spatial_shapes,
    const std::vector<int64_t>& level_start_index, const Tensor& locations_in,
    const Tensor& weights_in, bool need_value, bool need_locations, bool need_weights) {
  const typename Device::Guard guard(value_in);
  const Problem problem =
      located_problem(value_in, spatial_shapes, level_start_index, locations_in, weights_in);
  check_grad_output(grad_out_in, value_in, problem);
  const Tensor grad_out = as_contiguous(grad_out_in);
  const Tensor value = with_contiguous_channels(value_in);
  const Tensor locations = as_contiguous(locations_in);
  const Tensor weights = as_contiguous(weights_in);
  const bool work =
      problem.rows() * problem.points > 0 && (need_value || need_locations || need_weights);
  ValueGradient<Device> grad_value(value, need_value, work,
                                   Device::kAddsToGradient && !deterministic);
  Tensor grad_locations = gradient_like(locations, need_locations);
  Tensor grad_weights = gradient_like(weights, need_weights);
  if (work) {
    dispatch_dtypes(value.scalar_type(), locations.scalar_type(), [&](auto types) {
      using value_t = typename decltype(types)::value_t;
      using point_t = typename decltype(types)::loc_t;
      using grad_t = typename Device::template grad_t<value_t>;
      Device::backward(
          BackwardParams<value_t, Located<point_t>, grad_t>{
              problem,
              const_ptr<value_t>(grad_out),
              const_ptr<value_t>(value),
              value_strides(value),
              nullptr,
              {const_ptr<point_t>(locations), const_ptr<point_t>(weights)},
              need_value ? mutable_ptr<grad_t>(grad_value.tensor) : nullptr,
              {need_locations ? mutable_ptr<point_t>(grad_locations) : nullptr,
               need_weights ? mutable_ptr<point_t>(grad_weights) : nullptr}},
          deterministic, value);
    });
  }
  return {grad_value.finished(), grad_locations, grad_weights};
}

template <typename Device>
std::tuple<Tensor, Tensor> launch_forward_from_offsets(
    const Tensor& value_in, const std::vector<int64_t>& spatial_shapes,
    const std::vector<int64_t>& level_start_index, const std::vector<int64_t>& points_per_level,
    const Tensor& reference_in, const Tensor& offsets_in, const Tensor& logits_in,
    const std::optional<Tensor>& mask_in, const std::optional<Tensor>& scale_in,
    bool return_weights) {
  const typename Device::Guard guard(value_in);
  const Problem problem =
      offsets_problem(value_in, spatial_shapes, level_start_index, points_per_level, reference_in,
                      offsets_in, logits_in, mask_in, scale_in);
  const Tensor value = with_contiguous_channels(value_in);
  const OffsetsTensors points(reference_in, offsets_in, logits_in, mask_in, scale_in);
  Tensor out =
      make_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels});
  Tensor weights = gradient_like(logits_in, return_weights);
  if (out.numel() == 0) return {out, weights};
  dispatch_dtypes(value.scalar_type(), points.offsets.scalar_type(), [&](auto types) {
    using value_t = typename decltype(types)::value_t;
    using point_t = typename decltype(types)::loc_t;
    Device::forward(ForwardParams<value_t, Offsets<point_t>>{
        problem, const_ptr<value_t>(value), value_strides(value), points.mask_ptr(),
        points.points<point_t>(), mutable_ptr<value_t>(out),
        return_weights ? mutable_ptr<point_t>(weights) : nullptr});
  });
  return {out, weights};
}

template <typename Device, bool deterministic = false>
std::tuple<Tensor, Tensor, Tensor, Tensor> launch_backward_from_offsets(
    const Tensor& grad_out_in, const std::optional<Tensor>& grad_weights_in, const Tensor& value_in,
    const std::vector<int64_t>& spatial_shapes, const std::vector<int64_t>& level_start_index,
    const std::vector<int64_t>& points_per_level, const Tensor& reference_in,
    const Tensor& offsets_in, const Tensor& logits_in, const std::optional<Tensor>& mask_in,
    const std::optional<Tensor>& scale_in, bool need_value, bool need_reference, bool need_offsets,
    bool need_logits) {
  const typename Device::Guard guard(value_in);
  const Problem problem =
      offsets_problem(value_in, spatial_shapes, level_start_index, points_per_level, reference_in,
                      offsets_in, logits_in, mask_in, scale_in);
  check_grad_output(grad_out_in, value_in, problem);
  STD_TORCH_CHECK(!grad_weights_in.has_value() ||
                      (has_sizes(*grad_weights_in,
                                 {problem.batch, problem.queries, problem.heads, problem.points}) &&
                       grad_weights_in->scalar_type() == logits_in.scalar_type()),
                  "grad_weights: expected the shape and dtype of attention_logits");
  const Tensor grad_out = as_contiguous(grad_out_in);
  std::optional<Tensor> grad_weights;
  if (grad_weights_in.has_value()) grad_weights = as_contiguous(*grad_weights_in);
  const Tensor value = with_contiguous_channels(value_in);
  const OffsetsTensors points(reference_in, offsets_in, logits_in, mask_in, scale_in);
  const bool work = problem.rows() * problem.points > 0 &&
                    (need_value || need_reference || need_offsets || need_logits);
  ValueGradient<Device> grad_value(value, need_value, work,
                                   Device::kAddsToGradient && !deterministic);
  Tensor grad_offsets = gradient_like(points.offsets, need_offsets);
  Tensor grad_logits = gradient_like(points.logits, need_logits);
  if (!work) {
    Tensor grad_reference = gradient_like(points.reference, need_reference);
    torch::stable::zero_(grad_reference);
    return {grad_value.finished(), grad_reference, grad_offsets, grad_logits};
  }
  // Of each head: a sum over heads in the kernel would need atomics.
  const int64_t levels = points.reference.size(2), width = points.reference.size(3);
  Tensor by_head = make_empty(points.reference,
                              need_reference ? std::vector<int64_t>{problem.batch, problem.queries,
                                                                    problem.heads, levels, width}
                                             : std::vector<int64_t>{0});
  dispatch_dtypes(value.scalar_type(), points.offsets.scalar_type(), [&](auto types) {
    using value_t = typename decltype(types)::value_t;
    using point_t = typename decltype(types)::loc_t;
    using grad_t = typename Device::template grad_t<value_t>;
    Device::backward(
        BackwardParams<value_t, Offsets<point_t>, grad_t>{
            problem,
            const_ptr<value_t>(grad_out),
            const_ptr<value_t>(value),
            value_strides(value),
            points.mask_ptr(),
            points.points<point_t>(),
            need_value ? mutable_ptr<grad_t>(grad_value.tensor) : nullptr,
            {need_offsets ? mutable_ptr<point_t>(grad_offsets) : nullptr,
             need_logits ? mutable_ptr<point_t>(grad_logits) : nullptr,
             need_reference ? mutable_ptr<acc_t<point_t>>(by_head) : nullptr,
             grad_weights.has_value() ? const_ptr<point_t>(*grad_weights) : nullptr}},
        deterministic, value);
  });
  Tensor grad_reference = by_head;
  if (need_reference) {
    grad_reference = torch::stable::sum(by_head, std::vector<int64_t>{2});
    if (points.reference.size(0) == 1 && problem.batch != 1) {
      grad_reference = torch::stable::sum(grad_reference, std::vector<int64_t>{0}, true);
    }
  }
  return {grad_value.finished(), grad_reference, grad_offsets, grad_logits};
}

}  // namespace vitadapter
