// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for x86-64 with AVX2 and FMA.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"

#if defined(__x86_64__)

// After every other header: only the kernels may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

vitadapter::cpu::KernelTable vitadapter::cpu::avx2_kernels() { return kernel_table("avx2"); }

#endif
