// SPDX-License-Identifier: Apache-2.0
// The CPU kernels for whatever the compiler targets by default: SSE2 on x86-64, NEON on 64-bit Arm.
#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "kernels.inl"

vitadapter::cpu::KernelTable vitadapter::cpu::baseline_kernels() {
  return kernel_table("baseline");
}
