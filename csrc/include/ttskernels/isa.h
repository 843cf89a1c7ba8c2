// Instruction-set levels of the CPU kernels, chosen once at run time. Torch-free.
#pragma once

#include <cstdint>

namespace ttsk {

enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kNeon, kNeonBf16 };
constexpr int kNumIsas = 7;

// The level in use: TTSK_CPU_ISA if set and supported by this CPU, else the best one measured for its vendor
// (see docs/decisions.md: on Intel, vdpbf16ps has half the flop rate of fp32 FMA, so avx512 is chosen there).
// Thread-safe; reads the environment on the first call only.
Isa ActiveIsa();

// Forces a level for this process (tests); returns false, changing nothing, if the CPU lacks it.
bool SetIsa(Isa isa);
bool CpuSupports(Isa isa);
const char* IsaName(Isa isa);

// Size of a core's first-level data cache, or TTSK_L1_KB; 0 if the system does not tell. No result depends on it.
int64_t L1CacheBytes();

}  // namespace ttsk

// Picks KERNELS_<level>: `TTSK_SELECT(Linear)(args...)` calls ttsk::<level>::Linear(args...) of the active level.
#if defined(__x86_64__)
#define TTSK_SELECT(fn)                                                   \
  (::ttsk::ActiveIsa() == ::ttsk::Isa::kAvx512Bf16 ? ::ttsk::avx512_bf16::fn \
   : ::ttsk::ActiveIsa() == ::ttsk::Isa::kAvx512Vnni ? ::ttsk::avx512_vnni::fn \
   : ::ttsk::ActiveIsa() == ::ttsk::Isa::kAvx512   ? ::ttsk::avx512::fn      \
   : ::ttsk::ActiveIsa() == ::ttsk::Isa::kAvx2     ? ::ttsk::avx2::fn        \
                                                   : ::ttsk::portable::fn)
#define TTSK_DECLARE_PER_ISA(...)       \
  namespace portable { __VA_ARGS__ }    \
  namespace avx2 { __VA_ARGS__ }        \
  namespace avx512 { __VA_ARGS__ }      \
  namespace avx512_vnni { __VA_ARGS__ } \
  namespace avx512_bf16 { __VA_ARGS__ }
#elif defined(__aarch64__)
#define TTSK_SELECT(fn)                                                     \
  (::ttsk::ActiveIsa() == ::ttsk::Isa::kNeonBf16 ? ::ttsk::neon_bf16::fn    \
   : ::ttsk::ActiveIsa() == ::ttsk::Isa::kNeon   ? ::ttsk::neon::fn         \
                                                 : ::ttsk::portable::fn)
#define TTSK_DECLARE_PER_ISA(...)    \
  namespace portable { __VA_ARGS__ } \
  namespace neon { __VA_ARGS__ }     \
  namespace neon_bf16 { __VA_ARGS__ }
#else
#define TTSK_SELECT(fn) (::ttsk::portable::fn)
#define TTSK_DECLARE_PER_ISA(...) namespace portable { __VA_ARGS__ }
#endif
