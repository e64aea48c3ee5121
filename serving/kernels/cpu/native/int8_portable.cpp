// The int8 kernels in plain C++, for any processor: arrays of 8 rows.
#include "int8.h"

namespace sparseserve {
namespace {

struct Portable8 {
  static constexpr int rows = 8;
  static constexpr int bytes = 32;
  static constexpr int most_tokens = 8;
  static constexpr int most_sums = 8;
  static constexpr int few_groups = 1;
  struct Codes {
    std::uint8_t picks[bytes], sizes[bytes];
  };
  struct sums {
    std::int32_t at[rows];
  };

  static Codes codes(const std::uint8_t* block, int strip) {
    const std::uint8_t* stored = block + 32 + strip * bytes;
    Codes result;
    for (int i = 0; i < bytes; ++i) {
      const bool negative = stored[i] & 0x80;
      const int place = block[i] >> 2 * strip & 3;
      result.picks[i] = static_cast<std::uint8_t>(place | (i & 2) << 1 | negative << 3);
      result.sizes[i] = static_cast<std::uint8_t>(negative ? 256 - stored[i] : stored[i]);
    }
    return result;
  }
  static Codes load_codes(const std::uint8_t* at) {
    Codes result;
    std::memcpy(&result, at, sizeof result);
    return result;
  }
  static void store_codes(std::uint8_t* at, const Codes& codes) {
    std::memcpy(at, &codes, sizeof codes);
  }
  static sums load(const std::int32_t* at) {
    sums result;
    std::memcpy(result.at, at, sizeof result.at);
    return result;
  }
  static void store(std::int32_t* at, const sums& value) {
    std::memcpy(at, value.at, sizeof value.at);
  }
  static sums add_products(sums sum, const Codes& codes, const std::int8_t* token) {
    for (int i = 0; i < bytes; ++i) sum.at[i / 4] += codes.sizes[i] * token[codes.picks[i]];
    return sum;
  }
  template <class T>
  static void quantize(const T* values, float scale, std::int8_t* to) {
    // Adding and taking away 1.5 * 2^23 rounds to the nearest integer, halves to even.
    const float round = 12582912.0f;
    for (int i = 0; i < 8; ++i) {
      const float value = (as_float(values[i]) / scale + round) - round;
      to[i] = static_cast<std::int8_t>(std::min(127.0f, std::max(-127.0f, value)));
      to[8 + i] = static_cast<std::int8_t>(-to[i]);
    }
  }
};

}  // namespace

bool run_int8_portable(const Int8Call& call) { return run_int8_on<Portable8>(call); }

}  // namespace sparseserve
