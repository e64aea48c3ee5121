// The int8 kernels for AVX2 and AVX-VNNI.
#include "int8_call.h"

#if defined(SPARSESERVE_AVX_VNNI)
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>
#include <memory>
#include <vector>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,avxvnni"))), apply_to = function)
#else
#pragma GCC target("avx2,avxvnni")
#endif

#include "int8_avx2.h"

namespace sparseserve {
namespace {

struct AvxVnni : Vector256 {
  static __m256i add_products(__m256i sum, const Codes& codes, const std::int8_t* token) {
    return _mm256_dpbusd_avx_epi32(sum, codes.sizes, picked(codes, token));
  }
};

}  // namespace

bool run_int8_avx_vnni(const Int8Call& call) { return run_int8_on<AvxVnni>(call); }

}  // namespace sparseserve

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
