// The C interface, for ctypes. It links neither to Python nor to torch, so that one binary serves
// every version of both. Arguments are checked by the caller, serving/kernels/cpu_library.py.
#include "units.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum Unit : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

}  // namespace

// Raised whenever the arguments, what they may be, or the layouts change.
EXPORT int sparseserve_version() { return 2; }

// The best vector unit of this processor.
EXPORT int sparseserve_unit() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return kAvx2;
#endif
  return kPortable;
}

// Returns 0, or 1 for an operation, type or unit that there is not.
EXPORT int sparseserve_run(int unit, int operation, int stored, const void* weight,
                           const float* inputs, float* outputs, std::int64_t batch,
                           std::int64_t rows, std::int64_t columns, int threads, void* parallel) {
  using namespace sparseserve;
  const Call call{static_cast<const std::uint8_t*>(weight), inputs, outputs,
                  batch, rows, columns, threads,
                  reinterpret_cast<Parallel>(parallel)};
  const auto wanted = static_cast<Operation>(operation);
  const auto type = static_cast<Stored>(stored);
  switch (unit) {
    case kPortable: return run_portable(wanted, type, call) ? 0 : 1;
#if defined(__x86_64__)
    case kAvx2: return run_avx2(wanted, type, call) ? 0 : 1;
    case kAvx512: return run_avx512(wanted, type, call) ? 0 : 1;
#endif
    default: return 1;
  }
}
