// SPDX-License-Identifier: Apache-2.0
// The head widths D that have CUDA kernels of their own, once; the general kernel serves all
// others.
#pragma once

namespace vitadapter {

// Those of published models: 12, 24, 40 and 128 are those of DINOv3's adapters. A multiple of 4,
// and at most 32 packs (Group in cuda/warp.cuh).
constexpr int kHeadDims[] = {12, 16, 24, 32, 40, 64, 128};

}  // namespace vitadapter
