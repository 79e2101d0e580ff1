// SPDX-License-Identifier: Apache-2.0
// Bytes per second that this machine loads from each level of its memory.
//
//   _bandwidth THREADS BYTES...
//
// For each BYTES, every thread sums a buffer of its own of that size again and again for a while,
// in the widest vectors the compiler makes, and the best of a few trials is printed: all threads
// together, in GB/s (1e9 bytes). The first line is the width of a vector in bytes.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
constexpr size_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr size_t kVectorBytes = 32;
#else
constexpr size_t kVectorBytes = 16;
#endif
typedef uint64_t Vector __attribute__((vector_size(kVectorBytes)));

constexpr size_t kChains = 8;        // independent sums: loads must not wait for additions
constexpr size_t kBatch = 1u << 20;  // bytes between two looks at the clock
constexpr double kSeconds = 0.02;
constexpr int kTrials = 10;

using Clock = std::chrono::steady_clock;

// Bytes per second of one thread over `vectors`, a multiple of kChains.
double sum_for_a_while(const Vector* buffer, size_t vectors) {
  const size_t passes = std::max<size_t>(1, kBatch / (vectors * kVectorBytes));
  Vector sums[kChains] = {};
  size_t done = 0;
  double elapsed = 0;
  const auto begin = Clock::now();
  while (elapsed < kSeconds) {
    for (size_t pass = 0; pass < passes; ++pass) {
      asm volatile("" : "+r"(buffer));  // may be another one each time: no pass serves for all
      for (size_t i = 0; i < vectors; i += kChains)
        for (size_t chain = 0; chain < kChains; ++chain) sums[chain] += buffer[i + chain];
    }
    done += passes * vectors * kVectorBytes;
    elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  }
  Vector total = {};
  for (const Vector& sum : sums) total += sum;
  asm volatile("" ::"m"(total));  // used, as far as the compiler knows
  return done / elapsed;
}

double best_of_trials(int threads, size_t bytes) {
  const size_t vectors = std::max(bytes / (kVectorBytes * kChains), size_t{1}) * kChains;
  double best = 0;
  for (int trial = 0; trial < kTrials; ++trial) {
    std::atomic<int> ready{0};
    std::vector<double> rates(threads);
    std::vector<std::thread> workers;
    for (int t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        void* memory = std::aligned_alloc(64, vectors * kVectorBytes);
        if (memory == nullptr) std::abort();
        Vector* buffer = static_cast<Vector*>(memory);
        std::fill(buffer, buffer + vectors, Vector{});  // also places the pages
        ++ready;
        while (ready < threads) std::this_thread::yield();
        rates[t] = sum_for_a_while(buffer, vectors);
        std::free(memory);
      });
    }
    for (std::thread& worker : workers) worker.join();
    double total = 0;
    for (double rate : rates) total += rate;
    best = std::max(best, total);
  }
  return best;
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: %s THREADS BYTES...\n", argv[0]);
    return 2;
  }
  const int threads = std::max(1, std::atoi(argv[1]));
  std::printf("%zu\n", kVectorBytes);
  for (int i = 2; i < argc; ++i)
    std::printf("%.3f\n", best_of_trials(threads, std::strtoull(argv[i], nullptr, 10)) / 1e9);
  return 0;
}
