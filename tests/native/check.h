// Tests of the CPU kernels without torch: random inputs, straightforward loops in double, every instruction-set level
// of this CPU. Registered by TTSK_TEST, run by main.cpp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "ttskernels/dtype.h"

namespace ttsk::testing {

constexpr double kEps = 0x1p-24;  // float's rounding to nearest
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// splitmix64: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }
  int64_t Below(int64_t n) { return static_cast<int64_t>(Next() % static_cast<uint64_t>(n)); }
  int64_t Between(int64_t least, int64_t most) { return least + Below(most - least + 1); }
  bool Chance(double p) { return Uniform() < p; }
  double Normal() { return std::sqrt(-2 * std::log(1 - Uniform())) * std::cos(6.283185307179586 * Uniform()); }
  template <typename T>
  T Pick(std::initializer_list<T> from) { return from.begin()[Below(static_cast<int64_t>(from.size()))]; }

 private:
  uint64_t state_;
};

// Elements of a type as doubles, and their bytes for a kernel. 64-byte aligned, NaN until set.
class Array {
 public:
  Array(DType type, int64_t count);
  static Array Normal(DType type, int64_t count, Random& random, double scale = 1.0);
  double Get(int64_t i) const;
  void Set(int64_t i, double value);  // rounds to nearest even
  int64_t size() const { return count_; }
  DType type() const { return type_; }
  void* data() { return bytes_.data() + shift_; }
  const void* data() const { return bytes_.data() + shift_; }
  float* floats() { return static_cast<float*>(data()); }

 private:
  DType type_;
  int64_t count_, shift_;
  std::vector<unsigned char> bytes_;
};

// Relative rounding of one value of a type.
inline double Rounding(DType type) {
  return type == DType::kFloat32 ? kEps : type == DType::kFloat16 ? 0x1p-11 : 0x1p-8;
}
inline const char* NameOf(DType type) {
  return type == DType::kFloat32 ? "fp32" : type == DType::kFloat16 ? "fp16" : "bf16";
}
inline DType AnyType(Random& random) { return random.Pick({DType::kFloat32, DType::kFloat16, DType::kBFloat16}); }

// Counts what is compared and prints the first few failures. `what` is set for each case.
class Checks {
 public:
  std::string what;
  int64_t values = 0, failures = 0;
  // Within tolerance; two NaNs agree.
  void Near(int64_t index, double got, double want, double tolerance) {
    ++values;
    const bool same = got == want || (std::isnan(got) && std::isnan(want));
    if (!same && !(std::fabs(got - want) <= tolerance)) Fail(index, got, want, tolerance);
  }
  void Equal(int64_t index, double got, double want) { Near(index, got, want, 0.0); }
  void True(bool holds, const char* message) {
    ++values;
    if (!holds && failures++ < 5) std::printf("    %s: %s\n", what.c_str(), message);
  }

 private:
  void Fail(int64_t index, double got, double want, double tolerance) {
    if (failures++ < 5) {
      std::printf("    %s: [%lld] is %.9g, must be %.9g within %.2g\n", what.c_str(), static_cast<long long>(index), got,
                  want, tolerance);
    }
  }
};

template <typename... Values>
std::string Text(const char* format, Values... values) {
  char line[256];
  std::snprintf(line, sizeof(line), format, values...);
  return line;
}

using Test = void (*)(Checks& check, Random& random);
struct Registered {
  Registered(const char* name, Test test);
};

}  // namespace ttsk::testing

#define TTSK_TEST(name)                                                                         \
  static void name(::ttsk::testing::Checks& check, ::ttsk::testing::Random& random);            \
  static const ::ttsk::testing::Registered registered_##name(#name, name);                      \
  static void name([[maybe_unused]] ::ttsk::testing::Checks& check, [[maybe_unused]] ::ttsk::testing::Random& random)
