// The types that values are stored in. Values come in pairs, for 32 rows at a time: the two kept
// values of a group, or two columns of a dense weight.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparseserve {
namespace {  // see kernels.h

// first and second of a row lie side by side, in the low and the high half of a word.
struct Bfloat16 {
  using stored = std::uint16_t;
  template <class V>
  static void load_pair(const std::uint8_t* pairs, int row, typename V::floats& first,
                        typename V::floats& second) {
    V::load_bfloat16_pairs(pairs + row * 4, first, second);
  }
};

// The first values of all 32 rows, then the second ones.
struct Float16 {
  using stored = std::uint16_t;
  template <class V>
  static void load_pair(const std::uint8_t* pairs, int row, typename V::floats& first,
                        typename V::floats& second) {
    first = V::load_float16(pairs + row * 2);
    second = V::load_float16(pairs + 64 + row * 2);
  }
};

// As Float16.
struct Float32 {
  using stored = float;
  template <class V>
  static void load_pair(const std::uint8_t* pairs, int row, typename V::floats& first,
                        typename V::floats& second) {
    first = V::load(reinterpret_cast<const float*>(pairs) + row);
    second = V::load(reinterpret_cast<const float*>(pairs) + 32 + row);
  }
};

}  // namespace
}  // namespace sparseserve
