#include "ttskernels/rms_norm.h"

#include <cmath>

#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

template <typename X, typename T>
void NormRow(const X* x, const T* weight, T* y, int64_t dim, float eps) {
  const int64_t body = dim / kLanes * kLanes;
  const int tail = static_cast<int>(dim - body);
  Vec sum = Zero();
  for (int64_t i = 0; i < body; i += kLanes) {
    const Vec v = LoadAs(x + i);
    sum = Fma(v, v, sum);
  }
  if (tail > 0) {
    const Vec v = LoadTail(x + body, tail);
    sum = Fma(v, v, sum);
  }
  const Vec scale = Broadcast(1.0f / std::sqrt(ReduceAdd(sum) / static_cast<float>(dim) + eps));
  for (int64_t i = 0; i < body; i += kLanes) StoreAs(y + i, Mul(Mul(LoadAs(x + i), scale), LoadAs(weight + i)));
  if (tail > 0) StoreTail(y + body, Mul(Mul(LoadTail(x + body, tail), scale), LoadTail(weight + body, tail)), tail);
}

template <typename X, typename T>
void NormRows(const RmsNormParams& p) {
  ForEach(p.rows, p.rows * p.dim > 16384, [&](int64_t r) {
    NormRow(static_cast<const X*>(p.x) + r * p.x_stride, static_cast<const T*>(p.weight),
            static_cast<T*>(p.y) + r * p.y_stride, p.dim, p.eps);
  });
}

}  // namespace

void RmsNorm(const RmsNormParams& p) {
  const bool wide = p.x_dtype == DType::kFloat32;
  if (p.dtype == DType::kFloat32) return NormRows<float, float>(p);
  if (p.dtype == DType::kFloat16) return wide ? NormRows<float, Fp16>(p) : NormRows<Fp16, Fp16>(p);
  wide ? NormRows<float, Bf16>(p) : NormRows<Bf16, Bf16>(p);
}

}  // namespace ttsk::TTSK_ISA
