// Vec: sixteen float lanes at every instruction-set level, so a kernel is written once and the order of every
// reduction is the same at each level. Included by csrc/cpu/kernels/*.cpp only, which are compiled once per level
// with TTSK_ISA set; those files use no std:: templates (an AVX-512 copy of one could be linked into portable code).
// TTSK_DOT_PAIRS: the level has products of bf16 pairs (DotPairs); TTSK_DOT_QUADS: of four bytes (Quads).
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#if defined(__AVX512F__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#elif defined(TTSK_NEON)
#include "vec_neon.h"
#else
#include "vec_portable.h"
#endif

namespace ttsk::TTSK_ISA {

constexpr int kLanes = 16;

// Fetches a line from memory, into the second-level cache only: a core has few places for lines that its first level waits for
// (24 on Zen 4), which cap what it reads of scattered pages at half of a stream.
inline void FetchFar(const void* p) { __builtin_prefetch(p, 0, 2); }

inline float Bf16ToFloat(uint16_t v) { return BitsToFloat(static_cast<uint32_t>(v) << 16); }
// Round to nearest even; NaN stays NaN.
inline uint16_t FloatToBf16(float f) {
  const uint32_t bits = FloatToBits(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// 2^x, relative error < 2e-7 for finite results; 2^0 is exactly 1, 2^-inf is exactly 0 (both keep merges exact). Below
// 2^-125 the result is 0: a denormal one takes the processor a detour of 100 ns, once for each masked vector of a tile.
inline Vec Exp2(Vec x) {
  const Vec least = Broadcast(-125.0f);
#if defined(__AVX512F__)
  const Vec y = x;  // lanes below are cleared in the end, whatever they hold
#else
  const Vec y = Max(least, x);  // this order lets NaN through
#endif
  const Vec n = RoundNearest(y);
  const Vec r = Sub(y, n);  // [-0.5, 0.5]
  Vec p = Broadcast(1.54353139e-4f);
  p = Fma(p, r, Broadcast(1.33335581e-3f));
  p = Fma(p, r, Broadcast(9.61812911e-3f));
  p = Fma(p, r, Broadcast(5.55041087e-2f));
  p = Fma(p, r, Broadcast(2.40226507e-1f));
  p = Fma(p, r, Broadcast(6.93147182e-1f));
  p = Fma(p, r, Broadcast(1.0f));
#if defined(__AVX512F__)
  return ScaleUnlessLess(x, least, p, n);
#else
  return SelectLess(x, least, Zero(), ScaleByPow2(p, n));
#endif
}
#if defined(TTSK_DOT_PAIRS) && !defined(__AVX512F__)
// e = 2^(s - m); sum += e, `to` = bf16 of e.
inline void Exp2Bf16(const float* s, const float* m, void* to, Vec* sum) {
  const Vec e = Exp2(Sub(Load(s), Broadcast(*m)));
  StoreBf16(static_cast<uint16_t*>(to), e);
  *sum = Add(*sum, e);
}
#endif
constexpr float kLog2e = 1.44269504088896341f;
inline Vec Exp(Vec x) { return Exp2(Mul(x, Broadcast(kLog2e))); }

// Typed loads and stores: bf16 is `Bf16`, fp16 is `Fp16`, 16 bits each; float is itself.
struct Bf16 { uint16_t bits; };
struct Fp16 { uint16_t bits; };
inline Vec LoadAs(const float* p) { return Load(p); }
inline Vec LoadAs(const Bf16* p) { return LoadBf16(reinterpret_cast<const uint16_t*>(p)); }
inline Vec LoadAs(const Fp16* p) { return LoadFp16(reinterpret_cast<const uint16_t*>(p)); }
inline void StoreAs(float* p, Vec v) { Store(p, v); }
inline void StoreAs(Bf16* p, Vec v) { StoreBf16(reinterpret_cast<uint16_t*>(p), v); }
inline void StoreAs(Fp16* p, Vec v) { StoreFp16(reinterpret_cast<uint16_t*>(p), v); }
// First n (1..15) lanes; missing lanes read as 0. For row tails only, not for inner loops.
template <typename T>
inline Vec LoadTail(const T* p, int n) {
  T lanes[kLanes] = {};
  std::memcpy(lanes, p, sizeof(T) * n);
  return LoadAs(lanes);
}
template <typename T>
inline void StoreTail(T* p, Vec v, int n) {
  T lanes[kLanes];
  StoreAs(lanes, v);
  std::memcpy(p, lanes, sizeof(T) * n);
}

// StoreAs past the caches, for what is read only when they have lost it: no line is fetched to be overwritten. p at a multiple
// of the vector's bytes; other threads see it after a StreamFence.
template <typename T>
inline void StreamAs(T* p, Vec v) {
#if defined(__AVX2__)
  alignas(32) T lanes[kLanes];
  StoreAs(lanes, v);
  const auto* from = reinterpret_cast<const __m256i*>(lanes);
  for (size_t i = 0; i < sizeof(lanes) / 32; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + i, _mm256_load_si256(from + i));
  }
#else
  StoreAs(p, v);
#endif
}
inline void StreamFence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace ttsk::TTSK_ISA
