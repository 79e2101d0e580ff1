// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for x86-64 with AVX2 and FMA.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

// After every other header: only the kernels may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define VITADAPTER_VECTOR_BYTES 32
#define VITADAPTER_AVX2
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

vitadapter::cpu::KernelTable vitadapter::cpu::avx2_kernels() { return kernel_table("avx2"); }

#endif
