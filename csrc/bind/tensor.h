// Torch (stable ABI) helpers of the bindings: dtype mapping and checks. Kernels never include this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "ttskernels/dtype.h"
#include "ttskernels/kv_form.h"

namespace ttsk {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline DType DTypeOf(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "dtype must be float32, float16 or bfloat16, got scalar type ", static_cast<int>(type));
}
inline DType DTypeOf(const Tensor& t) { return DTypeOf(t.scalar_type()); }

// Of a pool by its element type: integers are fixed-point pages.
inline KvForm KvFormOf(const Tensor& pool) {
  if (pool.scalar_type() == ScalarType::Short) return KvForm::kInt16;
  return pool.scalar_type() == ScalarType::Char ? KvForm::kInt8 : KvForm::kFloat;
}

template <typename T>
T* Data(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// Whether a matrix has contiguous rows, and [rows, heads, dim] contiguous heads. The stride of a dimension of size 1, or of an
// empty tensor, means nothing: torch calls it contiguous whatever it is.
inline bool HasRows(const Tensor& t) { return t.dim() == 2 && (t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1); }
inline bool HasHeads(const Tensor& t) {
  return t.dim() == 3 && (t.numel() == 0 || (t.stride(2) == 1 && (t.size(1) == 1 || t.stride(1) == t.size(2))));
}

// Data of an optional float32 vector of `size` values; null if there is none.
inline const float* VectorOf(const std::optional<Tensor>& t, int64_t size, const char* name) {
  if (!t.has_value()) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == size && t->is_contiguous(), name,
                  " must be contiguous float32 [", size, "]");
  return static_cast<const float*>(t->data_ptr());
}

}  // namespace ttsk
