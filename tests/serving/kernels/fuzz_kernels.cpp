// Calls every kernel on every vector unit of this processor with buffers of exactly the size they
// are promised, for many shapes and random bytes. The sanitizers this is compiled with do the rest.
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

extern "C" int sparseserve_unit();
extern "C" int sparseserve_run(const char* bytes);
extern "C" int sparseserve_int8_units();
extern "C" int sparseserve_int8(const char* bytes);
extern "C" int sparseserve_bf16_units();
extern "C" int sparseserve_tiles();
extern "C" int sparseserve_bf16(const char* bytes);

namespace {

std::int64_t address(const void* data) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data));
}

// Random bytes hold every code and place, also those that no weight has.
int int8_calls(std::mt19937& random) {
  int calls = 0;
  for (int unit = 0; unit < 4; ++unit)
    for (int number = 0; number < 90 && sparseserve_int8_units() >> unit & 1; ++number) {
      const bool wide = number % 2;
      const std::int64_t rows = 1 + random() % 100;
      const std::int64_t columns = 4 * (1 + random() % 160);
      const std::int64_t batch = number % 30 ? random() % 20 : 250 + random() % 20;
      std::vector<std::uint8_t> weight((rows + 31) / 32 * ((columns + 7) / 8) * 160);
      for (auto& byte : weight) byte = static_cast<std::uint8_t>(random());
      std::vector<float> scales(rows, 0.5f);
      const int size = wide ? 4 : 2;
      std::vector<std::uint8_t> inputs(batch * columns * size), bias(rows * size);
      for (auto& byte : inputs) byte = static_cast<std::uint8_t>(random() % 127);
      std::vector<std::uint8_t> outputs(batch * rows * size);
      // Int8Request of library.cpp.
      const std::int64_t request[] = {
          unit, wide ? 2 : 0, address(weight.data()), address(scales.data()),
          address(inputs.data()), number % 3 ? address(bias.data()) : 0, address(outputs.data()),
          batch, rows, columns, 1, 0};
      if (sparseserve_int8(reinterpret_cast<const char*>(request))) return -1;
      ++calls;
    }
  return calls;
}

int bf16_calls(std::mt19937& random) {
  int calls = 0;
  for (int unit = 0; unit < 2; ++unit)
    for (int number = 0; number < 120 && sparseserve_bf16_units() >> unit & 1; ++number) {
      const int operation = number % 3;  // the last takes tiles
      const bool dense = operation == 1;
      if (operation == 2 && unit && sparseserve_tiles()) continue;
      const std::int64_t rows = 1 + random() % 100;
      const std::int64_t columns = dense ? 1 + random() % 700 : 4 * (1 + random() % 170);
      const std::int64_t weights = 1 + number % 5;
      std::vector<std::int64_t> groups;  // Bf16Group of library.cpp
      std::int64_t batch = 0;
      for (std::int64_t i = 0; i < weights; ++i, batch += groups.back()) {
        groups.push_back(random() % weights);
        groups.push_back(batch);
        groups.push_back(number % 8 ? random() % 40 : 250 + random() % 20);
      }
      const std::int64_t panels = (rows + 31) / 32, blocks = (columns + 31) / 32;
      const std::int64_t weight_bytes = panels * blocks * (dense ? 2048 : 1152);
      std::vector<std::uint8_t> weight(weights * weight_bytes);
      for (auto& byte : weight) byte = static_cast<std::uint8_t>(random());
      std::vector<std::uint16_t> inputs(batch * columns, 0x3f80), bias(weights * rows, 0x3f80);
      std::vector<std::uint16_t> outputs(batch * rows);
      const bool grouped = weights > 1;
      // Bf16Request of library.cpp.
      const std::int64_t request[] = {
          unit, operation, address(weight.data()), address(inputs.data()),
          number % 4 ? address(bias.data()) : 0, address(outputs.data()),
          grouped ? address(groups.data()) : 0, grouped ? weights : batch, weight_bytes, rows,
          columns, 1, 0};
      if (sparseserve_bf16(reinterpret_cast<const char*>(request))) return -1;
      ++calls;
    }
  return calls;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const int size_of[] = {2, 2, 4};
  int calls = 0;
  for (int unit = 0; unit <= sparseserve_unit(); ++unit)
    for (int stored = 0; stored < 3; ++stored)
      for (int operation = 0; operation < 4; ++operation)
        for (int number = 0; number < 45; ++number) {
          const std::int64_t rows = 1 + random() % 100;
          const std::int64_t columns = 32 * (1 + random() % 9);
          const std::int64_t batch = random() % (operation == 0 ? 17 : 20);
          const std::int64_t panels = (rows + 31) / 32;
          const bool dense = operation == 3;
          const std::size_t block = dense ? 1024u * size_of[stored] : 128u + 512u * size_of[stored];
          std::vector<std::uint8_t> weight(panels * (columns / 32) * block);
          for (auto& byte : weight) byte = static_cast<std::uint8_t>(random());
          std::vector<float> inputs(batch * columns);
          for (auto& value : inputs) value = static_cast<float>(random() % 100) - 50.0f;
          const bool unpack = operation == 2;
          std::vector<float> outputs(unpack ? columns * panels * 32 : batch * rows);
          // Request of library.cpp.
          const std::int64_t request[] = {unit, operation, stored, address(weight.data()),
                                          address(inputs.data()), address(outputs.data()), batch,
                                          unpack ? panels * 32 : rows, columns, 1, 0};
          if (sparseserve_run(reinterpret_cast<const char*>(request)))
            return 1;
          ++calls;
        }
  const int in_int8 = int8_calls(random), in_bf16 = bf16_calls(random);
  std::printf("%d calls, %d in int8, %d in bfloat16\n", calls, in_int8, in_bf16);
}
