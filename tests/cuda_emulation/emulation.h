// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA's execution model to run the kernels of csrc/cuda on the host, unchanged: a grid
// of blocks, warps of 32 lanes that exchange values through shuffles, memory of a block, atomics.
// Include it before a .cuh.
//
// A block's dynamic shared memory is as large as its launch asks for. It begins as NaN, and so does
// what lies beyond, which no thread may write.
//
// Every thread of a block is a fiber with its own stack; blocks run one after the other. A shuffle
// stores the lane's value and waits until all lanes of its mask have stored theirs. Waiting that
// can never end, a lane outside its own mask and a read from a lane outside the mask are errors, as
// they are undefined on a GPU.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))

// What a kernel declares as its dynamic shared memory, one block's at a time. At most as much as
// the largest multiprocessors give a block (227 KiB), and some KiB to see writes beyond.
namespace vitadapter::cuda {
constexpr size_t kMostBlockMemory = 227 << 10;
__attribute__((aligned(16))) inline unsigned char vitadapter_block_memory[256 << 10];
}  // namespace vitadapter::cuda

namespace emulation {

struct Dim3 {
  unsigned x, y, z;
};

struct Warp {
  uint64_t slot[2][32];  // two buffers: a fast lane may be one shuffle ahead of a slow one
  uint32_t arrived = 0;
  uint64_t round = 0;
};

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::function<void()> kernel;
  std::string error;
  bool progress = false;
};

constexpr size_t kStackBytes = 128 * 1024;

inline Block* block;
inline jmp_buf scheduler;
inline Dim3 grid_size, block_size, block_index, thread_index;

inline void yield() {
  Fiber& fiber = block->fibers[thread_index.x];
  if (_setjmp(fiber.resume) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  try {
    block->kernel();
  } catch (const std::exception& error) {
    block->error = error.what();
  }
  block->fibers[thread_index.x].finished = true;
  block->progress = true;
  _longjmp(scheduler, 1);
}

// Runs one thread until it waits or ends.
inline void step(Fiber& fiber, unsigned index) {
  thread_index = {index, 0, 0};
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.stack.reset(new char[kStackBytes]);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  setcontext(&fiber.context);
}

// The dynamic shared memory of one block, and a guard behind it. Both patterns are NaN in every
// dtype; the guard's is none that arithmetic yields, so that a NaN written there shows.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) : guard_(begin() + bytes / sizeof(uint16_t)) {
    if (bytes > vitadapter::cuda::kMostBlockMemory) {
      throw std::runtime_error("no block has " + std::to_string(bytes) + " bytes of shared memory");
    }
    std::fill(begin(), guard_, uint16_t{0xffff});
    std::fill(guard_, end(), kGuard);
  }

  // Throws if the kernel wrote to the guard.
  void check() const {
    const uint16_t* written = std::find_if(guard_, end(), [](uint16_t v) { return v != kGuard; });
    if (written == end()) return;
    throw std::runtime_error("a kernel wrote to byte " + offset(written) + " of " + offset(guard_) +
                             " bytes of shared memory");
  }

 private:
  static constexpr uint16_t kGuard = 0xffa5;
  static uint16_t* begin() {
    return reinterpret_cast<uint16_t*>(vitadapter::cuda::vitadapter_block_memory);
  }
  static uint16_t* end() {
    return begin() + sizeof(vitadapter::cuda::vitadapter_block_memory) / sizeof(uint16_t);
  }
  static std::string offset(const uint16_t* p) {
    return std::to_string((p - begin()) * sizeof(uint16_t));
  }

  uint16_t* guard_;
};

// kernel<<<blocks, threads, bytes>>>(params)
template <typename Params>
void launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t bytes,
            const Params& params) {
  grid_size = {blocks, 1, 1};
  block_size = {threads, 1, 1};
  for (unsigned b = 0; b < blocks; ++b) {
    block_index = {b, 0, 0};
    const SharedMemory shared(bytes);
    Block current;
    current.fibers = std::vector<Fiber>(threads);
    current.warps.resize((threads + 31) / 32);
    current.kernel = [&] { kernel(params); };
    block = &current;
    bool running = true;
    while (running) {
      running = current.progress = false;
      for (unsigned t = 0; t < threads; ++t) {
        if (current.fibers[t].finished) continue;
        step(current.fibers[t], t);
        if (!current.error.empty()) throw std::runtime_error(current.error);
        running = true;
      }
      if (running && !current.progress) {
        throw std::runtime_error("lanes of a shuffle's mask never arrived");
      }
    }
    shared.check();
  }
}

// The value of lane `source`, from every lane of `mask`.
template <typename T>
T shuffle(uint32_t mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves at most 8 bytes");
  const unsigned lane = thread_index.x % 32;
  Warp& warp = block->warps[thread_index.x / 32];
  if (!(mask >> lane & 1u)) throw std::runtime_error("a lane shuffles outside its mask");
  if (source >= 32 || !(mask >> source & 1u)) {
    throw std::runtime_error("a shuffle reads from a lane outside its mask");
  }
  const uint64_t round = warp.round;
  std::memcpy(&warp.slot[round % 2][lane], &value, sizeof(T));
  warp.arrived |= 1u << lane;
  block->progress = true;
  if ((warp.arrived & mask) == mask) {
    warp.arrived &= ~mask;
    ++warp.round;
  } else {
    while (warp.round == round) yield();
  }
  T result;
  std::memcpy(&result, &warp.slot[round % 2][source], sizeof(T));
  return result;
}

}  // namespace emulation

#define gridDim (emulation::grid_size)
#define blockDim (emulation::block_size)
#define blockIdx (emulation::block_index)
#define threadIdx (emulation::thread_index)

template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lane_mask) {
  return emulation::shuffle(mask, value, threadIdx.x % 32 ^ static_cast<unsigned>(lane_mask));
}

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return emulation::shuffle(mask, value, static_cast<unsigned>(source));
}

inline void __syncwarp() { emulation::shuffle(0xffffffffu, 0, threadIdx.x % 32); }

// Which of the mask's lanes have a predicate that holds.
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  uint32_t votes = 0;
  for (unsigned source = 0; source < 32; ++source) {
    if (mask >> source & 1u)
      votes |= uint32_t(emulation::shuffle(mask, predicate, source)) << source;
  }
  return votes;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
inline long long __float2ll_rn(float value) { return std::llrintf(value); }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}

template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}

template <typename T>
T atomicOr(T* address, T value) {
  const T old = *address;
  *address = old | value;
  return old;
}
