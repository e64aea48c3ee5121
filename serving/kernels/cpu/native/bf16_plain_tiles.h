// The matrix unit of bf16_tiles.h in plain C++, for any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace sparseserve {
namespace {  // see kernels.h

class PlainTiles {
 public:
  explicit PlainTiles(int tokens) : tokens_(tokens) {}

  template <int T>
  void load(const void* at, long stride) {
    for (int row = 0; row < rows(T); ++row)
      std::memcpy(tiles_[T][row], static_cast<const char*>(at) + row * stride, 64);
  }
  template <int T>
  void store(void* at, long stride) const {
    for (int row = 0; row < rows(T); ++row)
      std::memcpy(static_cast<char*>(at) + row * stride, tiles_[T][row], 64);
  }
  template <int Sums, int Tokens, int Weight>
  void multiply() {
    for (int token = 0; token < tokens_; ++token)
      for (int pair = 0; pair < 16; ++pair)
        for (int row = 0; row < 16; ++row) {
          float sum = float_of(tiles_[Sums][token][row]);
          const std::uint32_t x = tiles_[Tokens][token][pair], w = tiles_[Weight][pair][row];
          sum += float_of(x & 0xffff0000u) * float_of(w & 0xffff0000u);
          sum += float_of(x << 16) * float_of(w << 16);
          std::memcpy(&tiles_[Sums][token][row], &sum, sizeof sum);
        }
  }

 private:
  std::uint32_t tiles_[8][16][16] = {};
  int tokens_;

  int rows(int tile) const { return tile < 6 ? tokens_ : 16; }
};

}  // namespace
}  // namespace sparseserve
