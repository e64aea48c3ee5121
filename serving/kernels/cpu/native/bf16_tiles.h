// The 2:4 products of bf16.h on a matrix unit, for batches of more than a few tokens.
//
// A matrix unit multiplies a tile of 16 tokens x 32 columns by a tile of 32 columns x 16 rows of the
// weight, in which the two columns of a pair lie side by side, and knows nothing of 2:4. So a panel
// is restored, zeros in place, one block after the other into a buffer that stays in the first
// cache. While the first 32 tokens are multiplied by one block, the block after the next is
// restored; all other tokens find the buffer filled. Templates are over V, the vector unit, and M,
// the matrix unit: eight tiles, of which 0 to 3 are sums, 4 and 5 tokens, 6 and 7 weights.
#pragma once

#include "bf16.h"

namespace sparseserve {
namespace {  // see kernels.h

constexpr int kTileTokens = 16;
constexpr int kTileBytes = 1024;
constexpr int kSumBytes = kPanel16 * 4;          // a token's sums of one panel
constexpr int kRestored = 16;                    // blocks of a panel that are restored at once
constexpr int kAhead = 2;                        // blocks between restoring and multiplying
constexpr std::int64_t kHeldTokens = 256;        // tokens that are copied at once

// Tokens in tiles: of 16 tokens 32 columns after 32 columns, zeros past the last token and column.
class TokenTiles {
 public:
  const std::int64_t count, blocks, tiles;

  TokenTiles(const std::uint16_t* inputs, std::int64_t columns, std::int64_t count)
      : count(count),
        blocks((columns + kColumns16 - 1) / kColumns16),
        tiles((count + kTileTokens - 1) / kTileTokens),
        inputs_(inputs),
        columns_(columns),
        values_(new std::uint16_t[tiles * kTileTokens * blocks * kColumns16]) {}
  const std::uint16_t* at(std::int64_t tile, std::int64_t block) const {
    return values_.get() + (tile * blocks + block) * kTileTokens * kColumns16;
  }
  void fill(std::int64_t tile) {
    for (int row = 0; row < kTileTokens; ++row) {
      const std::int64_t token = tile * kTileTokens + row;
      const std::uint16_t* from = inputs_ + token * columns_;
      std::uint16_t* to = values_.get() + (tile * blocks * kTileTokens + row) * kColumns16;
      for (std::int64_t column = 0; column < blocks * kColumns16;
           column += kColumns16, to += kTileTokens * kColumns16) {
        const std::int64_t own = std::min<std::int64_t>(kColumns16, columns_ - column);
        if (token >= count || own < kColumns16) std::memset(to, 0, kColumns16 * sizeof *to);
        if (token < count) std::memcpy(to, from + column, own * sizeof *to);
      }
    }
  }

 private:
  const std::uint16_t* inputs_;
  std::int64_t columns_;
  std::unique_ptr<std::uint16_t[]> values_;
};

// Writes one block of a 2:4 panel as two tiles.
template <class V>
void restore(const std::uint8_t* block, std::uint8_t* dense) {
  for (int strip = 0; strip < kStrips16; ++strip, dense += kTileBytes) {
    typename V::words positions = V::load(block + 64 * strip);
    for (int group = 0; group < kGroups16; ++group) {
      const typename V::words values = V::load(block + 128 + 128 * group + 64 * strip);
      V::store(dense + 128 * group, V::first_two(values, positions));
      V::store(dense + 128 * group + 64, V::last_two(values, positions));
      positions = V::shift_four(positions);
    }
  }
}

// Adds one tile of tokens, or two, times `count` blocks to their sums [32][32]. Where there is but
// one, even and odd blocks are added up apart, so that no product waits for the one before.
template <class V, class M, bool Two, bool Restore>
void tiles16(M& unit, const std::uint8_t* panel, int count, std::uint8_t* dense,
             const std::uint16_t* tokens, std::int64_t stride, float* sums) {
  float* second = sums + kTileTokens * kPanel16;
  unit.template load<0>(sums, kSumBytes);
  unit.template load<1>(sums + 16, kSumBytes);
  unit.template load<2>(second, kSumBytes);
  unit.template load<3>(second + 16, kSumBytes);
  if (Restore)
    for (int block = 0; block < std::min(kAhead, count); ++block)
      restore<V>(panel + block * TwoFour16::block_bytes, dense + block * 2 * kTileBytes);
  for (int block = 0; block < count; ++block, tokens += kTileTokens * kColumns16) {
    const std::uint8_t* weight = dense + block * 2 * kTileBytes;
    unit.template load<4>(tokens, 64);
    unit.template load<6>(weight, 64);
    unit.template load<7>(weight + kTileBytes, 64);
    if (Two) {
      unit.template load<5>(tokens + stride, 64);
      unit.template multiply<0, 4, 6>();
      unit.template multiply<1, 4, 7>();
      unit.template multiply<2, 5, 6>();
      unit.template multiply<3, 5, 7>();
    } else if (block % 2) {
      unit.template multiply<2, 4, 6>();
      unit.template multiply<3, 4, 7>();
    } else {
      unit.template multiply<0, 4, 6>();
      unit.template multiply<1, 4, 7>();
    }
    if (Restore && block + kAhead < count) {
      const std::uint8_t* next = panel + (block + kAhead) * TwoFour16::block_bytes;
      for (int at = 0; at < TwoFour16::block_bytes; at += 64)
        V::prefetch(next + 4 * TwoFour16::block_bytes + at);
      restore<V>(next, dense + (block + kAhead) * 2 * kTileBytes);
    }
  }
  unit.template store<0>(sums, kSumBytes);
  unit.template store<1>(sums + 16, kSumBytes);
  unit.template store<2>(second, kSumBytes);
  unit.template store<3>(second + 16, kSumBytes);
}

// sums[tokens][32] = all tokens times one panel; there is room for two tiles of tokens at the end.
template <class V, class M>
void panel_tiles(const std::uint8_t* panel, const TokenTiles& tokens, float* sums) {
  alignas(64) std::uint8_t dense[kRestored * 2 * kTileBytes];
  // Of a lone tile only the tokens that there are.
  M unit(tokens.tiles == 1 ? static_cast<int>(tokens.count) : kTileTokens);
  const std::int64_t stride = tokens.blocks * kTileTokens * kColumns16;
  for (std::int64_t block = 0; block < tokens.blocks; block += kRestored) {
    const int count = static_cast<int>(std::min<std::int64_t>(kRestored, tokens.blocks - block));
    const std::uint8_t* at = panel + block * TwoFour16::block_bytes;
    for (std::int64_t tile = 0; tile < tokens.tiles; tile += 2) {
      const std::uint16_t* own = tokens.at(tile, block);
      float* to = sums + tile * kTileTokens * kPanel16;
      const bool two = tile + 1 < tokens.tiles;
      if (tile == 0 && two)
        tiles16<V, M, true, true>(unit, at, count, dense, own, stride, to);
      else if (tile == 0)
        tiles16<V, M, false, true>(unit, at, count, dense, own, stride, to);
      else if (two)
        tiles16<V, M, true, false>(unit, at, count, dense, own, stride, to);
      else
        tiles16<V, M, false, false>(unit, at, count, dense, own, stride, to);
    }
  }
  if (tokens.tiles % 2) {
    float* last = sums + (tokens.tiles - 1) * kTileTokens * kPanel16;
    for (int i = 0; i < kTileTokens * kPanel16; ++i) last[i] += last[kTileTokens * kPanel16 + i];
  }
}

template <class V, class M>
void multiply_tiles(const Bf16Call& call) {
  in_rounds<V, TokenTiles>(call, kHeldTokens, TwoFour16::block_bytes,
                           [](const std::uint8_t* weight, const TokenTiles& tokens) {
    std::vector<float> sums((tokens.tiles + tokens.tiles % 2) * kTileTokens * kPanel16, 0.0f);
    panel_tiles<V, M>(weight, tokens, sums.data());
    return sums;
  });
}

template <class V, class M>
bool run_bf16_on(Bf16Operation operation, const Bf16Call& call) {
  switch (operation) {
    case Bf16Operation::kTwoFour: multiply16<V, TwoFour16>(call); return true;
    case Bf16Operation::kDense: multiply16<V, Dense16>(call); return true;
    case Bf16Operation::kTiles: multiply_tiles<V, M>(call); return true;
  }
  return false;
}

}  // namespace
}  // namespace sparseserve
