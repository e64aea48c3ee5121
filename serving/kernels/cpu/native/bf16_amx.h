// AMX as a matrix unit of bf16_tiles.h. Instructions are written out, so that compilers that do not
// know them by name will do; the system has to be asked for the tiles once (library.cpp).
#pragma once

#include <cstdint>

namespace sparseserve {
namespace {  // see kernels.h

class Amx {
 public:
  // Tiles of 16 rows of 64 bytes, but only `tokens` rows of sums and tokens.
  explicit Amx(int tokens) {
    struct alignas(64) {
      std::uint8_t palette = 1, start = 0, reserved[14] = {};
      std::uint16_t bytes[16] = {};
      std::uint8_t rows[16] = {};
    } config;
    for (int tile = 0; tile < 8; ++tile) {
      config.bytes[tile] = 64;
      config.rows[tile] = static_cast<std::uint8_t>(tile < 6 ? tokens : 16);
    }
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Amx() { asm volatile("tilerelease"); }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

  template <int T>
  void load(const void* at, long stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(void* at, long stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(T) : "memory");
  }
  template <int Sums, int Tokens, int Weight>
  void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Tokens), "i"(Weight));
  }
};

}  // namespace
}  // namespace sparseserve
