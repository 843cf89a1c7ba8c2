// A float's bits and back. Compiled once per instruction-set level, like vec.h.
#pragma once

#include <cstdint>
#include <cstring>

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

}  // namespace ttsk::TTSK_ISA
