// SPDX-License-Identifier: Apache-2.0
// ms_deform_attn on the CPU: checks and allocation (stable_utils.h), then torch's thread pool.
#include <atomic>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../stable_utils.h"
#include "kernels.h"

namespace vitadapter::cpu {
namespace {

// A thread should get at least this many bilinear samples of a channel; below that, waking it costs
// more than it saves (about 10 us against 0.1 ns per sample and channel).
constexpr int64_t kSamplesPerTask = 1 << 16;

// malloc maps blocks from this size on anew at every call; smaller ones it reuses.
constexpr size_t kAlwaysNew = size_t(1) << 25;

template <typename T>
void advise_for_output(T* data, int64_t size) {
  const size_t bytes = static_cast<size_t>(size) * sizeof(T);
  if (bytes >= kAlwaysNew) advise_huge_pages(data, bytes);
}

struct Cpu {
  static int32_t type() { return aoti_torch_device_type_cpu(); }

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  // Sums are taken in scratch memory, and every element of the gradient is written once.
  template <typename value_t>
  using grad_t = value_t;
  static constexpr bool kAddsToGradient = false;

  template <typename Task>
  static void run(const Problem& n, int64_t tasks, const Task& task) {
    if (n.pixels > INT32_MAX) {
      fail("value: expected at most 2^31 - 1 pixels for the CPU kernels, got ", n.pixels);
    }
    const int64_t samples = n.rows() * n.points * n.channels;
    const int64_t grain = kSamplesPerTask * tasks / (samples > 0 ? samples : 1);
    // Through the thread pool no exception comes with its text.
    std::atomic<int64_t> missing{0};
    torch::stable::parallel_for(0, tasks, grain > 0 ? grain : 1, [&](int64_t begin, int64_t end) {
      try {
        task(begin, end);
      } catch (const NoMemory& error) {
        missing = error.bytes;
      }
    });
    if (missing != 0) fail_without_memory(missing, "scratch of a CPU kernel");
  }

  template <typename value_t, typename Points>
  static void forward(const ForwardParams<value_t, Points>& p) {
    const auto& kernel = kernels().template get<value_t, Points>();
    const Problem& n = p.problem;
    const Cut cut = forward_cut(n);
    advise_for_output(p.out, n.rows() * n.channels);
    run(n, n.batch * cut.groups(n) * cut.blocks(n),
        [&](int64_t begin, int64_t end) { kernel.forward(p, cut, begin, end); });
  }

  template <typename value_t, typename Points>
  static void backward(const BackwardParams<value_t, Points, value_t>& p, bool, const Tensor&) {
    // Deterministic whether it is asked for or not.
    const auto& kernel = kernels().template get<value_t, Points>();
    const Problem& n = p.problem;
    const int64_t threads = torch::stable::get_num_threads();
    // A plane's gradient of value has one owner, or one for each share; the points then get a pass
    // of their own.
    const Shares share = shares(n, threads);
    const bool whole = share.count() == 1;
    const Cut cut = backward_cut(n, threads);
    const int64_t groups = n.batch * cut.groups(n);
    if (p.grads.any() && !(whole && p.grad_value != nullptr)) {
      run(n, groups * cut.blocks(n),
          [&](int64_t begin, int64_t end) { kernel.backward_points(p, cut, begin, end); });
    }
    if (p.grad_value != nullptr) {
      advise_for_output(p.grad_value, n.batch * n.pixels * n.heads * n.channels);
      run(n, groups * share.count(),
          [&](int64_t begin, int64_t end) { kernel.backward_value(p, cut, share, begin, end); });
    }
  }
};

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace vitadapter::cpu

STABLE_TORCH_LIBRARY_IMPL(vitadapter_ops, CPU, m) {
  using vitadapter::cpu::Cpu;
  m.impl("ms_deform_attn", TORCH_BOX(&vitadapter::launch_forward<Cpu>));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&vitadapter::launch_backward<Cpu>));
  m.impl("ms_deform_attn_from_offsets", TORCH_BOX(&vitadapter::launch_forward_from_offsets<Cpu>));
  m.impl("ms_deform_attn_from_offsets_backward",
         TORCH_BOX(&vitadapter::launch_backward_from_offsets<Cpu>));
}
