// The bfloat16 kernels in plain C++, for any processor: the reference of the vector units.
#include "bf16_plain_tiles.h"
#include "bf16_tiles.h"

namespace sparseserve {
namespace {

struct PortableBf16 {
  static constexpr int lanes = 16;
  struct floats {
    float at[lanes];
  };
  // Pairs of bfloat16 values, the first in the low half; or positions, or picks.
  struct words {
    std::uint32_t at[lanes];
  };

  static floats load_sums(const float* at) {
    floats result;
    std::memcpy(result.at, at, sizeof result.at);
    return result;
  }
  static void store_sums(float* at, const floats& value) {
    std::memcpy(at, value.at, sizeof value.at);
  }
  static words load(const std::uint8_t* at) {
    words result;
    std::memcpy(result.at, at, sizeof result.at);
    return result;
  }
  static void store(std::uint8_t* at, const words& value) {
    std::memcpy(at, value.at, sizeof value.at);
  }
  static void prefetch(const std::uint8_t*) {}
  static const std::uint16_t* broadcast_four(const std::uint16_t* at) { return at; }
  static words broadcast_two(const std::uint16_t* at) {
    words result;
    for (auto& word : result.at) std::memcpy(&word, at, sizeof word);
    return result;
  }
  static words picks(words positions) {
    for (auto& word : positions.at) word &= 15;
    return positions;
  }
  static words shift_four(words positions) {
    for (auto& word : positions.at) word >>= 4;
    return positions;
  }
  static words pick(const std::uint16_t* four, words picks) {
    for (auto& word : picks.at)
      word = four[word & 3] | static_cast<std::uint32_t>(four[word >> 2]) << 16;
    return picks;
  }
  // Columns 0 and 1 of a group, and columns 2 and 3, from its kept values and their positions.
  static words first_two(words values, const words& positions) {
    return placed(values, positions, 0);
  }
  static words last_two(words values, const words& positions) {
    return placed(values, positions, 2);
  }
  static floats add_products(floats sum, const words& inputs, const words& values) {
    for (int i = 0; i < lanes; ++i) {
      // The order of the instruction.
      sum.at[i] += float_of(inputs.at[i] & high) * float_of(values.at[i] & high);
      sum.at[i] += float_of(inputs.at[i] << 16) * float_of(values.at[i] << 16);
    }
    return sum;
  }
  static void write(const float* sums, const float* bias, int count, std::uint16_t* to) {
    for (int i = 0; i < count; ++i)
      to[i] = bfloat16_of(bias == nullptr ? sums[i] : sums[i] + bias[i]);
  }

 private:
  static constexpr std::uint32_t high = 0xffff0000u;
  static words placed(words values, const words& positions, std::uint32_t column) {
    for (int i = 0; i < lanes; ++i) {
      const std::uint32_t first = (positions.at[i] & 3) - column;
      const std::uint32_t second = (positions.at[i] >> 2 & 3) - column;
      const std::uint32_t low = values.at[i] & 0xffff, top = values.at[i] >> 16;
      // What lies outside has wrapped around, or is 2 or 3.
      values.at[i] = (first < 2 ? low << 16 * first : 0) | (second < 2 ? top << 16 * second : 0);
    }
    return values;
  }
};

}  // namespace

bool run_bf16_portable(Bf16Operation operation, const Bf16Call& call) {
  return run_bf16_on<PortableBf16, PlainTiles>(operation, call);
}

}  // namespace sparseserve
