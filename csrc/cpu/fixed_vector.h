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

// most: largest magnitudes, lane by lane. zero: sums of x - x, which is 0 for finite numbers alone (Max drops a NaN on one
// side).
inline FixedScale ScaleOf(Vec most, Vec zero, float most_value) {
  const float top = ReduceMax(most), odd = ReduceAdd(zero);
  if (odd != 0.0f) return {odd, 0.0f};  // NaN
  if (top < kLeastScaled) return {0.0f, 0.0f};
  return {top / most_value, most_value / top};
}

// values [n, up to a multiple of sixteen] of x; returns their scale.
template <typename T>
float FixVector(const T* x, int64_t n, float most_value, int16_t* values) {
  const int64_t body = n / kLanes * kLanes;
  const int tail = static_cast<int>(n - body);
  Vec most = Zero(), zero = Zero();
  const auto look = [&](Vec v) {
    most = Max(Abs(v), most);
    zero = Add(zero, Sub(v, v));
  };
  for (int64_t i = 0; i < body; i += kLanes) look(LoadAs(x + i));
  if (tail > 0) look(LoadTail(x + body, tail));
  const FixedScale fixed = ScaleOf(most, zero, most_value);
  const auto fix = [&](Vec v) { return fixed.up > 0.0f ? Mul(v, Broadcast(fixed.up)) : Zero(); };
  for (int64_t i = 0; i < body; i += kLanes) StoreRounded(values + i, fix(LoadAs(x + i)));
  if (tail > 0) StoreRounded(values + body, fix(LoadTail(x + body, tail)));
  return fixed.scale;
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
