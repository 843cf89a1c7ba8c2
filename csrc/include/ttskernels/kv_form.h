// How KV pages keep their values. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/fixed_point.h"

namespace ttsk {

// kFloat: elements of the model's dtype. kInt16, kInt8: packed pages in fixed point, a scale for each token and head. A page
// is then one run a kv head: integers K [head_dim / 2][16][2], V [16 / 2][v_dim][2], and behind them 16 float32 scales, one a
// slot. A vector with a value that is not finite has scale NaN.
enum class KvForm : int { kFloat, kInt16, kInt8 };

inline int64_t IntegerBytes(KvForm form) { return form == KvForm::kInt16 ? 2 : 1; }
inline float MostOf(KvForm form) { return form == KvForm::kInt16 ? kMostWord : kMostByte; }
// Integers that a run of a page takes, the room of its scales included.
inline int64_t FixedRun(int64_t dim, KvForm form) { return 16 * dim + 16 * 4 / IntegerBytes(form); }

}  // namespace ttsk
