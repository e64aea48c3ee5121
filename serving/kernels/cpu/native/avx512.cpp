// The kernels for AVX-512F: vectors of 16 rows.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cstring>
#include <immintrin.h>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif

#include "kernels.h"
#include "units.h"

namespace sparseserve {
namespace {

struct Avx512 {
  static constexpr int lanes = 16;
  using floats = __m512;
  using words = __m512i;
  using quad = __m512;

  static floats zero() { return _mm512_setzero_ps(); }
  static floats load(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, floats value) { _mm512_storeu_ps(at, value); }
  static floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
  static floats multiply_add(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
  static floats broadcast(const float* at) { return _mm512_set1_ps(*at); }
  static words load_words(const std::uint8_t* at) { return _mm512_loadu_si512(at); }
  static quad load_quad(const float* at) { return _mm512_broadcast_f32x4(_mm_loadu_ps(at)); }
  // Only the two low bits of each position count.
  static floats pick(quad four, words positions) { return _mm512_permutevar_ps(four, positions); }
  static words shift_two(words value) { return _mm512_srli_epi32(value, 2); }
  static words low_two(words value) { return _mm512_and_si512(value, _mm512_set1_epi32(3)); }
  static floats where_equal(words value, int wanted, floats then) {
    return _mm512_maskz_mov_ps(_mm512_cmpeq_epi32_mask(value, _mm512_set1_epi32(wanted)), then);
  }
  static floats either(floats a, floats b) {
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
  static void load_bfloat16_pairs(const std::uint8_t* at, floats& first, floats& second) {
    const words pairs = load_words(at);
    first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    second = _mm512_castsi512_ps(
        _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static floats load_float16(const std::uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
};

}  // namespace

bool run_avx512(Operation operation, Stored stored, const Call& call) {
  return run_on<Avx512>(operation, stored, call);
}

}  // namespace sparseserve

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
