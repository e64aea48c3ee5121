// Products of bfloat16 activations with a weight in panels of 32 rows of bfloat16 values.
//
// The panels are those of kernels.h (serving/kernels/cpu/layout.py). Vector units multiply pairs of
// bfloat16 values and add both products to a float32 sum. In a 2:4 panel a pair is the two kept
// values of a group: each row picks the two inputs that belong to them, so half of a dense
// product's multiplications are left. In a dense panel it is two columns.
//
// A sum is added up in the order of the columns, whatever the batch and the number of threads, so a
// token's result does not depend on them. Everything here is a template over V, the vector unit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "bf16_rounds.h"

// See kernels.h and int8.h.
#if defined(__GNUC__)
#define SPARSESERVE_UNROLL _Pragma("GCC unroll 16")
#define SPARSESERVE_NOINLINE __attribute__((noinline))
#else
#define SPARSESERVE_UNROLL
#define SPARSESERVE_NOINLINE
#endif

namespace sparseserve {
namespace {  // see kernels.h

constexpr int kColumns16 = 32;  // columns of a block
constexpr int kGroups16 = 8;    // groups of four columns in a block
constexpr int kStrips16 = 2;    // vectors of 16 rows in a panel
constexpr int kTokens16 = 12;   // most tokens that are multiplied at once
constexpr int kFewTiles16 = 3;  // most tiles of tokens for which picks are made anew
constexpr std::int64_t kHeld16 = 240;  // tokens that are copied at once, in whole tiles

// Some tokens as they are multiplied: in tiles of at most twelve, and of a tile four columns of all
// its tokens after four columns. Tokens that are a power of two apart would meet in the cache.
class Tiles16 {
 public:
  const std::int64_t count, blocks, tiles;

  Tiles16(const std::uint16_t* inputs, std::int64_t columns, std::int64_t count)
      : count(count),
        blocks((columns + kColumns16 - 1) / kColumns16),
        tiles((count + kTokens16 - 1) / kTokens16),
        inputs_(inputs),
        columns_(columns),
        values_(new std::uint16_t[count * blocks * kColumns16]) {}
  // As even as it goes: a tile of one token takes a third of the time of one of twelve.
  std::int64_t first(std::int64_t tile) const { return tile * count / tiles; }
  const std::uint16_t* at(std::int64_t tile, std::int64_t block) const {
    const std::int64_t own = first(tile + 1) - first(tile);
    return values_.get() + first(tile) * blocks * kColumns16 + block * own * kColumns16;
  }
  void fill(std::int64_t tile) {
    const std::int64_t own = first(tile + 1) - first(tile);
    for (std::int64_t token = 0; token < own; ++token) {
      std::uint16_t* to = values_.get() + first(tile) * blocks * kColumns16 + token * 4;
      const std::uint16_t* from = inputs_ + (first(tile) + token) * columns_;
      std::int64_t column = 0;
      for (; column + 4 <= columns_; column += 4, to += own * 4)
        std::memcpy(to, from + column, 4 * sizeof *to);
      for (; column < blocks * kColumns16; column += 4, to += own * 4)
        for (int i = 0; i < 4; ++i) to[i] = column + i < columns_ ? from[column + i] : 0;
    }
  }

 private:
  const std::uint16_t* inputs_;
  std::int64_t columns_;
  std::unique_ptr<std::uint16_t[]> values_;
};

// Adds T tokens times one group of columns of a 2:4 panel.
template <class V, int T>
void add_group(const typename V::words (&picks)[kStrips16],
               const typename V::words (&values)[kStrips16], const std::uint16_t* inputs,
               typename V::floats (&sums)[kStrips16][T]) {
  SPARSESERVE_UNROLL
  for (int t = 0; t < T; ++t) {
    const auto four = V::broadcast_four(inputs + t * 4);
    SPARSESERVE_UNROLL
    for (int s = 0; s < kStrips16; ++s)
      sums[s][t] = V::add_products(sums[s][t], V::pick(four, picks[s]), values[s]);
  }
}

// A 2:4 panel: positions of 32 rows, then the pairs of eight groups of four columns.
struct TwoFour16 {
  static constexpr int block_bytes = 1152;
  static constexpr std::int64_t chunk = 16;  // blocks, 18 KiB of a panel, that stay in the L1 cache

  template <class V, int T>
  static void add(const std::uint8_t* block, const std::uint16_t* inputs,
                  typename V::floats (&sums)[kStrips16][T]) {
    typename V::words positions[kStrips16];
    for (int s = 0; s < kStrips16; ++s) positions[s] = V::load(block + 64 * s);
    const std::uint8_t* pairs = block + 128;
    for (int group = 0; group < kGroups16; ++group, pairs += 128, inputs += T * 4) {
      typename V::words picks[kStrips16], values[kStrips16];
      SPARSESERVE_UNROLL
      for (int s = 0; s < kStrips16; ++s) {
        picks[s] = V::picks(positions[s]);
        positions[s] = V::shift_four(positions[s]);
        values[s] = V::load(pairs + 64 * s);
      }
      add_group<V, T>(picks, values, inputs, sums);
    }
  }
};

// Blocks of a 2:4 panel whose positions have become picks, for many tiles of tokens. Of each group
// 16 rows after 16 rows, the picks and then the values.
struct Picks16 {
  static constexpr int block_bytes = 2048;

  template <class V>
  static void make(const std::uint8_t* block, std::uint8_t* picks) {
    for (int s = 0; s < kStrips16; ++s) {
      typename V::words positions = V::load(block + 64 * s);
      for (int group = 0; group < kGroups16; ++group) {
        V::store(picks + 256 * group + 128 * s, V::picks(positions));
        V::store(picks + 256 * group + 128 * s + 64, V::load(block + 128 * (group + 1) + 64 * s));
        positions = V::shift_four(positions);
      }
    }
  }

  template <class V, int T>
  static void add(const std::uint8_t* block, const std::uint16_t* inputs,
                  typename V::floats (&sums)[kStrips16][T]) {
    for (int group = 0; group < kGroups16; ++group, block += 256, inputs += T * 4) {
      typename V::words picks[kStrips16], values[kStrips16];
      SPARSESERVE_UNROLL
      for (int s = 0; s < kStrips16; ++s) {
        picks[s] = V::load(block + 128 * s);
        values[s] = V::load(block + 128 * s + 64);
      }
      add_group<V, T>(picks, values, inputs, sums);
    }
  }
};

// A dense panel: two columns of 32 rows after two columns.
struct Dense16 {
  static constexpr int block_bytes = 2048;
  static constexpr std::int64_t chunk = 8;

  template <class V, int T>
  static void add(const std::uint8_t* block, const std::uint16_t* inputs,
                  typename V::floats (&sums)[kStrips16][T]) {
    for (int group = 0; group < kGroups16; ++group, inputs += T * 4)
      for (int pair = 0; pair < 2; ++pair, block += 128) {
        typename V::words values[kStrips16];
        for (int s = 0; s < kStrips16; ++s) values[s] = V::load(block + 64 * s);
        SPARSESERVE_UNROLL
        for (int t = 0; t < T; ++t) {
          const typename V::words two = V::broadcast_two(inputs + t * 4 + pair * 2);
          SPARSESERVE_UNROLL
          for (int s = 0; s < kStrips16; ++s)
            sums[s][t] = V::add_products(sums[s][t], two, values[s]);
        }
      }
  }
};

// Adds T tokens times some blocks of a panel to sums[T][32].
template <class V, class W, int T>
SPARSESERVE_NOINLINE void tile16(const std::uint8_t* at, std::int64_t blocks,
                                 const std::uint16_t* inputs, float* sums) {
  typename V::floats own[kStrips16][T];
  SPARSESERVE_UNROLL
  for (int t = 0; t < T; ++t)
    SPARSESERVE_UNROLL
    for (int s = 0; s < kStrips16; ++s) own[s][t] = V::load_sums(sums + t * kPanel16 + 16 * s);
  for (; blocks > 0; --blocks, inputs += T * kColumns16, at += W::block_bytes) {
    // One line makes the hardware fetch the others; fetching each of them here is slower.
    V::prefetch(at + 4 * W::block_bytes);
    W::template add<V, T>(at, inputs, own);
  }
  SPARSESERVE_UNROLL
  for (int t = 0; t < T; ++t)
    SPARSESERVE_UNROLL
    for (int s = 0; s < kStrips16; ++s) V::store_sums(sums + t * kPanel16 + 16 * s, own[s][t]);
}

// The same for one tile of tokens, from the block `first` on.
template <class V, class W>
void tokens16(const Tiles16& tokens, std::int64_t tile, const std::uint8_t* at, std::int64_t first,
              std::int64_t blocks, float* sums) {
  const std::uint16_t* inputs = tokens.at(tile, first);
  sums += tokens.first(tile) * kPanel16;
  switch (tokens.first(tile + 1) - tokens.first(tile)) {
    case 1: return tile16<V, W, 1>(at, blocks, inputs, sums);
    case 2: return tile16<V, W, 2>(at, blocks, inputs, sums);
    case 3: return tile16<V, W, 3>(at, blocks, inputs, sums);
    case 4: return tile16<V, W, 4>(at, blocks, inputs, sums);
    case 5: return tile16<V, W, 5>(at, blocks, inputs, sums);
    case 6: return tile16<V, W, 6>(at, blocks, inputs, sums);
    case 7: return tile16<V, W, 7>(at, blocks, inputs, sums);
    case 8: return tile16<V, W, 8>(at, blocks, inputs, sums);
    case 9: return tile16<V, W, 9>(at, blocks, inputs, sums);
    case 10: return tile16<V, W, 10>(at, blocks, inputs, sums);
    case 11: return tile16<V, W, 11>(at, blocks, inputs, sums);
    default: return tile16<V, W, 12>(at, blocks, inputs, sums);
  }
}

// sums[tokens][32] = all tokens times one panel.
template <class V, class W>
void panel16(const std::uint8_t* panel, const Tiles16& tokens, float* sums) {
  const std::int64_t chunk = tokens.tiles == 1 ? tokens.blocks : W::chunk;
  for (std::int64_t block = 0; block < tokens.blocks; block += chunk)
    for (std::int64_t tile = 0; tile < tokens.tiles; ++tile)
      tokens16<V, W>(tokens, tile, panel + block * W::block_bytes, block,
                     std::min(chunk, tokens.blocks - block), sums);
}

// The same for many tokens and a 2:4 panel.
template <class V>
void picked_panel16(const std::uint8_t* panel, const Tiles16& tokens, float* sums) {
  constexpr std::int64_t chunk = 4;
  constexpr std::int64_t lines = chunk * TwoFour16::block_bytes / 64;
  alignas(64) std::uint8_t picks[chunk * Picks16::block_bytes];
  for (std::int64_t block = 0; block < tokens.blocks; block += chunk) {
    const std::uint8_t* at = panel + block * TwoFour16::block_bytes;
    const std::int64_t count = std::min(chunk, tokens.blocks - block);
    for (std::int64_t i = 0; i < count; ++i)
      Picks16::make<V>(at + i * TwoFour16::block_bytes, picks + i * Picks16::block_bytes);
    for (std::int64_t tile = 0; tile < tokens.tiles; ++tile) {
      // The next chunk comes from memory meanwhile, with each tile a share of it.
      const std::int64_t end = (tile + 1) * lines / tokens.tiles;
      for (std::int64_t line = tile * lines / tokens.tiles; line < end; ++line)
        V::prefetch(at + (lines + line) * 64);
      tokens16<V, Picks16>(tokens, tile, picks, block, count, sums);
    }
  }
}

template <class V, class W>
void multiply16(const Bf16Call& call) {
  in_rounds<V, Tiles16>(call, kHeld16, W::block_bytes,
                        [](const std::uint8_t* weight, const Tiles16& tokens) {
    std::vector<float> sums(tokens.count * kPanel16, 0.0f);
    if (std::is_same<W, TwoFour16>::value && tokens.tiles > kFewTiles16)
      picked_panel16<V>(weight, tokens, sums.data());
    else
      panel16<V, W>(weight, tokens, sums.data());
    return sums;
  });
}

}  // namespace
}  // namespace sparseserve
