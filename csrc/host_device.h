// SPDX-License-Identifier: Apache-2.0
// Functions for host and device.
#pragma once

#if defined(__CUDACC__)
#define VITADAPTER_HD __host__ __device__ __forceinline__
#else
// Always inlined, so that code compiled for one instruction set never ends up in another's callers.
#define VITADAPTER_HD inline __attribute__((always_inline))
#endif
