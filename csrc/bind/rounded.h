// Checks of int8 weights that are rounded already: values and scales, see LinearPackRounded.
#pragma once

#include "tensor.h"
#include "ttskernels/linear.h"

namespace ttsk {

struct RoundedPointers {
  const int8_t* values;
  const float* scales;
};

inline RoundedPointers CheckRounded(const Tensor& values, const Tensor& scales, int64_t n, int64_t k) {
  const FixedGroups groups(LinearForm::kInt8, k);
  STD_TORCH_CHECK(values.scalar_type() == ScalarType::Char && values.is_contiguous() && values.dim() == 2 &&
                      values.size(0) == n && values.size(1) == groups.count * groups.size(),
                  "rounded values must be contiguous int8 [", n, ", ", groups.count * groups.size(), "]");
  STD_TORCH_CHECK(scales.scalar_type() == ScalarType::Float && scales.is_contiguous() && scales.dim() == 2 &&
                      scales.size(0) == n && scales.size(1) == groups.count,
                  "scales of rounded values must be contiguous float32 [", n, ", ", groups.count, "]");
  return {static_cast<const int8_t*>(values.data_ptr()), static_cast<const float*>(scales.data_ptr())};
}

}  // namespace ttsk
