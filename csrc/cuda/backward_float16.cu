// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace vitadapter::cuda {

VITADAPTER_BACKWARD(float16, float16);

}  // namespace vitadapter::cuda
