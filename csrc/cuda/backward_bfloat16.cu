// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace vitadapter::cuda {

VITADAPTER_BACKWARD(bfloat16, bfloat16);

}  // namespace vitadapter::cuda
