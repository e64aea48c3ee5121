// Vectors of 8 rows, four codes a row: what AVX2 and AVX-VNNI share. Included after the pragma that
// names the unit.
#pragma once

#include <immintrin.h>

#include "int8.h"

namespace sparseserve {
namespace {

struct Vector256 {
  static constexpr int rows = 8;
  static constexpr int bytes = 32;
  // Tokens of a group, vectors of sums that registers hold beside codes and tokens, and groups for
  // which taking codes apart anew is faster than unpacking them once. As measured.
  static constexpr int most_tokens = 8;
  static constexpr int most_sums = 8;
  static constexpr int few_groups = 1;
  using sums = __m256i;
  struct Codes {
    __m256i picks, sizes;
  };

  static __m256i load(const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
  }
  static void store(void* at, __m256i value) {
    _mm256_storeu_si256(static_cast<__m256i*>(at), value);
  }
  static Codes codes(const std::uint8_t* block, int strip) {
    const __m256i stored = load(block + 32 + strip * bytes);
    const __m256i places =
        _mm256_and_si256(_mm256_srli_epi16(load(block), 2 * strip), _mm256_set1_epi8(3));
    const __m256i second = _mm256_set1_epi32(0x04040000);
    const __m256i signs = _mm256_and_si256(_mm256_srli_epi16(stored, 4), _mm256_set1_epi8(8));
    return {_mm256_or_si256(_mm256_or_si256(places, second), signs), _mm256_abs_epi8(stored)};
  }
  static Codes load_codes(const std::uint8_t* at) { return {load(at), load(at + bytes)}; }
  static void store_codes(std::uint8_t* at, const Codes& codes) {
    store(at, codes.picks);
    store(at + bytes, codes.sizes);
  }
  static __m256i picked(const Codes& codes, const std::int8_t* token) {
    const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(token));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(one), codes.picks);
  }

  static __m256 eight(const float* at) { return _mm256_loadu_ps(at); }
  static __m256 eight(const std::uint16_t* at) {
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }
  template <class T>
  static void quantize(const T* values, float scale, std::int8_t* to) {
    // Conversion rounds halves to even. Packing saturates, so only -128 is left to be cut off.
    const __m256i wide = _mm256_cvtps_epi32(_mm256_div_ps(eight(values), _mm256_set1_ps(scale)));
    const __m128i half =
        _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    const __m128i narrow = _mm_max_epi8(_mm_packs_epi16(half, half), _mm_set1_epi8(-127));
    const __m128i negative = _mm_sub_epi8(_mm_setzero_si128(), narrow);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi64(narrow, negative));
  }
};

}  // namespace
}  // namespace sparseserve
