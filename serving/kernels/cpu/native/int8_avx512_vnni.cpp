// The int8 kernels for AVX-512 with VNNI: vectors of 16 rows.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <memory>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vnni"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vnni")
#endif

#include "int8_avx2.h"

namespace sparseserve {
namespace {

// It quantizes with vectors of 8.
struct Avx512Vnni : Vector256 {
  static constexpr int rows = 16;
  static constexpr int bytes = 64;
  static constexpr int most_tokens = 12;
  static constexpr int most_sums = 24;
  static constexpr int few_groups = 4;
  using sums = __m512i;
  struct Codes {
    __m512i picks, sizes;
  };

  static __m512i load(const void* at) { return _mm512_loadu_si512(at); }
  static void store(void* at, __m512i value) { _mm512_storeu_si512(at, value); }
  // Two strips of 8 rows: both read the same 32 bytes of places, shifted by two bits more.
  static Codes codes(const std::uint8_t* block, int strip) {
    const __m512i stored = load(block + 32 + strip * bytes);
    const __m512i shift = _mm512_inserti64x4(_mm512_set1_epi16(static_cast<short>(4 * strip)),
                                             _mm256_set1_epi16(static_cast<short>(4 * strip + 2)), 1);
    const __m512i both = _mm512_broadcast_i64x4(Vector256::load(block));
    const __m512i places = _mm512_and_si512(_mm512_srlv_epi16(both, shift), _mm512_set1_epi8(3));
    const __m512i second = _mm512_set1_epi32(0x04040000);
    const __m512i signs = _mm512_and_si512(_mm512_srli_epi16(stored, 4), _mm512_set1_epi8(8));
    return {_mm512_or_si512(_mm512_or_si512(places, second), signs), _mm512_abs_epi8(stored)};
  }
  static Codes load_codes(const std::uint8_t* at) { return {load(at), load(at + bytes)}; }
  static void store_codes(std::uint8_t* at, const Codes& codes) {
    store(at, codes.picks);
    store(at + bytes, codes.sizes);
  }
  static __m512i add_products(__m512i sum, const Codes& codes, const std::int8_t* token) {
    const __m128i one = _mm_loadu_si128(reinterpret_cast<const __m128i*>(token));
    const __m512i picked = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(one), codes.picks);
    return _mm512_dpbusd_epi32(sum, codes.sizes, picked);
  }
};

}  // namespace

bool run_int8_avx512_vnni(const Int8Call& call) { return run_int8_on<Avx512Vnni>(call); }

}  // namespace sparseserve

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
