// SPDX-License-Identifier: Apache-2.0
// The seam between torch and the kernels. ms_deform_attn.cpp reads torch's headers and compiles no
// kernel; the units (*.cu) compile the kernels, side by side, and read no header of torch, which
// costs more to parse than their kernels to compile.
#pragma once

#include <cuda_runtime.h>

#include <functional>

#include "../params.h"

namespace vitadapter::cuda {

// What the units need of torch. Defined in ms_deform_attn.cpp.
cudaStream_t current_stream();
void check(cudaError_t error, const char* file = __builtin_FILE(),
           const char* function = __builtin_FUNCTION(), int line = __builtin_LINE());
// Zeroed memory of that many bytes on the device of value, for as long as the call; `what` needs
// it.
using Zeros = std::function<void*(int64_t bytes, const char* what)>;

// What ms_deform_attn.cpp needs of the units, each of which instantiates them for some dtypes. The
// caller has set the device and knows that there is work.
template <typename value_t, typename Points>
void forward(const ForwardParams<value_t, Points>& params);
template <typename value_t, typename Points>
void backward(const BackwardParams<value_t, Points, acc_t<value_t>>& params, bool deterministic,
              const Zeros& zeros);

}  // namespace vitadapter::cuda
