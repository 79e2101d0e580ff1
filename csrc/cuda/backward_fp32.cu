// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace vitadapter::cuda {

VITADAPTER_BACKWARD(fp32);

}  // namespace vitadapter::cuda
