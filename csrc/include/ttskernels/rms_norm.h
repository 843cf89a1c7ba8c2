// y[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, float32 inside. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/isa.h"

namespace ttsk {

// x: [rows, dim] of `x_dtype`, which is `dtype` or float32; y: [rows, dim] of `dtype`; rows `*_stride` elements apart;
// y may alias x of the same dtype. weight: [dim] of `dtype`.
// Reads 2 * dim, writes dim values a row; on all threads for many rows; no allocation.
struct RmsNormParams {
  const void* x;
  const void* weight;
  void* y;
  int64_t rows, dim, x_stride, y_stride;
  float eps;
  DType x_dtype, dtype;
};

TTSK_DECLARE_PER_ISA(void RmsNorm(const RmsNormParams& p);)

}  // namespace ttsk
