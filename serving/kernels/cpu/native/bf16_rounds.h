// How products of bfloat16 are shared out: tokens are copied for some products at once, then every
// panel of every product is one piece of work. Templates are over V, the vector unit, and Tokens, the
// order that the tokens are copied into.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "bf16_call.h"
#include "bfloat16.h"

namespace sparseserve {
namespace {  // see kernels.h

constexpr int kPanel16 = 32;  // rows of a panel

// Some rows of the outputs: the sums plus the bias, rounded.
template <class V>
void finish16(const Bf16Product& product, std::int64_t rows, std::int64_t first_row,
              const float* sums) {
  const int count = static_cast<int>(std::min<std::int64_t>(kPanel16, rows - first_row));
  float bias[kPanel16] = {};
  if (product.bias != nullptr)
    for (int i = 0; i < count; ++i) bias[i] = as_float(product.bias[first_row + i]);
  for (std::int64_t token = 0; token < product.batch; ++token)
    V::write(sums + token * kPanel16, product.bias == nullptr ? nullptr : bias, count,
             product.outputs + token * rows + first_row);
}

// Products with few enough tokens to be copied at once.
template <class Tokens>
struct Round {
  std::vector<Bf16Product> products;
  std::vector<Tokens> tokens;
  std::vector<std::pair<Tokens*, std::int64_t>> tiles;

  Round(const Bf16Call& call, std::vector<Bf16Product> taken) : products(std::move(taken)) {
    for (const Bf16Product& product : products)
      tokens.emplace_back(product.inputs, call.columns, product.batch);
    for (Tokens& own : tokens)
      for (std::int64_t tile = 0; tile < own.tiles; ++tile) tiles.emplace_back(&own, tile);
  }
};

// Calls multiply(weight of a panel, tokens), which returns their sums, for every panel of every
// product. A thread takes one panel of one product at a time, so experts share all threads.
template <class V, class Tokens, class Multiply>
void in_rounds(const Bf16Call& call, std::int64_t held, int block_bytes, const Multiply& multiply) {
  const std::int64_t panels = (call.rows + kPanel16 - 1) / kPanel16;
  std::vector<Bf16Product> taken;
  std::int64_t tokens = 0;
  const auto run = [&] {
    Round<Tokens> round(call, std::move(taken));
    // A few short tokens are copied before other threads would have woken up.
    const int threads = tokens * call.columns < 16384 ? 1 : call.threads;
    each(static_cast<std::int64_t>(round.tiles.size()), threads, call.parallel,
         [&](std::int64_t tile) { round.tiles[tile].first->fill(round.tiles[tile].second); });
    each(panels * static_cast<std::int64_t>(round.products.size()), call.threads, call.parallel,
         [&](std::int64_t item) {
           const Bf16Product& product = round.products[item / panels];
           const Tokens& own = round.tokens[item / panels];
           const std::int64_t panel = item % panels;
           const std::uint8_t* weight = product.weight + panel * own.blocks * block_bytes;
           finish16<V>(product, call.rows, panel * kPanel16, multiply(weight, own).data());
         });
    taken.clear();
    tokens = 0;
  };
  for (Bf16Product left : call.products)
    while (left.batch > 0) {
      Bf16Product part = left;
      part.batch = std::min(held - tokens, left.batch);
      left.batch -= part.batch;
      left.inputs += part.batch * call.columns;
      left.outputs += part.batch * call.rows;
      tokens += part.batch;
      taken.push_back(part);
      if (tokens == held) run();
    }
  if (tokens > 0) run();
}

}  // namespace
}  // namespace sparseserve
