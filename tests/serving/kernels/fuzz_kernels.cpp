// Calls every kernel on every vector unit of this processor with buffers of exactly the size they
// are promised, for many shapes and random bytes. The sanitizers this is compiled with do the rest.
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

extern "C" int sparseserve_unit();
extern "C" int sparseserve_run(const char* bytes);

namespace {

std::int64_t address(const void* data) {
  return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(data));
}

}  // namespace

int main() {
  std::mt19937 random(1);
  const int size_of[] = {2, 2, 4};
  int calls = 0;
  for (int unit = 0; unit <= sparseserve_unit() && unit < 2; ++unit)
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
  std::printf("%d calls\n", calls);
}
