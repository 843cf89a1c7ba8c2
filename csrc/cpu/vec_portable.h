// Portable form of Vec: plain loops over sixteen floats. See vec.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bits.h"

namespace ttsk::TTSK_ISA {

struct Vec { float v[16]; };

#define TTSK_LANES(expr)                            \
  Vec r;                                            \
  for (int i = 0; i < 16; ++i) r.v[i] = (expr);     \
  return r;

inline Vec Load(const float* p) { TTSK_LANES(p[i]) }
inline void Store(float* p, Vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline Vec Broadcast(float x) { TTSK_LANES(x) }
inline Vec Zero() { return Broadcast(0.0f); }
inline Vec Add(Vec a, Vec b) { TTSK_LANES(a.v[i] + b.v[i]) }
inline Vec Sub(Vec a, Vec b) { TTSK_LANES(a.v[i] - b.v[i]) }
inline Vec Mul(Vec a, Vec b) { TTSK_LANES(a.v[i] * b.v[i]) }
inline Vec Div(Vec a, Vec b) { TTSK_LANES(a.v[i] / b.v[i]) }
inline Vec Max(Vec a, Vec b) { TTSK_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
inline Vec Fma(Vec a, Vec b, Vec c) { TTSK_LANES(a.v[i] * b.v[i] + c.v[i]) }
inline Vec RoundNearest(Vec a) { TTSK_LANES(std::nearbyint(a.v[i])) }
// n within +-250, beyond which every result is 0 or infinite, as at the vector levels.
inline int Exponent(float n) { return n > -250.0f ? n < 250.0f ? static_cast<int>(n) : 250 : -250; }
inline Vec ScaleByPow2(Vec a, Vec n) { TTSK_LANES(std::ldexp(a.v[i], Exponent(n.v[i]))) }
inline Vec SelectFirst(int n, Vec a, Vec b) { TTSK_LANES(i < n ? a.v[i] : b.v[i]) }
inline Vec SelectLess(Vec a, Vec b, Vec x, Vec y) { TTSK_LANES(a.v[i] < b.v[i] ? x.v[i] : y.v[i]) }
inline bool AnyGreater(Vec a, Vec b) {
  bool any = false;
  for (int i = 0; i < 16; ++i) any |= a.v[i] > b.v[i];
  return any;
}
// Pairwise halves, the order of the vector levels.
inline float ReduceMax(Vec a) {
  for (int w = 8; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] = a.v[i] > a.v[i + w] ? a.v[i] : a.v[i + w];
  return a.v[0];
}
inline float First(Vec a) { return a.v[0]; }
inline float ReduceAdd(Vec a) {
  for (int w = 8; w > 0; w /= 2)
    for (int i = 0; i < w; ++i) a.v[i] += a.v[i + w];
  return a.v[0];
}

inline uint16_t FloatToHalf(float f) {
  const uint32_t bits = FloatToBits(f), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000u) return sign | 0x7e00 | static_cast<uint16_t>((magnitude >> 13) & 0x3ff);
  if (magnitude >= 0x477ff000u) return sign | 0x7c00;
  if (magnitude < 0x38800000u) {  // result is denormal: let float addition round at 2^-24
    const float shifted = BitsToFloat(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(FloatToBits(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}
inline Vec LoadBf16(const uint16_t* p) { TTSK_LANES(BitsToFloat(static_cast<uint32_t>(p[i]) << 16)) }
inline Vec LoadFp16(const uint16_t* p) { TTSK_LANES(HalfToFloat(p[i])) }
inline void StoreBf16(uint16_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = FloatToBits(a.v[i]);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    p[i] = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
  }
}
inline void StoreFp16(uint16_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = FloatToHalf(a.v[i]);
}

struct Pairs { uint32_t v[16]; };
inline Pairs LoadPairs(const void* p) {
  Pairs r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline Vec Even(Pairs a) { TTSK_LANES(BitsToFloat(a.v[i] << 16)) }
inline Vec Odd(Pairs a) { TTSK_LANES(BitsToFloat(a.v[i] & 0xffff0000u)) }

struct Ints { int32_t v[16]; };
struct Words { int16_t v[32]; };
inline Ints ZeroInts() { return {}; }
inline Ints BroadcastInts(int32_t x) {
  Ints r;
  for (int32_t& v : r.v) v = x;
  return r;
}
inline Vec ToFloat(Ints a) { TTSK_LANES(static_cast<float>(a.v[i])) }
inline Words LoadWords(const int16_t* p) {
  Words r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline Words BroadcastWords(const int16_t* pair) {
  Words r;
  for (int i = 0; i < 32; ++i) r.v[i] = pair[i % 2];
  return r;
}
inline Ints DotWords(Ints acc, Words a, Words b) {
  for (int i = 0; i < 16; ++i) {  // unsigned: unused slots may hold anything, and what overflows is not read
    const uint32_t even = static_cast<uint32_t>(a.v[2 * i] * b.v[2 * i]);
    const uint32_t odd = static_cast<uint32_t>(a.v[2 * i + 1] * b.v[2 * i + 1]);
    acc.v[i] = static_cast<int32_t>(static_cast<uint32_t>(acc.v[i]) + (even + odd));
  }
  return acc;
}
inline void StoreRounded(int16_t* p, Vec a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int16_t>(std::nearbyint(a.v[i]));
}
inline void WidenBytes(const int8_t* from, int16_t* to) {
  for (int i = 0; i < 32; ++i) to[i] = from[i];
}
inline Words LoadBytes(const int8_t* p) {
  Words r;
  WidenBytes(p, r.v);
  return r;
}
inline Ints MaxMagnitude(Ints most, Vec a) {
  for (int i = 0; i < 16; ++i) {
    const int32_t bits = static_cast<int32_t>(FloatToBits(a.v[i]) & 0x7fffffffu);
    most.v[i] = bits > most.v[i] ? bits : most.v[i];
  }
  return most;
}
inline int32_t ReduceMax(Ints a) {
  int32_t most = a.v[0];
  for (const int32_t v : a.v) most = v > most ? v : most;
  return most;
}
inline Words EvenBytes(const uint8_t* p) {
  Words r;
  for (int i = 0; i < 32; ++i) r.v[i] = p[2 * i];
  return r;
}
inline Words OddBytes(const uint8_t* p) { return EvenBytes(p + 1); }
template <int kStep>
inline Vec Butterfly(Vec a) { TTSK_LANES(i & kStep ? a.v[i - kStep] - a.v[i] : a.v[i] + a.v[i + kStep]) }
#undef TTSK_LANES

}  // namespace ttsk::TTSK_ISA
