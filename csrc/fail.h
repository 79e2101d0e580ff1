// SPDX-License-Identifier: Apache-2.0
// How native code refuses what it was given: a ValueError in Python. No torch header, and no
// stream, whose headers cost every unit of csrc/cuda half a second.
#pragma once

#include <stdexcept>
#include <string>

namespace vitadapter {

inline std::string text_of(const char* part) { return part; }
inline std::string text_of(const std::string& part) { return part; }
template <typename Number>
std::string text_of(Number part) {
  return std::to_string(part);
}

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::invalid_argument((std::string() + ... + text_of(parts)));
}

}  // namespace vitadapter
