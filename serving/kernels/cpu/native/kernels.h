// Products of a matrix of activations with a weight that is stored in panels of 32 rows.
//
// The layouts are described in serving/kernels/cpu/layout.py, which makes them. Everything here is
// a template over V, the vector unit (avx2.cpp, avx512.cpp, portable.cpp), and T,
// the type the values are stored in (values.h). All sums are float32.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "call.h"
#include "values.h"

// Left to itself GCC may keep the loop and the sums in memory, at a third of the speed.
#if defined(__GNUC__)
#define SPARSESERVE_UNROLL _Pragma("GCC unroll 8")
#else
#define SPARSESERVE_UNROLL
#endif

namespace sparseserve {
// Internal to each file that includes this: the linker must not take code that was compiled for one
// vector unit for another's.
namespace {

constexpr int kPanel = 32;       // rows of a panel
constexpr int kBlock = 32;       // columns that one word of positions covers
constexpr int kGroups = 8;       // groups of four in a block
constexpr int kDirectBatch = 16;  // most rows of activations that are multiplied without unpacking
constexpr int kTileRows = 6;     // rows of activations in a register tile
constexpr int kUnpacked = 4096;  // weights that are unpacked at once: 16 KiB, half an L1 cache

// Rows of a panel that a register tile takes, and the blocks of so many rows to unpack at once.
template <class V>
constexpr int strip_rows = 2 * V::lanes;
template <class V>
constexpr int chunk_blocks = kUnpacked / (strip_rows<V> * kBlock);

// One block of a 2:4 panel: a word of positions for each row, then the values of eight groups.
template <class T>
constexpr std::size_t block_bytes() {
  return sizeof(std::uint32_t) * kPanel + kGroups * 2 * kPanel * sizeof(typename T::stored);
}

// sums[B][32] = B rows of activations, from `inputs` on, times one panel, permuting the activations.
template <class V, class T, int B>
void direct_panel(const std::uint8_t* panel, const Call& call, const float* inputs, float* sums) {
  constexpr int strips = kPanel / V::lanes;
  typename V::floats low[B][strips], high[B][strips];
  for (int b = 0; b < B; ++b)
    for (int s = 0; s < strips; ++s) low[b][s] = high[b][s] = V::zero();
  for (std::int64_t block = 0; block < call.columns / kBlock; ++block) {
    const std::uint8_t* at = panel + block * block_bytes<T>();
    V::prefetch(at + 4 * block_bytes<T>());
    typename V::words positions[strips];
    for (int s = 0; s < strips; ++s) positions[s] = V::load_words(at + s * V::lanes * 4);
    const std::uint8_t* values = at + sizeof(std::uint32_t) * kPanel;
    for (int group = 0; group < kGroups; ++group) {
      typename V::quad four[B];
      for (int b = 0; b < B; ++b)
        four[b] = V::load_quad(inputs + b * call.columns + block * kBlock + group * 4);
      for (int s = 0; s < strips; ++s) {
        typename V::floats first, second;
        T::template load_pair<V>(values, s * V::lanes, first, second);
        for (int b = 0; b < B; ++b)
          low[b][s] = V::multiply_add(first, V::pick(four[b], positions[s]), low[b][s]);
        positions[s] = V::shift_two(positions[s]);
        for (int b = 0; b < B; ++b)
          high[b][s] = V::multiply_add(second, V::pick(four[b], positions[s]), high[b][s]);
        positions[s] = V::shift_two(positions[s]);
      }
      values += 2 * kPanel * sizeof(typename T::stored);
    }
  }
  for (int b = 0; b < B; ++b)
    for (int s = 0; s < strips; ++s)
      V::store(sums + b * kPanel + s * V::lanes, V::add(low[b][s], high[b][s]));
}

// Writes rows `from` to `to` of a block of a 2:4 panel to its 32 columns, which are `stride` apart.
template <class V, class T>
void unpack_block(const std::uint8_t* block, int from, int to, float* dense, std::int64_t stride) {
  const std::uint8_t* values = block + sizeof(std::uint32_t) * kPanel;
  for (int row = from; row < to; row += V::lanes) {
    typename V::words positions = V::load_words(block + row * 4);
    for (int group = 0; group < kGroups; ++group) {
      typename V::floats first, second;
      T::template load_pair<V>(values + group * 2 * kPanel * sizeof(typename T::stored), row, first,
                               second);
      const typename V::words one = V::low_two(positions);
      positions = V::shift_two(positions);
      const typename V::words two = V::low_two(positions);
      positions = V::shift_two(positions);
      float* out = dense + group * 4 * stride + row - from;
      // Positions ascend: the first is never 3, the second never 0.
      V::store(out, V::where_equal(one, 0, first));
      V::store(out + stride, V::either(V::where_equal(one, 1, first), V::where_equal(two, 1, second)));
      V::store(out + 2 * stride,
               V::either(V::where_equal(one, 2, first), V::where_equal(two, 2, second)));
      V::store(out + 3 * stride, V::where_equal(two, 3, second));
    }
  }
}

// Adds R rows of activations times dense[count][strip rows] to sums, whose rows are 32 apart.
template <class V, int R>
void tile(const float* dense, int count, const float* inputs, std::int64_t stride, float* sums) {
  typename V::floats left[R], right[R];
  SPARSESERVE_UNROLL
  for (int r = 0; r < R; ++r) {
    left[r] = V::load(sums + r * kPanel);
    right[r] = V::load(sums + r * kPanel + V::lanes);
  }
  for (int k = 0; k < count; ++k) {
    const typename V::floats a = V::load(dense + k * strip_rows<V>);
    const typename V::floats b = V::load(dense + k * strip_rows<V> + V::lanes);
    SPARSESERVE_UNROLL
    for (int r = 0; r < R; ++r) {
      const typename V::floats x = V::broadcast(inputs + r * stride + k);
      left[r] = V::multiply_add(a, x, left[r]);
      right[r] = V::multiply_add(b, x, right[r]);
    }
  }
  SPARSESERVE_UNROLL
  for (int r = 0; r < R; ++r) {
    V::store(sums + r * kPanel, left[r]);
    V::store(sums + r * kPanel + V::lanes, right[r]);
  }
}

// The same for all rows of activations, and columns from `column` on.
template <class V>
void tiles(const float* dense, int count, const Call& call, std::int64_t column, float* sums) {
  const float* inputs = call.inputs + column;
  for (std::int64_t row = 0; row < call.batch;) {
    const float* x = inputs + row * call.columns;
    float* out = sums + row * kPanel;
    const std::int64_t left = call.batch - row;
    // Seven or eight rows are four and the rest, not six and a thin remainder.
    const int rows = static_cast<int>(left >= kTileRows && left != 7 && left != 8
                                          ? kTileRows
                                          : std::min<std::int64_t>(left, 4));
    switch (rows) {
      case 6: tile<V, 6>(dense, count, x, call.columns, out); break;
      case 4: tile<V, 4>(dense, count, x, call.columns, out); break;
      case 3: tile<V, 3>(dense, count, x, call.columns, out); break;
      case 2: tile<V, 2>(dense, count, x, call.columns, out); break;
      default: tile<V, 1>(dense, count, x, call.columns, out); break;
    }
    row += rows;
  }
}

void write_panel(const Call& call, std::int64_t panel, const float* sums) {
  const std::int64_t first = panel * kPanel;
  const std::int64_t count = std::min<std::int64_t>(kPanel, call.rows - first);
  for (std::int64_t b = 0; b < call.batch; ++b)
    std::memcpy(call.outputs + b * call.rows + first, sums + b * kPanel, count * sizeof(float));
}

// outputs[batch][rows] = inputs times the 2:4 weight, without unpacking it. For small batches.
template <class V, class T>
void direct(const Call& call) {
  const std::size_t bytes = block_bytes<T>() * (call.columns / kBlock);
  if (call.batch > kDirectBatch) return;  // a caller's mistake, which would leave the buffer
  call.each_panel([&](std::int64_t panel) {
    const std::uint8_t* at = call.weight + panel * bytes;
    float sums[kDirectBatch * kPanel];
    for (std::int64_t row = 0; row < call.batch;) {
      // Four rows at a time: the panel is in the cache when the next need it. Five are three and
      // two, which is less than four and one.
      const std::int64_t left = call.batch - row;
      const int rows = static_cast<int>(left == 5 ? 3 : std::min<std::int64_t>(left, 4));
      const float* inputs = call.inputs + row * call.columns;
      float* out = sums + row * kPanel;
      switch (rows) {
        case 1: direct_panel<V, T, 1>(at, call, inputs, out); break;
        case 2: direct_panel<V, T, 2>(at, call, inputs, out); break;
        case 3: direct_panel<V, T, 3>(at, call, inputs, out); break;
        default: direct_panel<V, T, 4>(at, call, inputs, out); break;
      }
      row += rows;
    }
    write_panel(call, panel, sums);
  });
}

// The same for batches of any size: a panel is unpacked, a cache-sized chunk at a time.
template <class V, class T>
void unpacked(const Call& call) {
  const std::int64_t blocks = call.columns / kBlock;
  const std::int64_t chunks = (blocks + chunk_blocks<V> - 1) / chunk_blocks<V>;
  call.each_panel([&](std::int64_t panel) {
    alignas(64) float dense[kUnpacked];
    std::vector<float> sums(call.batch * kPanel, 0.0f);
    const std::uint8_t* at = call.weight + panel * blocks * block_bytes<T>();
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
      const std::int64_t first = chunk * blocks / chunks;
      const int count = static_cast<int>((chunk + 1) * blocks / chunks - first);
      // The next chunk, of this panel or the next, comes from memory while this one is multiplied.
      const std::uint8_t* next = at + (first + count) * block_bytes<T>();
      for (std::size_t line = 0; line < count * block_bytes<T>(); line += 64) V::prefetch(next + line);
      for (int row = 0; row < kPanel; row += strip_rows<V>) {
        for (int i = 0; i < count; ++i)
          unpack_block<V, T>(at + (first + i) * block_bytes<T>(), row, row + strip_rows<V>,
                             dense + i * kBlock * strip_rows<V>, strip_rows<V>);
        tiles<V>(dense, count * kBlock, call, first * kBlock, sums.data() + row);
      }
    }
    write_panel(call, panel, sums.data());
  });
}

// outputs[columns][32 * panels] = the dense weight, transposed, for another library's product.
template <class V, class T>
void unpack(const Call& call) {
  const std::int64_t blocks = call.columns / kBlock;
  call.each_panel([&](std::int64_t panel) {
    const std::uint8_t* at = call.weight + panel * blocks * block_bytes<T>();
    for (std::int64_t block = 0; block < blocks; ++block)
      unpack_block<V, T>(at + block * block_bytes<T>(), 0, kPanel,
                         call.outputs + block * kBlock * call.rows + panel * kPanel, call.rows);
  });
}

// outputs[batch][rows] = inputs times a dense weight in panels, two columns of 32 rows at a time.
template <class V, class T>
void dense(const Call& call) {
  constexpr int strips = kPanel / V::lanes;
  const std::size_t pair = 2 * kPanel * sizeof(typename T::stored);
  call.each_panel([&](std::int64_t panel) {
    const std::uint8_t* at = call.weight + panel * pair * (call.columns / 2);
    std::vector<float> sums(call.batch * kPanel, 0.0f);
    if (call.batch == 1) {
      typename V::floats low[strips], high[strips];
      for (int s = 0; s < strips; ++s) low[s] = high[s] = V::zero();
      for (std::int64_t k = 0; k < call.columns; k += 2, at += pair) {
        V::prefetch(at + 16 * pair);
        const typename V::floats x = V::broadcast(call.inputs + k);
        const typename V::floats y = V::broadcast(call.inputs + k + 1);
        for (int s = 0; s < strips; ++s) {
          typename V::floats first, second;
          T::template load_pair<V>(at, s * V::lanes, first, second);
          low[s] = V::multiply_add(first, x, low[s]);
          high[s] = V::multiply_add(second, y, high[s]);
        }
      }
      for (int s = 0; s < strips; ++s)
        V::store(sums.data() + s * V::lanes, V::add(low[s], high[s]));
    } else {
      alignas(64) float wide[kUnpacked];
      constexpr int chunk = kUnpacked / strip_rows<V>;
      for (std::int64_t column = 0; column < call.columns; column += chunk, at += pair * chunk / 2) {
        const int count = static_cast<int>(std::min<std::int64_t>(chunk, call.columns - column));
        for (int row = 0; row < kPanel; row += strip_rows<V>) {
          for (int k = 0; k < count; k += 2)
            for (int half = 0; half < 2; ++half) {
              float* out = wide + k * strip_rows<V> + half * V::lanes;
              typename V::floats first, second;
              T::template load_pair<V>(at + k / 2 * pair, row + half * V::lanes, first, second);
              V::store(out, first);
              V::store(out + strip_rows<V>, second);
            }
          tiles<V>(wide, count, call, column, sums.data() + row);
        }
      }
    }
    write_panel(call, panel, sums.data());
  });
}

template <class V, class T>
bool run_typed(Operation operation, const Call& call) {
  switch (operation) {
    case Operation::kDirect: direct<V, T>(call); return true;
    case Operation::kUnpacked: unpacked<V, T>(call); return true;
    case Operation::kUnpack: unpack<V, T>(call); return true;
    case Operation::kDense: dense<V, T>(call); return true;
  }
  return false;
}

template <class V>
bool run_on(Operation operation, Stored stored, const Call& call) {
  switch (stored) {
    case Stored::kBfloat16: return run_typed<V, Bfloat16>(operation, call);
    case Stored::kFloat16: return run_typed<V, Float16>(operation, call);
    case Stored::kFloat32: return run_typed<V, Float32>(operation, call);
  }
  return false;
}

}  // namespace
}  // namespace sparseserve
