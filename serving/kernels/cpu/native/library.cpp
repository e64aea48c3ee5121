// The C interface, for ctypes. It links neither to Python nor to torch, so that one binary serves
// every version of both. Arguments are checked by the caller, serving/kernels/cpu/library.py.
#include <cstring>

#include "units.h"

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

enum Unit : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// What sparseserve_run is given, addresses as integers; the caller packs the same eleven fields.
struct Request {
  std::int64_t unit, operation, stored;
  std::int64_t weight, inputs, outputs;
  std::int64_t batch, rows, columns;
  std::int64_t threads, parallel;
};

template <class T>
T* address(std::int64_t value) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value));
}

}  // namespace

// Raised whenever the arguments, what they may be, or the layouts change.
EXPORT int sparseserve_version() { return 3; }

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

// Carries out the Request at `bytes`, which need not be aligned. Returns 0, or 1 for an operation,
// type or unit that there is not.
EXPORT int sparseserve_run(const char* bytes) {
  using namespace sparseserve;
  Request request;
  std::memcpy(&request, bytes, sizeof request);
  const Call call{address<const std::uint8_t>(request.weight),
                  address<const float>(request.inputs),
                  address<float>(request.outputs),
                  request.batch,
                  request.rows,
                  request.columns,
                  static_cast<int>(request.threads),
                  reinterpret_cast<Parallel>(static_cast<std::uintptr_t>(request.parallel))};
  const auto wanted = static_cast<Operation>(request.operation);
  const auto type = static_cast<Stored>(request.stored);
  switch (request.unit) {
    case kPortable: return run_portable(wanted, type, call) ? 0 : 1;
#if defined(__x86_64__)
    case kAvx2: return run_avx2(wanted, type, call) ? 0 : 1;
    case kAvx512: return run_avx512(wanted, type, call) ? 0 : 1;
#endif
    default: return 1;
  }
}
