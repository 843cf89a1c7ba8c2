#include "ttskernels/rope_append.h"

#include <cmath>

#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

constexpr int64_t kMaxDim = 256, kPage = 16;

// Elements of one head as float; dim is a multiple of 16.
template <typename X>
void LoadHead(const X* x, int64_t dim, float* out) {
  for (int64_t i = 0; i < dim; i += kLanes) Store(out + i, LoadAs(x + i));
}
template <typename T>
void StoreHead(const float* x, int64_t dim, T* out) {
  for (int64_t i = 0; i < dim; i += kLanes) StoreAs(out + i, Load(x + i));
}

template <typename T>
void NormHead(float* x, const T* weight, int64_t dim, float eps) {
  Vec sum = Zero();
  for (int64_t i = 0; i < dim; i += kLanes) {
    const Vec v = Load(x + i);
    sum = Fma(v, v, sum);
  }
  const Vec scale = Broadcast(1.0f / std::sqrt(ReduceAdd(sum) / static_cast<float>(dim) + eps));
  for (int64_t i = 0; i < dim; i += kLanes) Store(x + i, Mul(Mul(Load(x + i), scale), LoadAs(weight + i)));
}

void RotateHead(float* x, const float* cos, const float* sin, int64_t pairs) {
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[i], b = x[i + pairs];
    x[i] = a * cos[i] - b * sin[i];
    x[i + pairs] = b * cos[i] + a * sin[i];
  }
}

// One token's K head into [dim / f, 16, f], its V head into [16 / f, dim, f].
void WriteK(const float* k, int64_t dim, int64_t slot, Bf16* page) {
  for (int64_t d = 0; d < dim; ++d) page[(d / 2 * kPage + slot) * 2 + d % 2].bits = FloatToBf16(k[d]);
}
void WriteV(const float* v, int64_t dim, int64_t slot, Bf16* page) {
  for (int64_t d = 0; d < dim; ++d) page[(slot / 2 * dim + d) * 2 + slot % 2].bits = FloatToBf16(v[d]);
}
template <typename T>
void WriteK(const float* k, int64_t dim, int64_t slot, T* page) {
  T narrow[kMaxDim];
  StoreHead(k, dim, narrow);
  for (int64_t d = 0; d < dim; ++d) page[d * kPage + slot] = narrow[d];
}
template <typename T>
void WriteV(const float* v, int64_t dim, int64_t slot, T* page) {
  StoreHead(v, dim, page + slot * dim);
}

template <typename X, typename T>
void Row(const RopeAppendParams& p, int64_t r) {
  const float* cos = p.cos + r * p.pairs;
  const float* sin = p.sin + r * p.pairs;
  float head[kMaxDim];
  for (int64_t h = 0; h < p.q_heads; ++h) {
    LoadHead(static_cast<const X*>(p.q) + r * p.q_stride + h * p.head_dim, p.head_dim, head);
    if (p.q_norm != nullptr) NormHead(head, static_cast<const T*>(p.q_norm), p.head_dim, p.eps);
    RotateHead(head, cos, sin, p.pairs);
    StoreHead(head, p.head_dim, static_cast<T*>(p.q_out) + r * p.q_out_stride + h * p.head_dim);
  }
  if (p.slots[r] < 0) return;
  const int64_t page = p.slots[r] / kPage, slot = p.slots[r] % kPage;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    LoadHead(static_cast<const X*>(p.k) + r * p.k_stride + h * p.head_dim, p.head_dim, head);
    if (p.k_norm != nullptr) NormHead(head, static_cast<const T*>(p.k_norm), p.head_dim, p.eps);
    RotateHead(head, cos, sin, p.pairs);
    WriteK(head, p.head_dim, slot, static_cast<T*>(p.k_pages) + (page * p.kv_heads + h) * p.head_dim * kPage);
    LoadHead(static_cast<const X*>(p.v) + r * p.v_stride + h * p.v_dim, p.v_dim, head);
    WriteV(head, p.v_dim, slot, static_cast<T*>(p.v_pages) + (page * p.kv_heads + h) * p.v_dim * kPage);
  }
}

template <typename X, typename T>
void Rows(const RopeAppendParams& p) {
#pragma omp parallel for num_threads(NumThreads()) if (p.rows > 4)
  for (int64_t r = 0; r < p.rows; ++r) Row<X, T>(p, r);
}

}  // namespace

void RopeAppend(const RopeAppendParams& p) {
  const bool wide = p.in_dtype == DType::kFloat32;
  if (p.dtype == DType::kFloat32) return Rows<float, float>(p);
  if (p.dtype == DType::kFloat16) return wide ? Rows<float, Fp16>(p) : Rows<Fp16, Fp16>(p);
  wide ? Rows<float, Bf16>(p) : Rows<Bf16, Bf16>(p);
}

}  // namespace ttsk::TTSK_ISA
