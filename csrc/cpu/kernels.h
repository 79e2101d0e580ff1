// SPDX-License-Identifier: Apache-2.0
// The CPU kernels as the launcher sees them: one table of functions per instruction set.
#pragma once

#include "../dtypes.h"
#include "../params.h"

namespace vitadapter::cpu {

// New memory faults once for each page that is first written, 4 KiB each: up to half of the time of
// a large call. Huge pages fault once per 2 MiB. Only advice: whether it is taken changes no
// result.
constexpr size_t kHugePage = size_t(1) << 21;
void advise_huge_pages(void* data, size_t bytes);

// Thrown where scratch memory is missing. Without members that each instruction set would compile
// under one name.
struct NoMemory {
  int64_t bytes;
};

// The points of a tile of queries are placed together, one head at a time: 512 points and their 10
// numbers stay in L1 beside the pixels that they read.
inline int64_t tile_queries(const Problem& n) {
  const int64_t queries = n.points >= 512 ? 1 : 512 / (n.points > 0 ? n.points : 1);
  return queries < n.queries ? queries : n.queries;
}

// How a problem is cut into tasks: groups of `heads` heads of an image, blocks of `queries`.
struct Cut {
  int64_t heads, queries;

  int64_t groups(const Problem& n) const { return (n.heads + heads - 1) / heads; }
  int64_t blocks(const Problem& n) const { return (n.queries + queries - 1) / queries; }
};

// Whether tasks of one size keep all threads busy: equal numbers of them, or many.
inline bool shared_well(int64_t tasks, int64_t threads) {
  return tasks % threads == 0 || tasks >= 4 * threads;
}

// Forward: one head's plane has the L2 cache for itself.
inline Cut forward_cut(const Problem& n) { return Cut{1, tile_queries(n)}; }

// Backward reads and writes more rows for each point, so that heads that lie side by side go
// together: as many as have their planes of value and of its gradient in the cache (2 MB) and leave
// `threads` threads equal shares, in blocks whose inputs take half a megabyte.
inline Cut backward_cut(const Problem& n, int64_t threads) {
  constexpr int64_t numbers = 1 << 17;
  const int64_t planes = 2 * (n.pixels + 1) * n.channels, all = n.batch * n.heads;
  int64_t heads = n.heads;
  while (heads > 1 && (n.heads % heads != 0 || heads * planes > 4 * numbers ||
                       !shared_well(all / heads, threads))) {
    --heads;
  }
  const int64_t queries = numbers / (heads * (n.channels + 3 * n.points));
  return Cut{heads, queries < 1 ? 1 : queries < n.queries ? queries : n.queries};
}

// How several threads share one plane's gradient of value: slices of its channels, each of which
// needs every point but none of the others' sums, and bands of its pixels, which cost a test for
// each corner and come second.
struct Shares {
  int64_t slices, bands;

  int64_t count() const { return slices * bands; }
};
constexpr int64_t kSliceChannels = 16;  // of any instruction set, whole vectors

// Enough shares to keep `threads` threads busy.
inline Shares shares(const Problem& n, int64_t threads) {
  const int64_t planes = n.batch * n.heads;
  Shares s{1, 1};
  const auto enough = [&] { return shared_well(planes * s.count(), threads); };
  while (!enough() && s.slices < n.channels / kSliceChannels) ++s.slices;
  while (!enough()) ++s.bands;
  return s;
}

// Work is handed out in ranges, so that the caller owns the threads. No two tasks write to the same
// memory, and every sum is taken in an order that the inputs alone decide, however they are cut.
template <typename value_t, typename Points>
struct Kernels {
  using Forward = ForwardParams<value_t, Points>;
  using Backward = BackwardParams<value_t, Points, value_t>;
  // Tasks (b, group, block).
  void (*forward)(const Forward&, Cut, int64_t begin, int64_t end);
  // Tasks (b, group, block): gradients of the points only.
  void (*backward_points)(const Backward&, Cut, int64_t begin, int64_t end);
  // Tasks (b, group, share): the gradient of value; with one share, all gradients.
  void (*backward_value)(const Backward&, Cut, Shares, int64_t begin, int64_t end);
};

// The kernels of both operators for one pair of dtypes.
template <typename value_t, typename point_t>
struct KernelsOf {
  Kernels<value_t, Located<point_t>> located;
  Kernels<value_t, Offsets<point_t>> offsets;

  const auto& get(const Located<point_t>*) const { return located; }
  const auto& get(const Offsets<point_t>*) const { return offsets; }
};

struct KernelTable {
  const char* isa;
#define VITADAPTER_MEMBER(name, value_t, point_t, value, points) \
  KernelsOf<value_t, point_t> name;                              \
  const auto& pair(const value_t*, const point_t*) const { return name; }
  VITADAPTER_DTYPE_PAIRS(VITADAPTER_MEMBER)
#undef VITADAPTER_MEMBER

  template <typename value_t, typename Points>
  const Kernels<value_t, Points>& get() const {
    const value_t* value = nullptr;
    const typename Points::point_t* point = nullptr;
    return pair(value, point).get(static_cast<const Points*>(nullptr));
  }
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
