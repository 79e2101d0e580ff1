// SPDX-License-Identifier: Apache-2.0
// What a GPU can do of what multi-scale deformable attention needs: streams from memory, rows
// gathered from L1 and L2, rows added to in L2, products and multiply-adds.
//
//   nvcc -O3 -std=c++17 -arch=sm_90 -o ceilings ceilings.cu && ./ceilings > ceilings.json
//
// Prints one JSON document, or a line to stderr and exits with 1. Device 0; a few seconds. Every
// rate is of the best and of the median run, after warming up. Rows lie as in a value tensor
// [pixels, kHeads, D] that has a footprint of so many MiB: those that are read or added to are
// anywhere in it, or of one head within a window of pixels that each block has of its own.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#define CHECK(call) check((call), #call, __LINE__)

void check(cudaError_t error, const char* call, int line) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "ceilings: %s (line %d): %s\n", call, line, cudaGetErrorString(error));
  std::exit(1);
}

constexpr size_t kMiB = 1 << 20;
constexpr int kWarp = 32;
constexpr uint32_t kHeads = 8;
constexpr int kThreads = 256;
constexpr int kBlocks = 4;    // on each multiprocessor, all at the same time
constexpr int kInFlight = 8;  // loads of a lane: two points
constexpr int kWarmUp = 3, kRuns = 11;

// ---- Places ----

// The finalizer of MurmurHash3: neighbouring numbers become unrelated ones.
__device__ __forceinline__ uint32_t mixed(uint32_t x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// Pseudo-random rows, the same for all lanes of a group. Two multiplications for each: finding
// rows must not be what takes the time.
struct Rows {
  uint32_t state, first, count, step;

  // `rows` in all; window 0: any of them.
  __device__ __forceinline__ Rows(uint32_t rows, uint32_t window, uint32_t group)
      : state(mixed(group + 1)), first(0), count(rows), step(1) {
    if (window == 0) return;
    const uint32_t place = mixed(~blockIdx.x);
    first = __umulhi(place, rows / kHeads - window) * kHeads + place % kHeads;
    count = window;
    step = kHeads;
  }
  __device__ __forceinline__ uint32_t next() {
    state = state * 1664525u + 1013904223u;
    return first + __umulhi(state, count) * step;
  }
};

// The caller's group of LANES lanes, among those of the grid.
template <int LANES>
__device__ __forceinline__ uint32_t group_of_lanes() {
  return (blockIdx.x * blockDim.x + threadIdx.x) / LANES;
}

// ---- Gathers ----

constexpr uint32_t kWord = 0x01010101u;  // what the memory is full of

// Each lane 16 bytes of a row of LANES * 16; kInFlight rows are loaded before the first is used.
template <int LANES>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gather(const uint4* memory, uint32_t rows, uint32_t window, int each, uint32_t* wrong) {
  Rows row(rows, window, group_of_lanes<LANES>());
  const uint4* mine = memory + threadIdx.x % LANES;
  uint32_t sum = 0;
  for (int i = 0; i < each; i += kInFlight) {
    uint4 v[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) v[u] = mine[size_t{row.next()} * LANES];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) sum += v[u].x + v[u].y + v[u].z + v[u].w;
  }
  if (sum != 4 * each * kWord) atomicAdd(wrong, 1u);
}

// ---- Reductions ----

// What a lane adds at a time. A row has 32 numbers, and as many lanes as that takes.
struct FourFloats {
  static constexpr const char* kName = "red.v4.f32";
  static constexpr int kRowBytes = 128, kLanes = 8;
  static constexpr bool kVector = true;  // from sm_90 on
  __device__ __forceinline__ static void add(char* to) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %1, %1, %1};" ::"l"(to), "f"(1.0f)
                 : "memory");
#endif
  }
  static double value(const char* from) {
    float v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  }
  static constexpr int kNumberBytes = 4;
};

struct OneFloat : FourFloats {
  static constexpr const char* kName = "red.f32";
  static constexpr int kLanes = 32;
  static constexpr bool kVector = false;
  __device__ __forceinline__ static void add(char* to) {
    asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(to), "f"(1.0f) : "memory");
  }
};

struct EightHalves {
  static constexpr const char* kName = "red.v4.bf16x2";
  static constexpr int kRowBytes = 64, kLanes = 4;
  static constexpr bool kVector = true;
  __device__ __forceinline__ static void add(char* to) {
#if __CUDA_ARCH__ >= 900
    asm volatile("red.relaxed.gpu.global.add.noftz.v4.bf16x2 [%0], {%1, %1, %1, %1};" ::"l"(to),
                 "r"(0x3f803f80u)  // twice 1
                 : "memory");
#endif
  }
  static double value(const char* from) {
    uint16_t upper;
    std::memcpy(&upper, from, sizeof(upper));
    const uint32_t bits = uint32_t{upper} << 16;
    float v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  }
  static constexpr int kNumberBytes = 2;
};

struct OneInteger {
  static constexpr const char* kName = "red.u64";
  static constexpr int kRowBytes = 256, kLanes = 32;
  static constexpr bool kVector = false;
  __device__ __forceinline__ static void add(char* to) {
    asm volatile("red.relaxed.gpu.global.add.u64 [%0], %1;" ::"l"(to), "l"(1ull) : "memory");
  }
  static double value(const char* from) {
    uint64_t v;
    std::memcpy(&v, from, sizeof(v));
    return static_cast<double>(v);
  }
  static constexpr int kNumberBytes = 8;
};

template <typename Kind>
__global__ void __launch_bounds__(kThreads, kBlocks)
    reduce(char* memory, uint32_t rows, uint32_t window, int each) {
  Rows row(rows, window, group_of_lanes<Kind::kLanes>());
  char* mine = memory + threadIdx.x % Kind::kLanes * (Kind::kRowBytes / Kind::kLanes);
#pragma unroll 4
  for (int i = 0; i < each; ++i) Kind::add(mine + size_t{row.next()} * Kind::kRowBytes);
}

// ---- Arithmetic ----

constexpr int kArithmeticThreads = 1024;  // one block on each multiprocessor
constexpr int kChains = 4;                // independent products or sums of a thread
constexpr int kUnrolled = 8;

// Clocks of this block, from the last thread's start to the last one's end.
struct Stopwatch {
  long long* clocks;
  long long began = 0;
  __device__ __forceinline__ explicit Stopwatch(long long* all) : clocks(all) {
    __syncthreads();
    began = clock64();
  }
  __device__ __forceinline__ void stop() const {
    __syncthreads();
    if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - began;
  }
};

// D = A B + D, A 16 x 16 and B 16 x 8 in bf16, D in fp32.
__global__ void __launch_bounds__(kArithmeticThreads, 1)
    multiply_matrices(int each, uint32_t a, uint32_t b, long long* clocks, float* result) {
  float d[kChains][4] = {};
  const Stopwatch watch(clocks);
  for (int i = 0; i < each; ++i) {
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int c = 0; c < kChains; ++c) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %4, %4, %4}, {%5, %5}, {%0, %1, %2, %3};"
            : "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
            : "r"(a), "r"(b));
      }
    }
  }
  watch.stop();
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += d[c][0] + d[c][1] + d[c][2] + d[c][3];
  result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(kArithmeticThreads, 1)
    multiply_and_add(int each, float a, float b, long long* clocks, float* result) {
  float d[kChains] = {};
  const Stopwatch watch(clocks);
  for (int i = 0; i < each; ++i) {
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
#pragma unroll
      for (int c = 0; c < kChains; ++c)
        asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(d[c]) : "f"(a), "f"(b));
    }
  }
  watch.stop();
  float sum = 0;
#pragma unroll
  for (int c = 0; c < kChains; ++c) sum += d[c];
  result[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

// ---- Measuring ----

struct Seconds {
  double best, median;
};

template <typename Run>
Seconds seconds_of(const Run& run) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<double> seconds;
  for (int i = 0; i < kWarmUp + kRuns; ++i) {
    CHECK(cudaEventRecord(begin));
    run();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= kWarmUp) seconds.push_back(milliseconds * 1e-3);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  std::sort(seconds.begin(), seconds.end());
  return {seconds.front(), seconds[seconds.size() / 2]};
}

struct Parameter {
  const char* name;
  int64_t value;
};

std::string document;

// `work`: in the unit, without its time.
void add_result(const char* name, const char* unit, double work, const Seconds& seconds,
                const std::vector<Parameter>& parameters) {
  char text[256];
  std::snprintf(text, sizeof(text),
                "%s\n    {\"name\": \"%s\", \"unit\": \"%s\", \"value\": %.6g, \"median\": %.6g",
                document.empty() ? "" : ",", name, unit, work / seconds.best,
                work / seconds.median);
  document += text;
  document += ", \"parameters\": {";
  for (size_t i = 0; i < parameters.size(); ++i) {
    std::snprintf(text, sizeof(text), "%s\"%s\": %lld", i == 0 ? "" : ", ", parameters[i].name,
                  static_cast<long long>(parameters[i].value));
    document += text;
  }
  document += "}}";
}

[[noreturn]] void fail(const std::string& why) {
  std::fprintf(stderr, "ceilings: %s\n", why.c_str());
  std::exit(1);
}

// ---- What is measured ----

constexpr size_t kFootprints[] = {4, 22, 45, 91};  // MiB: below L2, values of published encoders

// One after the other, so many that events measure them well. A copy's bytes count twice: they are
// read and written.
void measure_streams(char* from, char* to) {
  for (const size_t mib : {size_t{22}, size_t{45}, size_t{91}, size_t{1024}}) {
    const size_t bytes = mib * kMiB;
    const int times = static_cast<int>(std::max<size_t>(1, 1024 / mib));
    const Seconds copy = seconds_of([&] {
      for (int i = 0; i < times; ++i) {
        CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice));
      }
    });
    add_result("copy", "GB/s", 2e-9 * bytes * times, copy, {{"mib", int64_t(mib)}});
    const Seconds set = seconds_of([&] {
      for (int i = 0; i < times; ++i) CHECK(cudaMemsetAsync(to, 0, bytes));
    });
    add_result("memset", "GB/s", 1e-9 * bytes * times, set, {{"mib", int64_t(mib)}});
  }
}

template <int LANES>
void measure_gathers(const char* memory, uint32_t* wrong, int multiprocessors) {
  constexpr int kRowBytes = LANES * 16, kEach = 4096;
  const int blocks = multiprocessors * kBlocks;
  for (const size_t mib : kFootprints) {
    // With four blocks: windows of 32 and 128 KiB for L1, and one that L1 does not hold.
    for (const int window_kib : {0, 8, 32, 256}) {
      const uint32_t rows = static_cast<uint32_t>(mib * kMiB / kRowBytes);
      const uint32_t window = window_kib * 1024 / kRowBytes;
      const Seconds seconds = seconds_of([&] {
        gather<LANES><<<blocks, kThreads>>>(reinterpret_cast<const uint4*>(memory), rows, window,
                                            kEach, wrong);
      });
      add_result("gather", "GB/s", 1e-9 * 16 * blocks * kThreads * kEach, seconds,
                 {{"mib", int64_t(mib)}, {"row_bytes", kRowBytes}, {"window", int64_t(window)}});
    }
  }
  uint32_t lanes = 0;
  CHECK(cudaMemcpy(&lanes, wrong, sizeof(lanes), cudaMemcpyDeviceToHost));
  if (lanes != 0) fail("gather: " + std::to_string(lanes) + " lanes read something else");
}

// All that a launch adds has to arrive.
template <typename Kind>
void check_reduction(char* memory, int blocks, uint32_t window) {
  constexpr int kEach = 16;  // bf16 counts to 256
  constexpr size_t kBytes = 4 * kMiB;
  std::vector<char> host(kBytes);
  CHECK(cudaMemset(memory, 0, kBytes));
  reduce<Kind><<<blocks, kThreads>>>(memory, kBytes / Kind::kRowBytes, window, kEach);
  CHECK(cudaGetLastError());
  CHECK(cudaMemcpy(host.data(), memory, kBytes, cudaMemcpyDeviceToHost));
  double sum = 0;
  for (size_t i = 0; i < kBytes; i += Kind::kNumberBytes) sum += Kind::value(&host[i]);
  const double expected = double(blocks) * kThreads / Kind::kLanes * kEach * 32;
  if (sum != expected) {
    fail(std::string(Kind::kName) + ": the sum is " + std::to_string(sum) + ", expected " +
         std::to_string(expected));
  }
}

template <typename Kind>
void measure_reductions(char* memory, int multiprocessors) {
  constexpr int kEach = 1024;
  cudaFuncAttributes attributes;
  CHECK(cudaFuncGetAttributes(&attributes, reduce<Kind>));
  // For an older architecture, whose code may run on a newer one, it was compiled to nothing.
  if (Kind::kVector && attributes.ptxVersion < 90) return;
  const int blocks = multiprocessors * kBlocks;
  for (const uint32_t window : {0u, 800u}) check_reduction<Kind>(memory, blocks, window);
  for (const size_t mib : kFootprints) {
    for (const uint32_t window : {0u, 800u}) {
      const uint32_t rows = static_cast<uint32_t>(mib * kMiB / Kind::kRowBytes);
      CHECK(cudaMemset(memory, 0, mib * kMiB));
      const Seconds seconds =
          seconds_of([&] { reduce<Kind><<<blocks, kThreads>>>(memory, rows, window, kEach); });
      const double added = double(blocks) * kThreads / Kind::kLanes * kEach;
      add_result(Kind::kName, "GB/s", 1e-9 * added * Kind::kRowBytes, seconds,
                 {{"mib", int64_t(mib)}, {"row_bytes", Kind::kRowBytes}, {"window", window}});
    }
  }
}

// Per second; by clock and multiprocessor, in instructions of a warp; and the clock meanwhile.
template <typename Run>
void measure_arithmetic(const char* name, double flops, long long* clocks, int multiprocessors,
                        const Run& run) {
  constexpr int kEach = 4000;
  const double instructions = double(kEach) * kUnrolled * kChains * kArithmeticThreads / kWarp;
  const Seconds seconds = seconds_of([&] { run(kEach); });
  add_result(name, "TFLOP/s", 1e-12 * flops * instructions * multiprocessors, seconds, {});
  std::vector<long long> each(multiprocessors);  // of the last run
  CHECK(cudaMemcpy(each.data(), clocks, each.size() * sizeof(each[0]), cudaMemcpyDeviceToHost));
  std::sort(each.begin(), each.end());
  const double median = double(each[each.size() / 2]);
  add_result(name, "per clock", instructions, {double(each.front()), median}, {});
  add_result(name, "GHz", 1e-9 * median, seconds, {});
}

std::string escaped(const char* text) {
  std::string result;
  for (; *text != '\0'; ++text) {
    if (*text == '"' || *text == '\\') result += '\\';
    if (static_cast<unsigned char>(*text) >= ' ') result += *text;
  }
  return result;
}

int main() {
  cudaDeviceProp device;
  CHECK(cudaSetDevice(0));
  CHECK(cudaGetDeviceProperties(&device, 0));
  const int multiprocessors = device.multiProcessorCount;
  char *a, *b;
  CHECK(cudaMalloc(&a, 1024 * kMiB));
  CHECK(cudaMalloc(&b, 1024 * kMiB));
  CHECK(cudaMemset(a, 0, 1024 * kMiB));
  measure_streams(a, b);

  uint32_t* wrong = reinterpret_cast<uint32_t*>(b);
  CHECK(cudaMemset(wrong, 0, sizeof(*wrong)));
  CHECK(cudaMemset(a, kWord & 0xff, 91 * kMiB));
  measure_gathers<4>(a, wrong, multiprocessors);
  measure_gathers<8>(a, wrong, multiprocessors);

  measure_reductions<FourFloats>(a, multiprocessors);
  measure_reductions<OneFloat>(a, multiprocessors);
  measure_reductions<EightHalves>(a, multiprocessors);
  measure_reductions<OneInteger>(a, multiprocessors);

  long long* clocks = reinterpret_cast<long long*>(a);
  float* result = reinterpret_cast<float*>(b);
  // Twice 1 in bf16.
  measure_arithmetic("mma.m16n8k16 bf16", 2 * 16 * 8 * 16, clocks, multiprocessors, [&](int each) {
    multiply_matrices<<<multiprocessors, kArithmeticThreads>>>(each, 0x3f803f80u, 0x3f803f80u,
                                                               clocks, result);
  });
  measure_arithmetic("fma fp32", 2 * kWarp, clocks, multiprocessors, [&](int each) {
    multiply_and_add<<<multiprocessors, kArithmeticThreads>>>(each, 0.5f, 1.0f, clocks, result);
  });
  CHECK(cudaDeviceSynchronize());

  std::printf("{\n  \"device\": {\"name\": \"%s\", \"compute_capability\": \"%d.%d\", ",
              escaped(device.name).c_str(), device.major, device.minor);
  std::printf("\"multiprocessors\": %d, \"l2_mib\": %d},\n", multiprocessors,
              static_cast<int>(device.l2CacheSize / kMiB));
  std::printf("  \"ceilings\": [%s\n  ]\n}\n", document.c_str());
  if (std::fflush(stdout) != 0) fail("stdout cannot be written");
}
