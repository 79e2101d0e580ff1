// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace vitadapter::cuda {

VITADAPTER_FORWARD(fp16);

}  // namespace vitadapter::cuda
