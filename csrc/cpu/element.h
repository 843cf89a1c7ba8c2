// One element of a weight as float, for packing and embedding; kernels read vectors (vec.h).
#pragma once

#include <cstdint>

#include "bits.h"
#include "ttskernels/dtype.h"

namespace ttsk {

inline float ElementAsFloat(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::kFloat16) return TTSK_ISA::HalfToFloat(bits);
  return TTSK_ISA::BitsToFloat(static_cast<uint32_t>(bits) << 16);
}

}  // namespace ttsk
