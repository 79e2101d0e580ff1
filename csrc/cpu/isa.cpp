// SPDX-License-Identifier: Apache-2.0
// Which instruction set's kernels run in this process.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace vitadapter::cpu {
namespace {

// What this processor can run, best first.
std::vector<KernelTable> supported() {
  std::vector<KernelTable> tables;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    tables.push_back(avx512_kernels());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    tables.push_back(avx2_kernels());
  }
#endif
  tables.push_back(baseline_kernels());
  return tables;
}

KernelTable choose() {
  const std::vector<KernelTable> tables = supported();
  const char* wanted = std::getenv("VITADAPTER_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return tables.front();
  std::string names;
  for (const KernelTable& table : tables) {
    if (wanted == std::string(table.isa)) return table;
    names += names.empty() ? table.isa : std::string(", ") + table.isa;
  }
  throw std::runtime_error("VITADAPTER_CPU_ISA: expected one of " + names +
                           " on this processor, got " + wanted);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = choose();
  return table;
}

}  // namespace vitadapter::cpu

// For `python -m vitadapter_ops`, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* vitadapter_ops_cpu_isa() {
  try {
    return vitadapter::cpu::kernels().isa;
  } catch (const std::exception& error) {
    static const std::string message = error.what();
    return message.c_str();
  }
}
