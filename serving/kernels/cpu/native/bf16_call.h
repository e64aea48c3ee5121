// What a caller of a bfloat16 product asks for.
#pragma once

#include <cstdint>

#include <vector>

#include "call.h"

namespace sparseserve {

// Tiles is the product of TwoFour on a matrix unit.
enum class Bf16Operation : int { kTwoFour = 0, kDense = 1, kTiles = 2 };

struct Bf16Product {
  const std::uint8_t* weight;   // panels of bfloat16 values, 2:4 or dense
  const std::uint16_t* inputs;  // [batch][columns]
  const std::uint16_t* bias;    // [rows], or null
  std::uint16_t* outputs;       // [batch][rows]
  std::int64_t batch;
};

// Products of weights of one shape, each with tokens of its own: those of experts, or just one.
struct Bf16Call {
  std::vector<Bf16Product> products;
  std::int64_t rows;
  std::int64_t columns;         // a multiple of 4 for a 2:4 weight
  int threads;
  Parallel parallel;
};

// One entry for each vector unit; each is compiled for it in a file of its own.
bool run_bf16_portable(Bf16Operation operation, const Bf16Call& call);
#if defined(__x86_64__)
bool run_bf16_avx512(Bf16Operation operation, const Bf16Call& call);
#endif

}  // namespace sparseserve
