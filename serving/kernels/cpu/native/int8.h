// Products of activations with a 2:4 weight of int8 codes, in integers: W8A8.
//
// Activations are quantized first, each token by its largest value. A token's eight values become
// sixteen bytes, the values and then their negatives. A kept code picks the byte that its place and
// its sign name, so that only sizes are multiplied: unsigned by signed, as vector units want it,
// and no product of two pairs leaves 16 bits. The weight is stored in panels of 32 rows
// (serving/kernels/cpu/int8_layout.py).
//
// Everything here is a template over V, the vector unit (int8_*.cpp). All units give the same bits:
// sums are exact, and each step in float32 is rounded alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "int8_call.h"
#include "int8_tokens.h"

// A product and a sum must not become one instruction on some units only.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif

// See kernels.h. Where all tiles are inlined in one function, GCC keeps their sums in memory.
#if defined(__GNUC__)
#define SPARSESERVE_UNROLL _Pragma("GCC unroll 12")
#define SPARSESERVE_NOINLINE __attribute__((noinline))
#else
#define SPARSESERVE_UNROLL
#define SPARSESERVE_NOINLINE
#endif

namespace sparseserve {
namespace {  // see kernels.h

// Blocks that are multiplied, and unpacked, at once: 10 KiB of a panel, 16 KiB unpacked.
constexpr std::int64_t kChunk = 64;
// Tokens whose quantized values are held at once: at most so many times two bytes a column.
constexpr std::int64_t kHeld = 128;

// Codes as they are stored: their places and signs are taken apart for each group of tokens.
template <class V>
struct Stored8 {
  static constexpr bool streamed = true;
  const std::uint8_t* blocks;
  const std::uint8_t* next;
  typename V::Codes codes(std::int64_t block, int strip) const {
    return V::codes(blocks + block * kBlockBytes, strip);
  }
};

// Codes taken apart beforehand, for many groups of tokens. Where loads are scarce, each tile fetching
// the next chunk again costs more than it saves.
template <class V>
struct Unpacked8 {
  static constexpr bool streamed = V::few_groups == 1;
  const std::uint8_t* blocks;
  const std::uint8_t* next;
  typename V::Codes codes(std::int64_t block, int strip) const {
    return V::load_codes(blocks + (strip * kChunk + block) * 2 * V::bytes);
  }
};

// Adds T tokens times R strips of a panel, from strip S on, to sums[T][32].
template <class V, int T, int R, int S, class Source>
SPARSESERVE_NOINLINE void tile8(Source source, std::int64_t count, const std::int8_t* tokens,
                                std::int32_t* sums) {
  typename V::sums own[R][T];
  sums += S * V::rows;
  SPARSESERVE_UNROLL
  for (int r = 0; r < R; ++r)
    SPARSESERVE_UNROLL
    for (int t = 0; t < T; ++t) own[r][t] = V::load(sums + t * kPanel8 + r * V::rows);
  for (std::int64_t block = 0; block < count; ++block, tokens += T * kTokenBytes) {
    SPARSESERVE_UNROLL
    for (int r = 0; r < R; ++r) {
      // The next chunk comes from memory meanwhile, each strip asks for its share of it.
      for (int line = 0; Source::streamed && line < 5 * V::rows; line += 40)
        __builtin_prefetch(source.next + block * kBlockBytes + (S + r) * 5 * V::rows + line);
      const typename V::Codes codes = source.codes(block, S + r);
      SPARSESERVE_UNROLL
      for (int t = 0; t < T; ++t)
        own[r][t] = V::add_products(own[r][t], codes, tokens + t * kTokenBytes);
    }
  }
  SPARSESERVE_UNROLL
  for (int r = 0; r < R; ++r)
    SPARSESERVE_UNROLL
    for (int t = 0; t < T; ++t) V::store(sums + t * kPanel8 + r * V::rows, own[r][t]);
}

// The same for all strips, from strip S on, as many at once as registers hold the sums of.
template <class V, int T, int S = 0, class Source>
void strips8(const Source& source, std::int64_t count, const std::int8_t* tokens,
             std::int32_t* sums) {
  constexpr int all = kPanel8 / V::rows;
  constexpr int at_once = T * all <= V::most_sums ? all : T * 2 <= V::most_sums ? 2 : 1;
  tile8<V, T, at_once, S>(source, count, tokens, sums);
  if constexpr (S + at_once < all) strips8<V, T, S + at_once>(source, count, tokens, sums);
}

// One group of tokens, of which there are at most T.
template <class V, int T = V::most_tokens, class Source>
void group8(const Source& source, std::int64_t count, const Tokens& tokens, std::int64_t group,
            std::int64_t block, std::int32_t* sums) {
  const std::int64_t first = tokens.first(group);
  if constexpr (T > 1)
    if (tokens.first(group + 1) - first < T)
      return group8<V, T - 1>(source, count, tokens, group, block, sums);
  strips8<V, T>(source, count, tokens.at(group, block), sums + first * kPanel8);
}

// sums[batch][32] = all tokens times one panel.
template <class V>
void panel8(const std::uint8_t* panel, const Tokens& tokens, std::int32_t* sums) {
  alignas(64) std::uint8_t unpacked[kChunk * kPanel8 * 8];
  const std::int64_t chunks = (tokens.blocks + kChunk - 1) / kChunk;
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const std::int64_t block = chunk * tokens.blocks / chunks;
    const std::int64_t count = (chunk + 1) * tokens.blocks / chunks - block;
    const std::uint8_t* at = panel + block * kBlockBytes;
    const std::uint8_t* next = at + count * kBlockBytes;
    if (tokens.groups() <= V::few_groups) {
      for (std::int64_t group = 0; group < tokens.groups(); ++group)
        group8<V>(Stored8<V>{at, next}, count, tokens, group, block, sums);
      continue;
    }
    for (int strip = 0; strip < kPanel8 / V::rows; ++strip)
      for (std::int64_t i = 0; i < count; ++i)
        V::store_codes(unpacked + (strip * kChunk + i) * 2 * V::bytes,
                       V::codes(at + i * kBlockBytes, strip));
    for (std::int64_t group = 0; group < tokens.groups(); ++group) {
      // The next chunk comes from memory meanwhile, with each group a share of it.
      constexpr std::int64_t lines = Unpacked8<V>::streamed ? 0 : kChunk * kBlockBytes / 64;
      const std::int64_t end = (group + 1) * lines / tokens.groups();
      for (std::int64_t line = group * lines / tokens.groups(); line < end; ++line)
        __builtin_prefetch(next + line * 64);
      group8<V>(Unpacked8<V>{unpacked, next}, count, tokens, group, block, sums);
    }
  }
}

// Some rows of the outputs: sums times both scales, plus the bias.
void finish8(const Int8Call& call, const Tokens& tokens, std::int64_t first_token,
             std::int64_t first_row, const std::int32_t* sums) {
  const int count = static_cast<int>(std::min<std::int64_t>(kPanel8, call.rows - first_row));
  float scales[kPanel8] = {}, bias[kPanel8] = {}, product[kPanel8];
  std::memcpy(scales, call.scales + first_row, count * sizeof(float));
  if (call.bias != nullptr) read_floats(call.bias, call.type, first_row, count, bias);
  for (std::int64_t token = 0; token < tokens.count; ++token, sums += kPanel8) {
    const float own = tokens.scales[token];
    for (int i = 0; i < kPanel8; ++i) product[i] = static_cast<float>(sums[i]) * own * scales[i];
    // Adding zero would make -0 of no bias +0.
    if (call.bias != nullptr)
      for (int i = 0; i < kPanel8; ++i) product[i] += bias[i];
    write_floats(product, call.type, (first_token + token) * call.rows + first_row, count,
                 call.outputs);
  }
}

template <class V>
bool run_int8_on(const Int8Call& call) {
  if (call.type == Stored::kFloat16) return false;
  const std::int64_t panels = (call.rows + kPanel8 - 1) / kPanel8;
  const std::int64_t blocks = (call.columns + 7) / 8;
  for (std::int64_t first = 0; first < call.batch; first += kHeld) {
    Tokens tokens(std::min(kHeld, call.batch - first), blocks, V::most_tokens);
    // A few short tokens are quantized before other threads would have woken up.
    const int threads = tokens.count * call.columns < 8192 ? 1 : call.threads;
    each(tokens.count, threads, call.parallel,
         [&](std::int64_t token) { tokens.quantize<V>(call, first + token, token); });
    each(panels, call.threads, call.parallel, [&](std::int64_t panel) {
      std::vector<std::int32_t> sums(tokens.count * kPanel8, 0);
      panel8<V>(call.weight + panel * blocks * kBlockBytes, tokens, sums.data());
      finish8(call, tokens, first, panel * kPanel8, sums.data());
    });
  }
  return true;
}

}  // namespace
}  // namespace sparseserve
