// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, run by the emulation, for Python: tensors come as addresses.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "emulation.h"
// After the emulation, which stands in for the CUDA runtime.
#include "cuda/backward.cuh"
#include "cuda/forward.cuh"

namespace {

using namespace vitadapter;

Problem make_problem(const std::vector<int64_t>& sizes, const std::vector<int64_t>& levels) {
  Problem p{};
  p.batch = sizes[0];
  p.pixels = sizes[1];
  p.queries = sizes[2];
  p.heads = sizes[3];
  p.channels = sizes[4];
  p.points = sizes[5];
  p.levels = static_cast<int>(levels.size() / 3);
  for (int l = 0; l < p.levels; ++l) {
    p.level[l] = Level{static_cast<int32_t>(levels[3 * l]), static_cast<int32_t>(levels[3 * l + 1]),
                       levels[3 * l + 2]};
  }
  return p;
}

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A grid smaller than the work, so that the kernels have to stride.
constexpr unsigned kBlocks = 3;

template <typename value_t, typename loc_t>
void forward(const std::vector<int64_t>& sizes, const std::vector<int64_t>& levels,
             const std::vector<int64_t>& strides, const std::vector<uintptr_t>& pointers,
             bool packed) {
  const ForwardParams<value_t, loc_t> p{
      make_problem(sizes, levels), at<value_t>(pointers[0]), {strides[0], strides[1], strides[2]},
      at<loc_t>(pointers[1]),      at<loc_t>(pointers[2]),   at<value_t>(pointers[3])};
  constexpr int kVec = 16 / sizeof(value_t);
  const auto kernel = packed ? cuda::ms_deform_attn_forward_kernel<value_t, loc_t, kVec>
                             : cuda::ms_deform_attn_forward_kernel<value_t, loc_t, 1>;
  emulation::launch(kernel, kBlocks, cuda::kForwardThreads, p);
}

template <typename value_t, typename loc_t>
void backward(const std::vector<int64_t>& sizes, const std::vector<int64_t>& levels,
              const std::vector<int64_t>& strides, const std::vector<uintptr_t>& pointers) {
  const BackwardParams<value_t, loc_t, acc_t<value_t>> p{
      make_problem(sizes, levels),          at<value_t>(pointers[0]), at<value_t>(pointers[1]),
      {strides[0], strides[1], strides[2]}, at<loc_t>(pointers[2]),   at<loc_t>(pointers[3]),
      at<acc_t<value_t>>(pointers[4]),      at<loc_t>(pointers[5]),   at<loc_t>(pointers[6])};
  emulation::launch(cuda::ms_deform_attn_backward_kernel<value_t, loc_t>, kBlocks,
                    cuda::kBackwardThreads, p);
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, m) {
  m.def("forward_fp64", &forward<double, double>);
  m.def("forward_fp32", &forward<float, float>);
  m.def("forward_fp16", &forward<float16, float16>);
  m.def("forward_bf16", &forward<bfloat16, bfloat16>);
  m.def("forward_fp16_points_fp32", &forward<float16, float>);
  m.def("forward_bf16_points_fp32", &forward<bfloat16, float>);
  m.def("backward_fp64", &backward<double, double>);
  m.def("backward_fp32", &backward<float, float>);
  m.def("backward_fp16", &backward<float16, float16>);
  m.def("backward_bf16", &backward<bfloat16, bfloat16>);
  m.def("backward_fp16_points_fp32", &backward<float16, float>);
  m.def("backward_bf16_points_fp32", &backward<bfloat16, float>);
}
