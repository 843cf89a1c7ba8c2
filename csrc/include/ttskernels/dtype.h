// Element types of tensors that kernels see. Torch-free.
#pragma once

#include <cstdint>

namespace ttsk {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

inline int64_t SizeOf(DType t) { return t == DType::kFloat32 ? 4 : 2; }
// Consecutive elements of the reduced dimension stored side by side in packed layouts (the bf16 dot-product pair).
inline int64_t PackFactor(DType t) { return t == DType::kBFloat16 ? 2 : 1; }

}  // namespace ttsk
