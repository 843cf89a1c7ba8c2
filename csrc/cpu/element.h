// One element of a weight as float, for packing and embedding; kernels read vectors (vec.h).
#pragma once

#include <cstdint>
#include <cstring>

#include "ttskernels/dtype.h"

namespace ttsk {

inline float ElementAsFloat(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::kFloat16) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

}  // namespace ttsk
