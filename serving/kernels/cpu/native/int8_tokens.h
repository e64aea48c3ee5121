// Activations in int8, each token with a scale of its own, and conversion from and to their type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "bfloat16.h"
#include "int8_call.h"

namespace sparseserve {
namespace {  // see kernels.h

// The bits of a size, as a float32. Sizes order like these bits, NaN above infinity above numbers;
// and the largest of integers is found with a vector unit, that of floats is not.
inline std::uint32_t size_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffffu;
}
inline std::uint32_t size_bits(std::uint16_t value) { return (value & 0x7fffu) << 16; }

void read_floats(const void* from, Stored type, std::int64_t first, int count, float* to) {
  if (type == Stored::kFloat32)
    std::memcpy(to, static_cast<const float*>(from) + first, count * sizeof(float));
  else
    for (int i = 0; i < count; ++i)
      to[i] = as_float(static_cast<const std::uint16_t*>(from)[first + i]);
}

void write_floats(const float (&from)[kPanel8], Stored type, std::int64_t first, int count,
                  void* to) {
  if (type == Stored::kFloat32) {
    std::memcpy(static_cast<float*>(to) + first, from, count * sizeof(float));
    return;
  }
  std::uint16_t narrow[kPanel8];
  for (int i = 0; i < kPanel8; ++i) narrow[i] = bfloat16_of(from[i]);
  std::memcpy(static_cast<std::uint16_t*>(to) + first, narrow, count * sizeof(std::uint16_t));
}

// Tokens in groups of up to `most`, as equal as can be. A group's bytes lie in the order in which
// they are read: block after block, and in a block token after token.
struct Tokens {
  std::int64_t count;
  std::int64_t blocks;
  std::int64_t most;
  std::vector<float> scales;

  Tokens(std::int64_t count, std::int64_t blocks, std::int64_t most)
      : count(count), blocks(blocks), most(most), scales(count),
        bytes(new std::int8_t[count * blocks * kTokenBytes]) {}

  std::int64_t groups() const { return (count + most - 1) / most; }
  std::int64_t first(std::int64_t group) const { return group * count / groups(); }
  const std::int8_t* at(std::int64_t group, std::int64_t block) const {
    const std::int64_t from = first(group);
    return bytes.get() + (from * blocks + block * (first(group + 1) - from)) * kTokenBytes;
  }

  // Quantizes row `row` of the inputs to token `token`.
  template <class V>
  void quantize(const Int8Call& call, std::int64_t row, std::int64_t token) {
    if (call.type == Stored::kFloat32)
      quantize<V>(static_cast<const float*>(call.inputs) + row * call.columns, call.columns, token);
    else
      quantize<V>(static_cast<const std::uint16_t*>(call.inputs) + row * call.columns, call.columns,
                  token);
  }

 private:
  std::unique_ptr<std::int8_t[]> bytes;

  template <class V, class T>
  void quantize(const T* values, std::int64_t columns, std::int64_t token) {
    std::uint32_t largest = 0;
    for (std::int64_t i = 0; i < columns; ++i) largest = std::max(largest, size_bits(values[i]));
    const bool finite = largest < 0x7f800000u;
    // The scale of the smallest denormals is zero: they count as zeros.
    const float scale = finite ? float_of(largest) / 127.0f : 0.0f;
    const float divisor = scale > 0.0f ? scale : 1.0f;
    scales[token] = finite ? divisor : std::numeric_limits<float>::quiet_NaN();
    std::int64_t group = token * groups() / count;
    while (first(group + 1) <= token) ++group;
    const std::int64_t stride = (first(group + 1) - first(group)) * kTokenBytes;
    std::int8_t* to = bytes.get() + first(group) * blocks * kTokenBytes +
                      (token - first(group)) * kTokenBytes;
    if (!finite) {  // whatever the sums are, their scale makes them NaN
      for (std::int64_t block = 0; block < blocks; ++block)
        std::memset(to + block * stride, 0, kTokenBytes);
      return;
    }
    for (std::int64_t block = 0; block < columns / 8; ++block)
      V::quantize(values + block * 8, divisor, to + block * stride);
    if (columns % 8) {
      T last[8] = {};
      std::memcpy(last, values + columns / 8 * 8, columns % 8 * sizeof(T));
      V::quantize(last, divisor, to + columns / 8 * stride);
    }
  }
};

}  // namespace
}  // namespace sparseserve
