#include "ttskernels/isa.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ttsk {
namespace {

constexpr const char* kNames[kNumIsas] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "neon", "neon_bf16"};

#if defined(__x86_64__)
// clang 14 knows no names of these.
bool HasF16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
bool HasAvx512Bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & bit_AVX512BF16) != 0;
}
#elif defined(__aarch64__)
// Products of bf16 pairs and of bytes.
bool HasBf16AndI8mm() {
#if defined(__linux__)
  constexpr unsigned long kBoth = HWCAP2_BF16 | HWCAP2_I8MM;
  return (getauxval(AT_HWCAP2) & kBoth) == kBoth;
#elif defined(__APPLE__)
  constexpr const char* kBoth[] = {"hw.optional.arm.FEAT_BF16", "hw.optional.arm.FEAT_I8MM"};
  for (const char* feature : kBoth) {
    int has = 0;
    size_t size = sizeof(has);
    if (sysctlbyname(feature, &has, &size, nullptr, 0) != 0 || has == 0) return false;
  }
  return true;
#else
  return false;
#endif
}
#endif

Isa BestForThisCpu() {
#if defined(__x86_64__)
  // AMD Zen 4: vdpbf16ps has twice the flop rate of fp32 FMA. Intel (Sapphire Rapids): half of it.
  if (__builtin_cpu_is("amd") && CpuSupports(Isa::kAvx512Bf16)) return Isa::kAvx512Bf16;
  if (CpuSupports(Isa::kAvx512Vnni)) return Isa::kAvx512Vnni;
  if (CpuSupports(Isa::kAvx512)) return Isa::kAvx512;
  if (CpuSupports(Isa::kAvx2)) return Isa::kAvx2;
#endif
  if (CpuSupports(Isa::kNeonBf16)) return Isa::kNeonBf16;
  return CpuSupports(Isa::kNeon) ? Isa::kNeon : Isa::kPortable;
}

Isa FromEnvironment() {
  const char* wanted = std::getenv("TTSK_CPU_ISA");
  if (wanted == nullptr || *wanted == 0 || std::strcmp(wanted, "auto") == 0) return BestForThisCpu();
  for (int i = 0; i < kNumIsas; ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0 && CpuSupports(static_cast<Isa>(i))) return static_cast<Isa>(i);
  }
  const Isa best = BestForThisCpu();
  std::fprintf(stderr,
               "ttskernels: TTSK_CPU_ISA=%s is not one of portable, avx2, avx512, avx512_vnni, avx512_bf16, neon, "
               "neon_bf16 that this CPU supports; using %s\n",
               wanted, IsaName(best));
  return best;
}

std::atomic<int>& Active() {
  static std::atomic<int> active{static_cast<int>(FromEnvironment())};
  return active;
}

}  // namespace

bool CpuSupports(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && HasF16c();
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == Isa::kAvx2) return avx2;
  if (isa == Isa::kAvx512) return avx512;
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (isa == Isa::kAvx512Vnni) return vnni;
  if (isa == Isa::kAvx512Bf16) return vnni && HasAvx512Bf16();
#elif defined(__aarch64__)
  if (isa == Isa::kNeon) return true;  // part of the architecture
  if (isa == Isa::kNeonBf16) return HasBf16AndI8mm();
#endif
  return isa == Isa::kPortable;
}

const char* IsaName(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa ActiveIsa() { return static_cast<Isa>(Active().load(std::memory_order_relaxed)); }

bool SetIsa(Isa isa) {
  if (!CpuSupports(isa)) return false;
  Active().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

int64_t L1CacheBytes() {
  static const int64_t bytes = []() -> int64_t {
    const char* kb = std::getenv("TTSK_L1_KB");
    if (kb != nullptr && std::atoll(kb) > 0) return std::atoll(kb) * 1024;
#if defined(_SC_LEVEL1_DCACHE_SIZE)
    return sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
    return 0;
#endif
  }();
  return bytes;
}

}  // namespace ttsk

extern "C" {
__attribute__((visibility("default"))) const char* ttsk_isa_name() { return ttsk::IsaName(ttsk::ActiveIsa()); }
// 1 if this CPU has `level`.
__attribute__((visibility("default"))) int ttsk_isa_supported(int level) {
  return level >= 0 && level < ttsk::kNumIsas && ttsk::CpuSupports(static_cast<ttsk::Isa>(level));
}
// 1 if `level` (in order of Isa) is now in use, 0 if this CPU lacks it.
__attribute__((visibility("default"))) int ttsk_set_isa(int level) {
  return level >= 0 && level < ttsk::kNumIsas && ttsk::SetIsa(static_cast<ttsk::Isa>(level));
}
}
