// A float's bits and back, and a half's value. Compiled once per instruction-set level, like vec.h; elsewhere TTSK_ISA is base.
#pragma once

#include <cstdint>
#include <cstring>

#if !defined(TTSK_ISA)
#define TTSK_ISA base
#endif

namespace ttsk::TTSK_ISA {

inline float BitsToFloat(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t FloatToBits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
inline float HalfToFloat(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
  if (exponent == 31) return BitsToFloat(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return BitsToFloat(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign != 0 ? -value : value;
}

}  // namespace ttsk::TTSK_ISA
