// The kernels in plain C++, for any processor: arrays of 8 rows, left to the compiler.
#include <cmath>

#include "kernels.h"
#include "units.h"

namespace sparseserve {
namespace {

struct Portable {
  static constexpr int lanes = 8;
  struct floats {
    float at[lanes];
  };
  struct words {
    std::uint32_t at[lanes];
  };
  using quad = const float*;

  template <class Function>
  static floats make(const Function& value) {
    floats result;
    for (int i = 0; i < lanes; ++i) result.at[i] = value(i);
    return result;
  }
  static floats zero() { return make([](int) { return 0.0f; }); }
  static floats load(const float* at) { return make([&](int i) { return at[i]; }); }
  static void store(float* at, const floats& value) { std::memcpy(at, value.at, sizeof value.at); }
  static floats add(const floats& a, const floats& b) {
    return make([&](int i) { return a.at[i] + b.at[i]; });
  }
  static floats multiply_add(const floats& a, const floats& b, const floats& c) {
    return make([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static floats broadcast(const float* at) { return make([&](int) { return *at; }); }
  static words load_words(const std::uint8_t* at) {
    words result;
    std::memcpy(result.at, at, sizeof result.at);
    return result;
  }
  static quad load_quad(const float* at) { return at; }
  static floats pick(quad four, const words& positions) {
    return make([&](int i) { return four[positions.at[i] & 3]; });
  }
  static words shift_two(words value) {
    for (auto& word : value.at) word >>= 2;
    return value;
  }
  static words low_two(words value) {
    for (auto& word : value.at) word &= 3;
    return value;
  }
  static floats where_equal(const words& value, std::uint32_t wanted, const floats& then) {
    return make([&](int i) { return value.at[i] == wanted ? then.at[i] : 0.0f; });
  }
  // One of the two is zero wherever the other is not.
  static floats either(const floats& a, const floats& b) {
    return make([&](int i) { return a.at[i] != 0.0f ? a.at[i] : b.at[i]; });
  }
  static void load_bfloat16_pairs(const std::uint8_t* at, floats& first, floats& second) {
    const words pairs = load_words(at);
    first = make([&](int i) { return from_bits(pairs.at[i] << 16); });
    second = make([&](int i) { return from_bits(pairs.at[i] & 0xffff0000u); });
  }
  static floats load_float16(const std::uint8_t* at) {
    std::uint16_t halves[lanes];
    std::memcpy(halves, at, sizeof halves);
    return make([&](int i) { return from_half(halves[i]); });
  }
  static void prefetch(const void*) {}

 private:
  static float from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  // IEEE 754 binary16: a sign, five bits of exponent with bias 15, ten of fraction.
  static float from_half(std::uint16_t half) {
    const int exponent = half >> 10 & 31;
    const int fraction = half & 1023;
    float size;
    if (exponent == 31)
      size = fraction ? NAN : INFINITY;
    else if (exponent == 0)
      size = std::ldexp(static_cast<float>(fraction), -24);
    else
      size = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return half & 0x8000 ? -size : size;
  }
};

}  // namespace

bool run_portable(Operation operation, Stored stored, const Call& call) {
  return run_on<Portable>(operation, stored, call);
}

}  // namespace sparseserve
