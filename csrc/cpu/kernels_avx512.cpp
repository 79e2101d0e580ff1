// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
// GCC 12 warns of its own intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

// After every other header: only the kernels may use these instructions.
#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")
#endif

#define VITADAPTER_VECTOR_BYTES 64
#define VITADAPTER_AVX2
#define VITADAPTER_AVX512
#include "kernels.inl"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

vitadapter::cpu::KernelTable vitadapter::cpu::avx512_kernels() { return kernel_table("avx512"); }

#endif
