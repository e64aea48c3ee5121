// The int8 kernels for AVX2.
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
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
#endif

#include "int8_avx2.h"

namespace sparseserve {
namespace {

struct Avx2Int8 : Vector256 {
  static __m256i add_products(__m256i sum, const Codes& codes, const std::int8_t* token) {
    const __m256i pairs = _mm256_maddubs_epi16(codes.sizes, picked(codes, token));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

}  // namespace

bool run_int8_avx2(const Int8Call& call) { return run_int8_on<Avx2Int8>(call); }

}  // namespace sparseserve

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
