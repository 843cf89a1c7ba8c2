#include "ttskernels/rope_append.h"

<<<<<<< HEAD
#include <cmath>

=======
>>>>>>> attn
#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

<<<<<<< HEAD
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
=======
constexpr int64_t kMaxDim = 1024;

template <typename T> struct Pack { static constexpr int kFactor = 1; };
template <> struct Pack<Bf16> { static constexpr int kFactor = 2; };

// Loops over whole vectors, then one of the `n` lanes left: f(index, lanes).
template <typename F>
void ForLanes(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, kLanes);
  if (i < count) f(i, static_cast<int>(count - i));
}
template <typename T>
Vec LoadN(const T* p, int n) { return n == kLanes ? LoadAs(p) : LoadTail(p, n); }
template <typename T>
void StoreN(T* p, Vec v, int n) {
  if (n == kLanes) StoreAs(p, v);
  else StoreTail(p, v, n);
}

void LoadNorm(const void* weight, DType dtype, int64_t dim, float* out) {
  if (weight == nullptr) return;
  ForLanes(dim, [&](int64_t i, int n) {
    if (dtype == DType::kFloat32) StoreN(out + i, LoadN(static_cast<const float*>(weight) + i, n), n);
    else if (dtype == DType::kFloat16) StoreN(out + i, LoadN(static_cast<const Fp16*>(weight) + i, n), n);
    else StoreN(out + i, LoadN(static_cast<const Bf16*>(weight) + i, n), n);
  });
}

// One head: x (float32 in `head`) normed by `norm` (or not) and rotated, in place.
void TurnHead(float* head, int64_t dim, const float* norm, float eps, const float* cos_sin, int64_t pairs) {
  if (norm != nullptr) {
    Vec sum = Zero();
    ForLanes(dim, [&](int64_t i, int n) {
      const Vec x = LoadN(head + i, n);
      sum = Fma(x, x, sum);
    });
    const Vec scale = Broadcast(1.0f / __builtin_sqrtf(ReduceAdd(sum) / static_cast<float>(dim) + eps));
    ForLanes(dim, [&](int64_t i, int n) {
      StoreN(head + i, Mul(Mul(LoadN(head + i, n), scale), LoadN(norm + i, n)), n);
    });
  }
  ForLanes(pairs, [&](int64_t i, int n) {
    const Vec a = LoadN(head + i, n), b = LoadN(head + pairs + i, n);
    const Vec c = LoadN(cos_sin + i, n), s = LoadN(cos_sin + pairs + i, n);
    StoreN(head + i, Sub(Mul(a, c), Mul(b, s)), n);
    StoreN(head + pairs + i, Add(Mul(b, c), Mul(a, s)), n);
  });
}

template <typename In>
void LoadHead(const In* from, int64_t dim, float* head) {
  ForLanes(dim, [&](int64_t i, int n) { StoreN(head + i, LoadN(from + i, n), n); });
}
template <typename T>
void StoreHead(const float* head, int64_t dim, T* to) {
  ForLanes(dim, [&](int64_t i, int n) { StoreN(to + i, LoadN(head + i, n), n); });
}

template <typename T>
struct Pages {
  static constexpr int kF = Pack<T>::kFactor, kPage = 16;
  const RopeAppendParams& p;

  void PutK(int64_t page, int64_t slot, int64_t head, const float* values) const {
    T* base = static_cast<T*>(p.k_pages);
    if (!p.packed) {
      return StoreHead(values, p.head_dim, base + page * p.k_strides.page + slot * p.k_strides.token + head * p.k_strides.head);
    }
    T row[kMaxDim];
    StoreHead(values, p.head_dim, row);
    T* to = base + (page * p.kv_heads + head) * p.head_dim * kPage + slot * kF;
    for (int64_t i = 0; i < p.head_dim; i += kF) std::memcpy(to + i * kPage, row + i, sizeof(T) * kF);
  }
  void PutV(int64_t page, int64_t slot, int64_t head, const float* values) const {
    T* base = static_cast<T*>(p.v_pages);
    if (!p.packed) {
      return StoreHead(values, p.v_dim, base + page * p.v_strides.page + slot * p.v_strides.token + head * p.v_strides.head);
    }
    T row[kMaxDim];
    StoreHead(values, p.v_dim, row);
    T* to = base + (page * p.kv_heads + head) * p.v_dim * kPage + slot / kF * kF * p.v_dim + slot % kF;
    for (int64_t i = 0; i < p.v_dim; ++i) to[i * kF] = row[i];
  }
};

template <typename In, typename T>
void AppendRows(const RopeAppendParams& p) {
  float q_norm[kMaxDim], k_norm[kMaxDim];
  LoadNorm(p.q_norm, p.norm_dtype, p.head_dim, q_norm);
  LoadNorm(p.k_norm, p.norm_dtype, p.head_dim, k_norm);
  const Pages<T> pages{p};
#pragma omp parallel for num_threads(NumThreads()) if (p.rows * (p.q_heads + p.kv_heads) * p.head_dim > 32768)
  for (int64_t r = 0; r < p.rows; ++r) {
    float own[kMaxDim], head[kMaxDim];
    const float* table = own;
    if (p.cos_sin != nullptr) table = p.cos_sin + r * 2 * p.pairs;
    else RopeTable(p.positions + r, 1, p.inv_freq, p.pairs, p.rope_scale, own);
    const In* q = static_cast<const In*>(p.q_in) + r * p.q_in_stride;
    T* q_out = static_cast<T*>(p.q_out) + r * p.q_out_stride;
    for (int64_t h = 0; h < p.q_heads; ++h) {
      LoadHead(q + h * p.head_dim, p.head_dim, head);
      TurnHead(head, p.head_dim, p.q_norm != nullptr ? q_norm : nullptr, p.eps, table, p.pairs);
      StoreHead(head, p.head_dim, q_out + h * p.head_dim);
    }
    if (p.slots[r] < 0) continue;
    const int64_t page = p.slots[r] / p.page_size, slot = p.slots[r] % p.page_size;
    const In* k = static_cast<const In*>(p.k_in) + r * p.k_in_stride;
    const In* v = static_cast<const In*>(p.v_in) + r * p.v_in_stride;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      LoadHead(k + h * p.head_dim, p.head_dim, head);
      TurnHead(head, p.head_dim, p.k_norm != nullptr ? k_norm : nullptr, p.eps, table, p.pairs);
      pages.PutK(page, slot, h, head);
      LoadHead(v + h * p.v_dim, p.v_dim, head);
      pages.PutV(page, slot, h, head);
    }
  }
}

template <typename T>
void Append(const RopeAppendParams& p) {
  if (p.in_dtype == DType::kFloat32) AppendRows<float, T>(p);
  else AppendRows<T, T>(p);
>>>>>>> attn
}

}  // namespace

void RopeAppend(const RopeAppendParams& p) {
<<<<<<< HEAD
  const bool wide = p.in_dtype == DType::kFloat32;
  if (p.dtype == DType::kFloat32) return Rows<float, float>(p);
  if (p.dtype == DType::kFloat16) return wide ? Rows<float, Fp16>(p) : Rows<Fp16, Fp16>(p);
  wide ? Rows<float, Bf16>(p) : Rows<Bf16, Bf16>(p);
=======
  if (p.dtype == DType::kFloat32) return Append<float>(p);
  if (p.dtype == DType::kFloat16) return Append<Fp16>(p);
  Append<Bf16>(p);
>>>>>>> attn
}

}  // namespace ttsk::TTSK_ISA
