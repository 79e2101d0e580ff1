// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn on the CPU: checks and allocation (stable_utils.h), then torch's thread pool.
#include "../stable_utils.h"
#include "kernels.h"

namespace vitadapter::cpu {
namespace {

// A thread should get at least this many bilinear samples of a channel; below that, waking it costs
// more than it saves (about 10 us against 0.1 ns per sample and channel).
constexpr int64_t kSamplesPerTask = 1 << 16;

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  // How many of `tasks` equal shares of the problem make one task worth a thread.
  static int64_t grain(const Problem& n, int64_t tasks) {
    const int64_t samples = n.rows() * n.levels * n.points * n.channels;
    return std::max<int64_t>(1, kSamplesPerTask * tasks / std::max<int64_t>(1, samples));
  }

  template <typename value_t, typename loc_t>
  static void forward(const ForwardParams<value_t, loc_t>& p) {
    const auto& kernel = kernels().get(static_cast<Kernels<value_t, loc_t>*>(nullptr));
    const int64_t rows = p.problem.rows();
    torch::stable::parallel_for(0, rows, grain(p.problem, rows), [&](int64_t begin, int64_t end) {
      kernel.forward_rows(p, begin, end);
    });
  }

  template <typename value_t, typename loc_t, typename grad_t>
  static void backward(const BackwardParams<value_t, loc_t, grad_t>& p) {
    const auto& kernel = kernels().get(static_cast<Kernels<value_t, loc_t>*>(nullptr));
    // grad_value is summed by the one thread that owns its (b, m) plane: no atomics, and the same
    // bits for any number of threads.
    const bool by_plane = p.grad_value != nullptr;
    const int64_t tasks = by_plane ? p.problem.batch * p.problem.heads : p.problem.rows();
    const auto run = by_plane ? kernel.backward_planes : kernel.backward_rows;
    torch::stable::parallel_for(0, tasks, grain(p.problem, tasks),
                                [&](int64_t begin, int64_t end) { run(p, begin, end); });
  }
};

}  // namespace
}  // namespace vitadapter::cpu

STABLE_TORCH_LIBRARY_IMPL(vitadapter_ops, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&vitadapter::launch_forward<vitadapter::cpu::Cpu>));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&vitadapter::launch_backward<vitadapter::cpu::Cpu>));
}
