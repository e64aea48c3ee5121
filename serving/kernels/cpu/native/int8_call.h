// What a caller of an int8 product asks for.
#pragma once

#include <cstdint>

#include "call.h"

// GCC 10 and clang 11 do not know AVX-VNNI.
#if defined(__x86_64__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define SPARSESERVE_AVX_VNNI
#endif

namespace sparseserve {

constexpr int kPanel8 = 32;       // rows of a panel
constexpr int kBlockBytes = 160;  // eight columns of a panel: 32 bytes of places, 128 of codes
constexpr int kTokenBytes = 16;   // eight values of a token and their negatives

struct Int8Call {
  const std::uint8_t* weight;  // [panels][blocks][160]
  const float* scales;         // [rows]
  const void* inputs;          // [batch][columns]
  const void* bias;            // [rows], or null
  void* outputs;               // [batch][rows]
  Stored type;                 // of inputs, bias and outputs: bfloat16 or float32
  std::int64_t batch;
  std::int64_t rows;
  std::int64_t columns;        // a multiple of 4
  int threads;
  Parallel parallel;
};

// One entry for each vector unit; each is compiled for it in a file of its own.
bool run_int8_portable(const Int8Call& call);
#if defined(__x86_64__)
bool run_int8_avx2(const Int8Call& call);
bool run_int8_avx_vnni(const Int8Call& call);
bool run_int8_avx512_vnni(const Int8Call& call);
#endif

}  // namespace sparseserve
