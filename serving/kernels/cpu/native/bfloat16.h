// bfloat16 as float32 and back, in plain C++.
#pragma once

#include <cstdint>
#include <cstring>

namespace sparseserve {
namespace {  // see kernels.h

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float as_float(float value) { return value; }
inline float as_float(std::uint16_t value) { return float_of(static_cast<std::uint32_t>(value) << 16); }

// To the nearest, halves to even.
inline std::uint16_t bfloat16_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

}  // namespace
}  // namespace sparseserve
