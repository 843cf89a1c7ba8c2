// kernel_tests [--isa LEVEL] [TEST..]: every test, at every instruction-set level of this CPU or one, with 1 and 3
// threads. The last line counts; the exit status is 1 if anything failed.
#include "check.h"
#include "ttskernels/isa.h"
#include "ttskernels/threads.h"

namespace ttsk::testing {
namespace {

struct Entry {
  const char* name;
  Test test;
};
std::vector<Entry>& Tests() {
  static std::vector<Entry> tests;
  return tests;
}

// IEEE binary16 of a double, to nearest even.
uint16_t HalfBits(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7e00;
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520.0) return sign | 0x7c00;
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const double steps = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // 1024 .. 2048, less below 2^-14
  return sign | static_cast<uint16_t>(static_cast<int>(steps) + (exponent + 14) * 1024);
}
double HalfValue(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double magnitude = exponent == 31 ? (mantissa != 0 ? kNan : HUGE_VAL)
                           : exponent > 0 ? std::ldexp(1024 + mantissa, exponent - 25)
                                          : std::ldexp(mantissa, -24);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

}  // namespace

Registered::Registered(const char* name, Test test) { Tests().push_back({name, test}); }

Array::Array(DType type, int64_t count) : type_(type), count_(count), bytes_(count * SizeOf(type) + 128, 0xff) {
  shift_ = static_cast<int64_t>((64 - reinterpret_cast<uintptr_t>(bytes_.data()) % 64) % 64);
}

Array Array::Normal(DType type, int64_t count, Random& random, double scale) {
  Array result(type, count);
  for (int64_t i = 0; i < count; ++i) result.Set(i, scale * random.Normal());
  return result;
}

double Array::Get(int64_t i) const {
  if (type_ == DType::kFloat32) return static_cast<const float*>(data())[i];
  const uint16_t bits = static_cast<const uint16_t*>(data())[i];
  if (type_ == DType::kFloat16) return HalfValue(bits);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

void Array::Set(int64_t i, double value) {
  if (type_ == DType::kFloat32) {
    static_cast<float*>(data())[i] = static_cast<float>(value);
    return;
  }
  uint16_t bits = HalfBits(value);
  if (type_ == DType::kBFloat16) {
    const float rounded = static_cast<float>(value);
    uint32_t wide;
    std::memcpy(&wide, &rounded, 4);
    bits = static_cast<uint16_t>(std::isnan(value) ? 0x7fc0 : (wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
  static_cast<uint16_t*>(data())[i] = bits;
}

int Run(int argc, char** argv) {
  const char* level = nullptr;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--isa") == 0 && i + 1 < argc) level = argv[++i];
    else names.push_back(argv[i]);
  }
  int64_t passed = 0, failed = 0;
  for (int isa = 0; isa < kNumIsas; ++isa) {
    const char* name = IsaName(static_cast<Isa>(isa));
    if (level != nullptr && std::strcmp(level, name) != 0) continue;
    if (!SetIsa(static_cast<Isa>(isa))) continue;
    for (const Entry& entry : Tests()) {
      bool wanted = names.empty();
      for (const std::string& given : names) wanted |= given == entry.name;
      if (!wanted) continue;
      Checks check;
      for (const int threads : {1, 3}) {
        SetNumThreads(threads);
        Random random(1 + static_cast<uint64_t>(entry.name[0]));
        entry.test(check, random);
      }
      const bool good = check.failures == 0 && check.values > 0;
      ++(good ? passed : failed);
      std::printf("%-12s %-16s %9lld values, %lld wrong\n", name, entry.name, static_cast<long long>(check.values),
                  static_cast<long long>(check.failures));
      std::fflush(stdout);
    }
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed), static_cast<long long>(failed));
  return failed > 0 || passed == 0;
}

}  // namespace ttsk::testing

int main(int argc, char** argv) { return ttsk::testing::Run(argc, argv); }
