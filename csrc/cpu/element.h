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
#if defined(__aarch64__)
    __fp16 half;  // gcc 12 has no _Float16 there
#else
    _Float16 half;
#endif
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

}  // namespace ttsk
