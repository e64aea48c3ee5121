// The kernels for AVX2, FMA and F16C: vectors of 8 rows.
#if defined(__x86_64__)
#include <algorithm>
#include <atomic>
#include <cstring>
#include <immintrin.h>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels.h"
#include "units.h"

namespace sparseserve {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using floats = __m256;
  using words = __m256i;
  using quad = __m256;

  static floats zero() { return _mm256_setzero_ps(); }
  static floats load(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, floats value) { _mm256_storeu_ps(at, value); }
  static floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
  static floats multiply_add(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
  static floats broadcast(const float* at) { return _mm256_broadcast_ss(at); }
  static words load_words(const std::uint8_t* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  static quad load_quad(const float* at) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(at));
  }
  // Only the two low bits of each position count.
  static floats pick(quad four, words positions) { return _mm256_permutevar_ps(four, positions); }
  static words shift_two(words value) { return _mm256_srli_epi32(value, 2); }
  static words low_two(words value) { return _mm256_and_si256(value, _mm256_set1_epi32(3)); }
  static floats where_equal(words value, int wanted, floats then) {
    const words equal = _mm256_cmpeq_epi32(value, _mm256_set1_epi32(wanted));
    return _mm256_and_ps(_mm256_castsi256_ps(equal), then);
  }
  static floats either(floats a, floats b) { return _mm256_or_ps(a, b); }
  static void load_bfloat16_pairs(const std::uint8_t* at, floats& first, floats& second) {
    const words pairs = load_words(at);
    first = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    second = _mm256_castsi256_ps(
        _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static floats load_float16(const std::uint8_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static void prefetch(const void* at) { _mm_prefetch(static_cast<const char*>(at), _MM_HINT_T0); }
};

}  // namespace

bool run_avx2(Operation operation, Stored stored, const Call& call) {
  return run_on<Avx2>(operation, stored, call);
}

}  // namespace sparseserve

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
