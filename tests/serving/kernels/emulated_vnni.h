// What the int8 kernels ask of AVX-VNNI and of AVX-512, in two halves that AVX2 computes: included
// before their sources, it runs them on processors that have neither.
#pragma once

#include <cstdint>
#include <cstring>
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2")

struct Halves {
  __m256i low, high;
};

template <class Function>
inline Halves each_half(const Function& value) {
  return {value(0), value(1)};
}
inline __m256i half(const Halves& both, int which) { return which ? both.high : both.low; }

// sum + four products of unsigned and signed bytes, in every lane of 32 bits; nothing saturates.
inline __m256i add_four_products(__m256i sum, __m256i sizes, __m256i values) {
  std::int32_t sums[8];
  std::uint8_t left[32];
  std::int8_t right[32];
  std::memcpy(sums, &sum, 32);
  std::memcpy(left, &sizes, 32);
  std::memcpy(right, &values, 32);
  for (int i = 0; i < 32; ++i) sums[i / 4] += left[i] * right[i];
  std::memcpy(&sum, sums, 32);
  return sum;
}

inline __m256i shift_right(__m256i words, __m256i counts) {
  std::uint16_t word[16], count[16];
  std::memcpy(word, &words, 32);
  std::memcpy(count, &counts, 32);
  for (int i = 0; i < 16; ++i) word[i] = count[i] < 16 ? word[i] >> count[i] : 0;
  std::memcpy(&words, word, 32);
  return words;
}

inline Halves load_halves(const void* at) {
  Halves value;
  std::memcpy(&value, at, sizeof value);
  return value;
}
inline void store_halves(void* at, const Halves& value) { std::memcpy(at, &value, sizeof value); }

#pragma GCC pop_options

#define HALVES(value) each_half([&](int h) { return value; })
#define __m512i Halves
#define _mm256_dpbusd_avx_epi32 add_four_products
#define _mm512_loadu_si512 load_halves
#define _mm512_storeu_si512 store_halves
#define _mm512_set1_epi8(a) HALVES(((void)h, _mm256_set1_epi8(a)))
#define _mm512_set1_epi16(a) HALVES(((void)h, _mm256_set1_epi16(a)))
#define _mm512_set1_epi32(a) HALVES(((void)h, _mm256_set1_epi32(a)))
#define _mm512_broadcast_i64x4(a) HALVES(((void)h, a))
#define _mm512_broadcast_i32x4(a) HALVES(((void)h, _mm256_broadcastsi128_si256(a)))
#define _mm512_inserti64x4(a, b, place) (Halves{half(a, 0), b})
#define _mm512_and_si512(a, b) HALVES(_mm256_and_si256(half(a, h), half(b, h)))
#define _mm512_or_si512(a, b) HALVES(_mm256_or_si256(half(a, h), half(b, h)))
#define _mm512_abs_epi8(a) HALVES(_mm256_abs_epi8(half(a, h)))
#define _mm512_srli_epi16(a, count) HALVES(_mm256_srli_epi16(half(a, h), count))
#define _mm512_srlv_epi16(a, b) HALVES(shift_right(half(a, h), half(b, h)))
#define _mm512_shuffle_epi8(a, b) HALVES(_mm256_shuffle_epi8(half(a, h), half(b, h)))
#define _mm512_dpbusd_epi32(a, b, c) HALVES(add_four_products(half(a, h), half(b, h), half(c, h)))
