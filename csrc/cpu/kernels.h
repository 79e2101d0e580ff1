// SPDX-License-Identifier: Apache-2.0
// The CPU kernels as the launcher sees them: one table of functions per instruction set.
#pragma once

#include "../params.h"
#include "../storage.h"

namespace vitadapter::cpu {

// Work is handed out in ranges so that the caller owns the threads. A row is one (b, q, m); a plane
// is one (b, m), which owns its slice of grad_value: planes never write to the same memory.
template <typename value_t, typename loc_t>
struct Kernels {
  using Forward = ForwardParams<value_t, loc_t>;
  using Backward = BackwardParams<value_t, loc_t, acc_t<value_t>>;
  void (*forward_rows)(const Forward&, int64_t begin, int64_t end);
  // Gradients of locations and weights only; grad_value must be null.
  void (*backward_rows)(const Backward&, int64_t begin, int64_t end);
  // All wanted gradients. The order of the sums depends on nothing but the inputs.
  void (*backward_planes)(const Backward&, int64_t begin, int64_t end);
};

struct KernelTable {
  const char* isa;
  Kernels<double, double> f64;
  Kernels<float, float> f32;
  Kernels<float16, float16> f16;
  Kernels<bfloat16, bfloat16> bf16;
  Kernels<float16, float> f16_f32;
  Kernels<bfloat16, float> bf16_f32;

  const Kernels<double, double>& get(const Kernels<double, double>*) const { return f64; }
  const Kernels<float, float>& get(const Kernels<float, float>*) const { return f32; }
  const Kernels<float16, float16>& get(const Kernels<float16, float16>*) const { return f16; }
  const Kernels<bfloat16, bfloat16>& get(const Kernels<bfloat16, bfloat16>*) const { return bf16; }
  const Kernels<float16, float>& get(const Kernels<float16, float>*) const { return f16_f32; }
  const Kernels<bfloat16, float>& get(const Kernels<bfloat16, float>*) const { return bf16_f32; }
};

KernelTable baseline_kernels();
#if defined(__x86_64__)
KernelTable avx2_kernels();
KernelTable avx512_kernels();
#endif

// The best table for this processor, chosen once. VITADAPTER_CPU_ISA=baseline|avx2|avx512 overrides
// it, for tests and comparisons; a set that the processor lacks is an error, never a crash.
const KernelTable& kernels();

}  // namespace vitadapter::cpu
