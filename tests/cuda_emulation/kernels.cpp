// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, launched in the emulation as csrc/cuda launches them, for Python: tensors come
// as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation.h"
// After the emulation, which stands in for the CUDA runtime.
#include "cuda/launch.cuh"
#include "dtypes.h"

namespace {

using namespace vitadapter;
using Numbers = std::vector<int64_t>;
using Addresses = std::vector<uintptr_t>;

// sizes: B, S, Q, M, D; levels: height, width, first pixel and points of each.
Problem make_problem(const Numbers& sizes, const Numbers& levels) {
  Problem p{};
  p.batch = sizes[0];
  p.pixels = sizes[1];
  p.queries = sizes[2];
  p.heads = sizes[3];
  p.channels = sizes[4];
  p.levels = static_cast<int>(levels.size() / 4);
  for (int l = 0; l < p.levels; ++l) {
    const int64_t* level = &levels[4 * l];
    p.level[l] = Level{static_cast<int32_t>(level[0]), static_cast<int32_t>(level[1]), level[2],
                       static_cast<int32_t>(p.points), static_cast<int32_t>(level[3])};
    p.points += level[3];
  }
  return p;
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Where points come from: addresses, and for Offsets the strides over B and Q of offsets and logits
// and the sizes B, L and width of the reference.
template <typename point_t>
void read(Located<point_t>& p, const Addresses& points, const Numbers&) {
  p = {at<point_t>(points[0]), at<point_t>(points[1])};
}
template <typename point_t>
void read(Offsets<point_t>& p, const Addresses& points, const Numbers& layout) {
  using acc = acc_t<point_t>;
  p.offsets = at<point_t>(points[0]);
  p.logits = at<point_t>(points[1]);
  p.reference = at<acc>(points[2]);
  p.scale = at<acc>(points[3]);
  p.offset = {layout[0], layout[1]};
  p.logit = {layout[2], layout[3]};
  p.reference_levels = static_cast<int>(layout[5]);
  p.width = static_cast<int>(layout[6]);
  p.reference_l = p.reference_levels == 1 ? 0 : p.width;
  p.reference_b = layout[4] == 1 ? 0 : layout[7] * p.reference_levels * p.width;
}

template <typename point_t>
void write(LocatedGradients<point_t>& p, const Addresses& grads) {
  p = {at<point_t>(grads[0]), at<point_t>(grads[1])};
}
template <typename point_t>
void write(OffsetsGradients<point_t>& p, const Addresses& grads) {
  p = {at<point_t>(grads[0]), at<point_t>(grads[1]), at<acc_t<point_t>>(grads[2]),
       at<point_t>(grads[3])};
}

// What both directions read.
template <typename Params>
Params make_params(const Numbers& sizes, const Numbers& levels, const Numbers& strides,
                   const Numbers& layout, const Addresses& points, const Addresses& rest) {
  Params p{};
  p.problem = make_problem(sizes, levels);
  p.value = at<typename Params::value_t>(rest[0]);
  p.stride = {strides[0], strides[1], strides[2]};
  p.mask = at<uint8_t>(rest[1]);
  read(p.points, points, layout);
  return p;
}

// Blocks as the launcher of csrc/cuda makes them, but a third as many as the work needs: the
// kernels have to stride.
template <typename Params>
void launch(void (*kernel)(Params), int64_t total, const cuda::LaunchShape& shape,
            const Params& params) {
  const int64_t blocks = (total + shape.threads - 1) / shape.threads;
  emulation::launch(kernel, static_cast<unsigned>((blocks + 2) / 3),
                    static_cast<unsigned>(shape.threads), static_cast<size_t>(shape.bytes), params);
}

// Both directions return the D of the kernel that served, 0 for the general one.
template <typename value_t, typename Points>
int forward(const Numbers& sizes, const Numbers& levels, const Numbers& strides,
            const Numbers& layout, const Addresses& points, const Addresses& rest, bool general) {
  auto p =
      make_params<ForwardParams<value_t, Points>>(sizes, levels, strides, layout, points, rest);
  p.out = at<value_t>(rest[2]);
  p.weights = at<typename Points::point_t>(rest[3]);
  int served = 0;
  cuda::dispatch(p, p.out, general, [&](auto channels) {
    served = channels();
    launch(cuda::ms_deform_attn_forward_kernel<value_t, Points, channels()>,
           p.problem.rows() * cuda::Group<value_t, channels()>::kLanes,
           cuda::forward_shape<value_t, channels()>(), cuda::ForwardArguments<value_t, Points>(p));
  });
  return served;
}

// `fixed`: integer sums like the gradient of value and their state, all zero, or nothing.
template <typename value_t, typename Points>
int backward(const Numbers& sizes, const Numbers& levels, const Numbers& strides,
             const Numbers& layout, const Addresses& points, const Addresses& rest,
             const Addresses& grads, const Addresses& fixed, bool general) {
  using point_t = typename Points::point_t;
  using Params = BackwardParams<value_t, Points, acc_t<value_t>>;
  auto params = make_params<Params>(sizes, levels, strides, layout, points, rest);
  params.grad_out = at<value_t>(rest[2]);
  params.grad_value = at<acc_t<value_t>>(rest[3]);
  write(params.grads, grads);
  cuda::BackwardArguments<value_t, Points> p(params);
  const Problem& n = p.problem;
  if (!fixed.empty()) {
    p.fixed.sums = at<unsigned long long>(fixed[0]);
    p.fixed.state = at<uint32_t>(fixed[1]);
    p.fixed.fraction = cuda::FixedPoint::fraction_for(n.queries * n.points);
    launch(cuda::ms_deform_attn_measure_kernel<value_t, point_t>, n.rows() * n.channels,
           {cuda::kFixedPointThreads, 0}, cuda::measure(p));
  }
  int served = 0;
  cuda::dispatch(p, p.grad_out, general, [&](auto channels) {
    served = channels();
    launch(cuda::ms_deform_attn_backward_kernel<value_t, Points, channels()>,
           n.rows() * cuda::Group<value_t, channels()>::kLanes,
           cuda::backward_shape<value_t, Points, channels()>(n.points), p);
  });
  if constexpr (std::is_same<acc_t<value_t>, float>::value) {
    if (!fixed.empty()) {
      const int64_t sums = n.batch * n.pixels * n.heads * n.channels;
      launch(cuda::ms_deform_attn_finish_kernel<float>, sums, {cuda::kFixedPointThreads, 0},
             {p.fixed, p.grad_value, sums});
    }
  }
  return served;
}

template <typename value_t, typename point_t>
void define(pybind11::module_& m, const std::string& dtypes) {
#if !defined(VITADAPTER_ONLY_BACKWARD)
  m.def(("forward_" + dtypes).c_str(), &forward<value_t, Located<point_t>>);
  m.def(("offsets_forward_" + dtypes).c_str(), &forward<value_t, Offsets<point_t>>);
#endif
  m.def(("backward_" + dtypes).c_str(), &backward<value_t, Located<point_t>>);
  m.def(("offsets_backward_" + dtypes).c_str(), &backward<value_t, Offsets<point_t>>);
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, m) {
  m.def("state_size", &cuda::FixedPoint::state_size);
  m.def("quotient",
        [](uint32_t number, int64_t divisor) { return cuda::Divisor(divisor).quotient(number); });
  m.def("fused_backward_shape", [](int64_t points) {
    const cuda::LaunchShape shape = cuda::backward_shape<float, Offsets<float>, 32>(points);
    return Numbers{shape.threads, shape.bytes};
  });
  // (b, q, m) of the row at a place in the order in which rows are taken, and its number in memory.
  m.def("row_at", [](const Numbers& sizes, const Numbers& levels, uint32_t place) {
    const Problem n = make_problem(sizes, levels);
    const cuda::RowIndex<uint32_t> index(n, cuda::RowOrder(n), place);
    return Numbers{index.b, index.q, index.m, index.row};
  });
#define VITADAPTER_DEFINE(name, value_t, point_t, value, points) define<value_t, point_t>(m, #name);
#if defined(VITADAPTER_ONLY_FP32)
  define<float, float>(m, "fp32");
#else
  VITADAPTER_DTYPE_PAIRS(VITADAPTER_DEFINE)
#endif
}
