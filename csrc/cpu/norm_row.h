// The final norm of one gathered row, for the kernels that read hidden states. Included by kernels/step_score.cpp and
// kernels/token_logprob.cpp.
#pragma once

#include <math.h>

#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

// Widens one row to float32 and applies the norm. False if a value is not finite.
template <typename T>
bool NormRow(const T* x, const float* norm_weight, float eps, int64_t dim, float* y) {
  const int64_t body = dim / kLanes * kLanes;
  const int tail = static_cast<int>(dim - body);
  Vec sum = Zero(), bad = Zero();  // bad: 0 * x summed, NaN if some x is infinite or NaN
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Vec v = i < body ? LoadAs(x + i) : LoadTail(x + i, tail);
    sum = Fma(v, v, sum);
    bad = Fma(v, Zero(), bad);
    i < body ? StoreAs(y + i, v) : StoreTail(y + i, v, tail);
  }
  if (ReduceAdd(bad) != 0.0f) return false;
  if (norm_weight == nullptr) return true;
  const Vec scale = Broadcast(1.0f / sqrtf(ReduceAdd(sum) / static_cast<float>(dim) + eps));
  for (int64_t i = 0; i < dim; i += kLanes) {
    if (i < body) {
      StoreAs(y + i, Mul(Mul(LoadAs(y + i), scale), LoadAs(norm_weight + i)));
    } else {
      StoreTail(y + i, Mul(Mul(LoadTail(y + i, tail), scale), LoadTail(norm_weight + i, tail)), tail);
    }
  }
  return true;
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
