// Torch (stable ABI) helpers of the bindings: dtype mapping and checks. Kernels never include this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "ttskernels/dtype.h"

namespace ttsk {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline DType DTypeOf(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "dtype must be float32, float16 or bfloat16, got scalar type ", static_cast<int>(t.scalar_type()));
}

template <typename T>
T* Data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

}  // namespace ttsk
