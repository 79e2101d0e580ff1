// SPDX-License-Identifier: Apache-2.0
#include "launchers.cuh"

namespace vitadapter::cuda {

VITADAPTER_FORWARD(fp64);
VITADAPTER_BACKWARD(fp64);

void finish(const FinishArguments<float>& p) {
  launch(ms_deform_attn_finish_kernel<float>, p.count / kElementsPerThread + 1,
         {kFixedPointThreads, 0}, p);
}

}  // namespace vitadapter::cuda
