// SPDX-License-Identifier: Apache-2.0
// What every launcher needs, once: the level table, the problem that its arguments pose, dtype
// dispatch. User-facing errors are raised in Python (vitadapter_ops/_checks.py); a check that fails
// here means that the raw operator was called with inconsistent arguments, and it must still never
// read out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "allocation.h"
#include "arguments.h"
#include "dtypes.h"
#include "params.h"
#include "storage.h"

namespace vitadapter {

// value, as any operator takes it.
template <typename Device>
Argument value_argument(const Tensor& tensor) {
  const Argument value("value", tensor, Device::type());
  value.expect_rank(4, "[B, S, M, D]");
#define VITADAPTER_VALUE(name, value_t, point_t, value, points) ScalarType::value,
  value.expect_dtype({VITADAPTER_DTYPE_PAIRS(VITADAPTER_VALUE)});
#undef VITADAPTER_VALUE
  return value;
}

// The dtype that arithmetic is done in beside it.
inline ScalarType compute_dtype(const Argument& value) {
  return value.dtype() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// A problem, from value and its levels; `points` of each level.
inline Problem make_problem(const Argument& value, const std::vector<int64_t>& spatial_shapes,
                            const std::vector<int64_t>& level_start_index,
                            const std::vector<int64_t>& points, int64_t queries) {
  const int64_t levels = static_cast<int64_t>(level_start_index.size());
  if (levels < 1 || levels > kMaxLevels) {
    fail("level_start_index: expected 1 to ", kMaxLevels, " levels, got ", levels);
  }
  if (static_cast<int64_t>(spatial_shapes.size()) != 2 * levels) {
    fail("spatial_shapes: expected ", 2 * levels, " sides (from level_start_index), got ",
         spatial_shapes.size());
  }
  if (static_cast<int64_t>(points.size()) != levels) {
    fail("points_per_level: expected ", levels, " numbers (from level_start_index), got ",
         points.size());
  }
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
    if (height <= 0 || width <= 0 || height > INT32_MAX || width > INT32_MAX || start < 0 ||
        start > p.pixels || height > (p.pixels - start) / width) {
      fail("spatial_shapes, level_start_index: expected level ", l, " to lie inside value's ",
           p.pixels, " pixels, got ", height, " x ", width, " from ", start);
    }
    if (points[l] < 0 || points[l] > INT32_MAX - p.points) {
      fail("points_per_level: expected 0 to ", INT32_MAX, " points in all, got ", points[l],
           " for level ", l);
    }
    p.level[l] = Level{static_cast<int32_t>(height), static_cast<int32_t>(width), start,
                       static_cast<int32_t>(p.points), static_cast<int32_t>(points[l])};
    p.points += points[l];
  }
  return p;
}

// Points have the dtype of value, or fp32 beside a 16-bit value.
inline void expect_points_dtype(const Argument& argument, const Argument& beside) {
  const bool wide = beside.dtype() == compute_dtype(beside);
#define VITADAPTER_POINTS(name, value_t, point_t, value, points) \
  beside.dtype() == ScalarType::value ? ScalarType::points : ScalarType::Undefined,
  argument.expect_dtype({VITADAPTER_DTYPE_PAIRS(VITADAPTER_POINTS)},
                        wide ? " (from value)" : " (that of value, or float32)");
#undef VITADAPTER_POINTS
}

inline Problem located_problem(const Argument& value, const std::vector<int64_t>& spatial_shapes,
                               const std::vector<int64_t>& level_start_index,
                               const Tensor& locations_in, const Tensor& weights_in) {
  const Argument locations("sampling_locations", locations_in, value);
  const Argument weights("attention_weights", weights_in, value);
  locations.expect_rank(6, "[B, Q, M, L, P, 2]");
  expect_points_dtype(locations, value);
  weights.expect_dtype({locations.dtype()}, " (from sampling_locations)");
  const int64_t levels = static_cast<int64_t>(level_start_index.size()), each = locations.size(4);
  const Problem p =
      make_problem(value, spatial_shapes, level_start_index,
                   std::vector<int64_t>(level_start_index.size(), each), locations.size(1));
  locations.expect_sizes({p.batch, p.queries, p.heads, levels, each, 2},
                         "value and level_start_index");
  weights.expect_sizes({p.batch, p.queries, p.heads, levels, each}, "sampling_locations");
  return p;
}

inline Problem offsets_problem(const Argument& value, const std::vector<int64_t>& spatial_shapes,
                               const std::vector<int64_t>& level_start_index,
                               const std::vector<int64_t>& points_per_level,
                               const Tensor& reference_in, const Tensor& offsets_in,
                               const Tensor& logits_in, const std::optional<Tensor>& mask_in,
                               const std::optional<Tensor>& scale_in) {
  const Argument reference("reference_points", reference_in, value);
  const Argument offsets("sampling_offsets", offsets_in, value);
  const Argument logits("attention_logits", logits_in, value);
  offsets.expect_rank(5, "[B, Q, M, K, 2]");
  expect_points_dtype(offsets, value);
  logits.expect_dtype({offsets.dtype()}, " (from sampling_offsets)");
  reference.expect_dtype({compute_dtype(value)}, " (from value)");
  const Problem p =
      make_problem(value, spatial_shapes, level_start_index, points_per_level, offsets.size(1));
  offsets.expect_sizes({p.batch, p.queries, p.heads, p.points, 2}, "value and points_per_level");
  logits.expect_sizes({p.batch, p.queries, p.heads, p.points}, "sampling_offsets");
  reference.expect_sizes({kAnySize, p.queries, kAnySize, kAnySize}, "sampling_offsets");
  if ((reference.size(0) != 1 && reference.size(0) != p.batch) ||
      (reference.size(2) != 1 && reference.size(2) != p.levels) ||
      (reference.size(3) != 2 && reference.size(3) != 4)) {
    fail("reference_points: expected [", p.batch, " or 1, ", p.queries, ", ", p.levels,
         " or 1, 2 or 4] (from value and level_start_index), got ", reference.sizes());
  }
  if (mask_in.has_value()) {
    const Argument mask("padding_mask", *mask_in, value);
    mask.expect_dtype({ScalarType::Bool});
    mask.expect_sizes({p.batch, p.pixels}, "value");
  }
  if (scale_in.has_value()) {
    const Argument scale("offset_scale", *scale_in, value);
    scale.expect_dtype({compute_dtype(value)}, " (from value)");
    scale.expect_sizes({p.points}, "points_per_level");
    if (reference.size(3) != 4) {
      fail("offset_scale: expected none beside reference_points of width 2, got a tensor");
    }
  }
  return p;
}

// value as a kernel reads it: channels contiguous, any stride over batch, pixels and heads.
inline Tensor with_contiguous_channels(const Tensor& value) {
  return value.stride(3) == 1 || value.size(3) == 1 ? value : as_contiguous(value);
}

inline ValueStrides value_strides(const Tensor& value) {
  return ValueStrides{value.stride(0), value.stride(1), value.stride(2)};
}

// The storage types of this header are layout-compatible with torch's, whose typed accessors would
// tie the kernels to torch headers. The dtypes have been checked.
template <typename T>
const T* const_ptr(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_ptr(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls launch(DtypePair<value_t, point_t>{}) for value and points of these dtypes, which the
// checks have let through.
template <typename Launch>
void dispatch_dtypes(ScalarType value_dtype, ScalarType points_dtype, const Launch& launch) {
#define VITADAPTER_LAUNCH(name, value_t, point_t, value, points)                \
  if (value_dtype == ScalarType::value && points_dtype == ScalarType::points) { \
    return launch(dtypes::name{});                                              \
  }
  VITADAPTER_DTYPE_PAIRS(VITADAPTER_LAUNCH)
#undef VITADAPTER_LAUNCH
  fail("value: expected a pair of dtypes that has kernels, got ", dtype_text(value_dtype),
       " with points in ", dtype_text(points_dtype));
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

  const uint8_t* mask_ptr() const {
    return mask.has_value() ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
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

// A tensor like `t` for a result that is needed, an empty one otherwise. Contiguous.
inline Tensor like_or_empty(const Tensor& t, bool needed, const char* what) {
  std::vector<int64_t> sizes{0};
  if (needed) sizes.assign(t.sizes().begin(), t.sizes().end());
  return make_empty(t, sizes, what);
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
    if (tensor.scalar_type() == dtype) return tensor;
    const int64_t bytes = 2 * tensor.numel();  // only the sums for 16-bit values are wider
    return allocating(tensor, bytes, "the gradient of value",
                      [&] { return torch::stable::to(tensor, dtype); });
  }

 private:
  static Tensor make(const Tensor& value, bool needed, bool zeros) {
    const int32_t dtype = Device::kAddsToGradient && value.scalar_type() != ScalarType::Double
                              ? aoti_torch_dtype_float32()
                              : dtype_code(value);
    std::vector<int64_t> sizes{0};
    if (needed) sizes.assign(value.sizes().begin(), value.sizes().end());
    return allocate(needed && zeros ? aoti_torch_aten_new_zeros : aoti_torch_aten_new_empty, value,
                    sizes, dtype, "the gradient of value");
  }
};

inline void check_grad_output(const Tensor& tensor, const Argument& value, const Problem& n) {
  const Argument grad("grad_output", tensor, value);
  grad.expect_dtype({value.dtype()}, " (from value)");
  grad.expect_sizes({n.batch, n.queries, n.heads * n.channels}, "the output");
}

// One launcher for both devices. A device provides `forward(params)` and `backward(params,
// deterministic, value)`, whose last argument is there to allocate beside; what is allocated,
// checked and skipped is the same everywhere.
template <typename Device>
Tensor launch_forward(const Tensor& value_in, const std::vector<int64_t>& spatial_shapes,
                      const std::vector<int64_t>& level_start_index, const Tensor& locations_in,
                      const Tensor& weights_in) {
  const Argument argument = value_argument<Device>(value_in);
  const Problem problem =
      located_problem(argument, spatial_shapes, level_start_index, locations_in, weights_in);
  const typename Device::Guard guard(value_in);
  const Tensor value = with_contiguous_channels(value_in);
  const Tensor locations = as_contiguous(locations_in);
  const Tensor weights = as_contiguous(weights_in);
  Tensor out = make_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels},
                          "the output");
  if (out.numel() == 0) return out;
  dispatch_dtypes(value.scalar_type(), locations.scalar_type(), [&](auto types) {
    using value_t = typename decltype(types)::value_t;
    using point_t = typename decltype(types)::point_t;
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
  const Argument argument = value_argument<Device>(value_in);
  const Problem problem =
      located_problem(argument, spatial_shapes, level_start_index, locations_in, weights_in);
  check_grad_output(grad_out_in, argument, problem);
  const typename Device::Guard guard(value_in);
  const Tensor grad_out = as_contiguous(grad_out_in);
  const Tensor value = with_contiguous_channels(value_in);
  const Tensor locations = as_contiguous(locations_in);
  const Tensor weights = as_contiguous(weights_in);
  const bool work =
      problem.rows() * problem.points > 0 && (need_value || need_locations || need_weights);
  ValueGradient<Device> grad_value(value, need_value, work,
                                   Device::kAddsToGradient && !deterministic);
  Tensor grad_locations =
      like_or_empty(locations, need_locations, "the gradient of sampling_locations");
  Tensor grad_weights = like_or_empty(weights, need_weights, "the gradient of attention_weights");
  if (work) {
    dispatch_dtypes(value.scalar_type(), locations.scalar_type(), [&](auto types) {
      using value_t = typename decltype(types)::value_t;
      using point_t = typename decltype(types)::point_t;
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
  const Argument argument = value_argument<Device>(value_in);
  const Problem problem =
      offsets_problem(argument, spatial_shapes, level_start_index, points_per_level, reference_in,
                      offsets_in, logits_in, mask_in, scale_in);
  const typename Device::Guard guard(value_in);
  const Tensor value = with_contiguous_channels(value_in);
  const OffsetsTensors points(reference_in, offsets_in, logits_in, mask_in, scale_in);
  Tensor out = make_empty(value, {problem.batch, problem.queries, problem.heads * problem.channels},
                          "the output");
  Tensor weights = like_or_empty(logits_in, return_weights, "the attention weights");
  if (out.numel() == 0) return {out, weights};
  dispatch_dtypes(value.scalar_type(), points.offsets.scalar_type(), [&](auto types) {
    using value_t = typename decltype(types)::value_t;
    using point_t = typename decltype(types)::point_t;
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
  const Argument argument = value_argument<Device>(value_in);
  const Problem problem =
      offsets_problem(argument, spatial_shapes, level_start_index, points_per_level, reference_in,
                      offsets_in, logits_in, mask_in, scale_in);
  check_grad_output(grad_out_in, argument, problem);
  if (grad_weights_in.has_value()) {
    const Argument grad("grad_weights", *grad_weights_in, argument);
    grad.expect_dtype({logits_in.scalar_type()}, " (from attention_logits)");
    grad.expect_sizes({problem.batch, problem.queries, problem.heads, problem.points},
                      "attention_logits");
  }
  const typename Device::Guard guard(value_in);
  const Tensor grad_out = as_contiguous(grad_out_in);
  std::optional<Tensor> grad_weights;
  if (grad_weights_in.has_value()) grad_weights = as_contiguous(*grad_weights_in);
  const Tensor value = with_contiguous_channels(value_in);
  const OffsetsTensors points(reference_in, offsets_in, logits_in, mask_in, scale_in);
  const bool work = problem.rows() * problem.points > 0 &&
                    (need_value || need_reference || need_offsets || need_logits);
  ValueGradient<Device> grad_value(value, need_value, work,
                                   Device::kAddsToGradient && !deterministic);
  Tensor grad_offsets =
      like_or_empty(points.offsets, need_offsets, "the gradient of sampling_offsets");
  Tensor grad_logits =
      like_or_empty(points.logits, need_logits, "the gradient of attention_logits");
  if (!work) {
    Tensor grad_reference =
        like_or_empty(points.reference, need_reference, "the gradient of reference_points");
    torch::stable::zero_(grad_reference);
    return {grad_value.finished(), grad_reference, grad_offsets, grad_logits};
  }
  // Of each head: a sum over heads in the kernel would need atomics.
  const int64_t levels = points.reference.size(2), width = points.reference.size(3);
  Tensor by_head = make_empty(points.reference,
                              need_reference ? std::vector<int64_t>{problem.batch, problem.queries,
                                                                    problem.heads, levels, width}
                                             : std::vector<int64_t>{0},
                              "the gradient of reference_points");
  dispatch_dtypes(value.scalar_type(), points.offsets.scalar_type(), [&](auto types) {
    using value_t = typename decltype(types)::value_t;
    using point_t = typename decltype(types)::point_t;
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
    const int64_t bytes =
        by_head.numel() / problem.heads * static_cast<int64_t>(by_head.element_size());
    grad_reference = allocating(by_head, bytes, "the gradient of reference_points", [&] {
      Tensor sum = torch::stable::sum(by_head, std::vector<int64_t>{2});
      const bool shared = points.reference.size(0) == 1 && problem.batch != 1;
      return shared ? torch::stable::sum(sum, std::vector<int64_t>{0}, true) : sum;
    });
  }
  return {grad_value.finished(), grad_reference, grad_offsets, grad_logits};
}

}  // namespace vitadapter
