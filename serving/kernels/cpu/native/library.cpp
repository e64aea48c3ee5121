// The C interface, for ctypes. It links neither to Python nor to torch, so that one binary serves
// every version of both. Arguments are checked by the caller, serving/kernels/cpu/library.py.
#include <cstring>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "bf16_call.h"
#include "int8_call.h"
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

enum Int8Unit : int { kInt8Portable = 0, kInt8Avx2 = 1, kInt8AvxVnni = 2, kInt8Avx512Vnni = 3 };

// What sparseserve_int8 is given.
struct Int8Request {
  std::int64_t unit, type;
  std::int64_t weight, scales, inputs, bias, outputs;
  std::int64_t batch, rows, columns;
  std::int64_t threads, parallel;
};

enum Bf16Unit : int { kBf16Portable = 0, kBf16Avx512 = 1 };

// What sparseserve_bf16 is given. `groups` is the address of `count` Bf16Groups; null is one weight
// for `count` tokens.
struct Bf16Request {
  std::int64_t unit, operation;
  std::int64_t weight, inputs, bias, outputs;
  std::int64_t groups, count, weight_bytes, rows, columns;
  std::int64_t threads, parallel;
};

// Consecutive tokens, and which of the weights, `weight_bytes` apart, multiplies them.
struct Bf16Group {
  std::int64_t weight, first, batch;
};

#if defined(__x86_64__)
// Not every compiler that knows a unit has a name to ask for it. These are bits of leaf 7, 1.
constexpr int kAvxVnniBit = 4, kAvx512Bf16Bit = 5;

bool has_bit(int bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> bit & 1);
}
#endif

// Whether products may use AMX's tiles.
enum Tiles : int { kTilesReady = 0, kNoTiles = 1, kTilesRefused = 2 };

Tiles ask_for_tiles() {
#if defined(SPARSESERVE_PLAIN_TILES)
  return kTilesReady;
#elif defined(__x86_64__) && defined(__linux__)
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;  // of EDX of leaf 7, 0
  constexpr long request_permission = 0x1023, tile_data = 18;   // arch_prctl(2), XFEATURE
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile))
    return kNoTiles;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0 ? kTilesReady : kTilesRefused;
#else
  return kNoTiles;
#endif
}

// Linux ends a process that uses tiles without having asked. Asked once, it is remembered.
Tiles tiles() {
  static const Tiles answer = ask_for_tiles();
  return answer;
}

template <class T>
T* address(std::int64_t value) {
  return reinterpret_cast<T*>(static_cast<std::uintptr_t>(value));
}

}  // namespace

// Raised whenever the arguments, what they may be, or the layouts change.
EXPORT int sparseserve_version() { return 6; }

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

// The vector units of this processor that int8 products know, one bit each.
EXPORT int sparseserve_int8_units() {
  int units = 1 << kInt8Portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) {
    units |= 1 << kInt8Avx2;
#if defined(SPARSESERVE_AVX_VNNI)
    if (has_bit(kAvxVnniBit)) units |= 1 << kInt8AvxVnni;
#endif
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vnni"))
    units |= 1 << kInt8Avx512Vnni;
#endif
  return units;
}

// Carries out the Int8Request at `bytes`, which need not be aligned. Returns 0, or 1 for a type or
// unit that there is not.
EXPORT int sparseserve_int8(const char* bytes) {
  using namespace sparseserve;
  Int8Request request;
  std::memcpy(&request, bytes, sizeof request);
  const Int8Call call{address<const std::uint8_t>(request.weight),
                      address<const float>(request.scales),
                      address<const void>(request.inputs),
                      address<const void>(request.bias),
                      address<void>(request.outputs),
                      static_cast<Stored>(request.type),
                      request.batch,
                      request.rows,
                      request.columns,
                      static_cast<int>(request.threads),
                      reinterpret_cast<Parallel>(static_cast<std::uintptr_t>(request.parallel))};
  switch (request.unit) {
    case kInt8Portable: return run_int8_portable(call) ? 0 : 1;
#if defined(__x86_64__)
    case kInt8Avx2: return run_int8_avx2(call) ? 0 : 1;
    case kInt8Avx512Vnni: return run_int8_avx512_vnni(call) ? 0 : 1;
#endif
#if defined(SPARSESERVE_AVX_VNNI)
    case kInt8AvxVnni: return run_int8_avx_vnni(call) ? 0 : 1;
#endif
    default: return 1;
  }
}

// The vector units of this processor that bfloat16 products know, one bit each.
EXPORT int sparseserve_bf16_units() {
  int units = 1 << kBf16Portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      has_bit(kAvx512Bf16Bit))
    units |= 1 << kBf16Avx512;
#endif
  return units;
}

// Whether vector units of bfloat16 have a matrix unit beside them: one of Tiles.
EXPORT int sparseserve_tiles() { return tiles(); }

// Carries out the Bf16Request at `bytes`, which need not be aligned. Returns 0, or 1 for an
// operation or unit that there is not.
EXPORT int sparseserve_bf16(const char* bytes) {
  using namespace sparseserve;
  Bf16Request request;
  std::memcpy(&request, bytes, sizeof request);
  Bf16Call call{{},
                request.rows,
                request.columns,
                static_cast<int>(request.threads),
                reinterpret_cast<Parallel>(static_cast<std::uintptr_t>(request.parallel))};
  const auto* groups = address<const Bf16Group>(request.groups);
  const auto* bias = address<const std::uint16_t>(request.bias);
  const Bf16Group all{0, 0, request.count};
  for (std::int64_t i = 0; i < (groups == nullptr ? 1 : request.count); ++i) {
    const auto [weight, first, batch] = groups == nullptr ? all : groups[i];
    call.products.push_back(
        {address<const std::uint8_t>(request.weight) + weight * request.weight_bytes,
         address<const std::uint16_t>(request.inputs) + first * request.columns,
         bias == nullptr ? nullptr : bias + weight * request.rows,
         address<std::uint16_t>(request.outputs) + first * request.rows, batch});
  }
  const auto wanted = static_cast<Bf16Operation>(request.operation);
  switch (request.unit) {
    case kBf16Portable: return run_bf16_portable(wanted, call) ? 0 : 1;
#if defined(__x86_64__)
    case kBf16Avx512:
      if (wanted == Bf16Operation::kTiles && tiles() != kTilesReady) return 1;
      return run_bf16_avx512(wanted, call) ? 0 : 1;
#endif
    default: return 1;
  }
}
