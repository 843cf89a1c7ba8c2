// Vectors of floats as int16 with one scale. Included by kernels/*.cpp only.
#pragma once

#include "ttskernels/fixed_point.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

// A value is `scale` times its integer, which is `up` times the value, rounded. up = 0: every integer is 0.
struct FixedScale {
  float scale, up;
};

// most: largest magnitudes, lane by lane.
inline FixedScale ScaleOf(Ints most, float most_value) {
  const float top = BitsToFloat(static_cast<uint32_t>(ReduceMax(most)));
  if (!(top < __builtin_inff())) return {__builtin_nanf(""), 0.0f};
  if (top < kLeastScaled) return {0.0f, 0.0f};
  return {top / most_value, most_value / top};
}

// values [n, up to a multiple of sixteen] of x; returns their scale.
template <typename T>
float FixVector(const T* x, int64_t n, float most_value, int16_t* values) {
  const int64_t body = n / kLanes * kLanes;
  const int tail = static_cast<int>(n - body);
  Ints most = ZeroInts();
  for (int64_t i = 0; i < body; i += kLanes) most = MaxMagnitude(most, LoadAs(x + i));
  if (tail > 0) most = MaxMagnitude(most, LoadTail(x + body, tail));
  const FixedScale fixed = ScaleOf(most, most_value);
  const auto fix = [&](Vec v) { return fixed.up > 0.0f ? Mul(v, Broadcast(fixed.up)) : Zero(); };
  for (int64_t i = 0; i < body; i += kLanes) StoreRounded(values + i, fix(LoadAs(x + i)));
  if (tail > 0) StoreRounded(values + body, fix(LoadTail(x + body, tail)));
  return fixed.scale;
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
