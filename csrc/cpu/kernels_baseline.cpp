// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on 64-bit Arm.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
// Vectors wider than a register are passed only to functions that are always inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

#define VITADAPTER_VECTOR_BYTES 16
#include "kernels.inl"

vitadapter::cpu::KernelTable vitadapter::cpu::baseline_kernels() {
  return kernel_table("baseline");
}
