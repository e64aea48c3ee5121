// The bfloat16 kernels for AVX-512 with BF16: vectors of 16 rows.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cstring>
#include <immintrin.h>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512bf16")
#endif

#include "bf16_tiles.h"
// A test emulates the matrix unit where the processor has none.
#if defined(SPARSESERVE_PLAIN_TILES)
#include "bf16_plain_tiles.h"
#else
#include "bf16_amx.h"
#endif

namespace sparseserve {
namespace {

struct Avx512Bf16 {
  using floats = __m512;
  using words = __m512i;

  static floats load_sums(const float* at) { return _mm512_loadu_ps(at); }
  static void store_sums(float* at, floats value) { _mm512_storeu_ps(at, value); }
  static words load(const std::uint8_t* at) { return _mm512_loadu_si512(at); }
  static void store(std::uint8_t* at, words value) { _mm512_storeu_si512(at, value); }
  static void prefetch(const std::uint8_t* at) {
    _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T0);
  }
  static words broadcast_four(const std::uint16_t* at) {
    long long four;
    std::memcpy(&four, at, sizeof four);
    return _mm512_set1_epi64(four);
  }
  static words broadcast_two(const std::uint16_t* at) {
    int two;
    std::memcpy(&two, at, sizeof two);
    return _mm512_set1_epi32(two);
  }
  // The bytes of the two inputs that a row's positions, its lowest four bits, name.
  static words picks(words positions) {
    return _mm512_permutexvar_epi32(positions, table([](int first, int second, int half) {
      return (half < 2 ? 2 * first : 2 * second) + half % 2;
    }));
  }
  static words shift_four(words positions) { return _mm512_srli_epi32(positions, 4); }
  static words pick(words four, words picks) { return _mm512_shuffle_epi8(four, picks); }
  // Columns 0 and 1 of a group, and columns 2 and 3, from its kept values and their positions.
  static words first_two(words values, words positions) { return placed<0>(values, positions); }
  static words last_two(words values, words positions) { return placed<2>(values, positions); }
  static floats add_products(floats sum, words inputs, words values) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(inputs),
                            reinterpret_cast<__m512bh>(values));
  }
  // Writes `count` sums, plus the bias, in bfloat16.
  static void write(const float* sums, const float* bias, int count, std::uint16_t* to) {
    for (int first = 0; first < count; first += 16, sums += 16, to += 16) {
      floats value = load_sums(sums);
      if (bias != nullptr) value = _mm512_add_ps(value, load_sums(bias + first));
      const __m256i narrow = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value));
      if (count - first >= 16) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow);
      } else {
        std::uint16_t part[16];
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), narrow);
        std::memcpy(to, part, (count - first) * sizeof *to);
      }
    }
  }

 private:
  // Of every pair of positions four bytes, made from both positions and the number of the byte.
  template <class Byte>
  static words table(const Byte& byte) {
    alignas(64) std::uint32_t words_of[16];
    for (int code = 0; code < 16; ++code) {
      words_of[code] = 0;
      for (int half = 0; half < 4; ++half)
        words_of[code] |= static_cast<std::uint32_t>(byte(code & 3, code >> 2, half)) << 8 * half;
    }
    return _mm512_load_si512(words_of);
  }
  // The kept values in columns Column and Column + 1. A byte of 0x80 makes a zero.
  template <int Column>
  static words placed(words values, words positions) {
    const words bytes = table([](int first, int second, int half) {
      const int column = Column + half / 2;
      return column == second ? 2 + half % 2 : column == first ? half % 2 : 0x80;
    });
    // Each row of the vector finds its own four bytes in its quarter.
    const words rows = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return _mm512_shuffle_epi8(
        values, _mm512_or_si512(_mm512_permutexvar_epi32(positions, bytes), rows));
  }
};

}  // namespace

bool run_bf16_avx512(Bf16Operation operation, const Bf16Call& call) {
#if defined(SPARSESERVE_PLAIN_TILES)
  return run_bf16_on<Avx512Bf16, PlainTiles>(operation, call);
#else
  return run_bf16_on<Avx512Bf16, Amx>(operation, call);
#endif
}

}  // namespace sparseserve

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
