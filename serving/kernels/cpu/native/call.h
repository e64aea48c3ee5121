// What a caller asks for, and how its work is shared among threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace sparseserve {

enum class Operation : int { kDirect = 0, kUnpacked = 1, kUnpack = 2, kDense = 3 };
enum class Stored : int { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

// GOMP_parallel of the OpenMP library that the caller's program already runs on: its threads are
// used, so that two pools never compete for the cores. Null runs everything on the calling thread.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// Runs work(item) for every item below `count`. An item is computed by one thread from start to end,
// so the result does not depend on their number.
template <class Work>
void each(std::int64_t count, int threads, Parallel parallel, const Work& work) {
  struct Share {
    const Work& work;
    std::atomic<std::int64_t> next;
    std::int64_t count;
  } share{work, {0}, count};
  const auto run = [](void* data) {
    auto& own = *static_cast<Share*>(data);
    for (std::int64_t item; (item = own.next.fetch_add(1)) < own.count;) own.work(item);
  };
  if (parallel != nullptr && threads > 1 && share.count > 1)
    parallel(run, &share, static_cast<unsigned>(threads), 0);
  else
    run(&share);
}

struct Call {
  const std::uint8_t* weight;
  const float* inputs;     // [batch][columns]
  float* outputs;          // [batch][rows]; for kUnpack [columns][rows], rows a multiple of 32
  std::int64_t batch;
  std::int64_t rows;
  std::int64_t columns;    // a multiple of 32
  int threads;
  Parallel parallel;

  // Runs work(panel) for every panel of 32 rows.
  template <class Work>
  void each_panel(const Work& work) const {
    each((rows + 31) / 32, threads, parallel, work);
  }
};

}  // namespace sparseserve
