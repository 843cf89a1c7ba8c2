#include "ttskernels/rope_append.h"

#include "fixed_vector.h"
#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

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

// One head, from its place in q or k to `to`: normed by `norm` (or not) and rotated. In place is allowed.
template <typename In, typename T>
void TurnHead(const In* from, int64_t dim, const float* cos_sin, int64_t pairs, T* to) {
  ForLanes(pairs, [&](int64_t i, int n) {
    const Vec a = LoadN(from + i, n), b = LoadN(from + pairs + i, n);
    const Vec c = LoadN(cos_sin + i, n), s = LoadN(cos_sin + pairs + i, n);
    StoreN(to + i, Sub(Mul(a, c), Mul(b, s)), n);
    StoreN(to + pairs + i, Add(Mul(b, c), Mul(a, s)), n);
  });
  ForLanes(dim - 2 * pairs, [&](int64_t i, int n) { StoreN(to + 2 * pairs + i, LoadN(from + 2 * pairs + i, n), n); });
}
template <typename In, typename T>
void TurnHead(const In* from, int64_t dim, const float* norm, float eps, const float* cos_sin, int64_t pairs, T* to) {
  if (norm == nullptr) return TurnHead(from, dim, cos_sin, pairs, to);
  float head[kMaxDim];
  Vec sum = Zero();
  ForLanes(dim, [&](int64_t i, int n) {
    const Vec x = LoadN(from + i, n);
    sum = Fma(x, x, sum);
  });
  const Vec scale = Broadcast(1.0f / __builtin_sqrtf(ReduceAdd(sum) / static_cast<float>(dim) + eps));
  ForLanes(dim, [&](int64_t i, int n) {
    StoreN(head + i, Mul(Mul(LoadN(from + i, n), scale), LoadN(norm + i, n)), n);
  });
  TurnHead(head, dim, cos_sin, pairs, to);
}

template <typename In>
void LoadHead(const In* from, int64_t dim, float* head) {
  ForLanes(dim, [&](int64_t i, int n) { StoreN(head + i, LoadN(from + i, n), n); });
}
template <typename T>
void StoreHead(const float* head, int64_t dim, T* to) {
  ForLanes(dim, [&](int64_t i, int n) { StoreN(to + i, LoadN(head + i, n), n); });
}

// Writes token `slot` of a fixed-point run: integers kF apart as K or V pages have them, then the scale.
template <typename P>
void PutFixed(const float* values, int64_t dim, float most, bool keys, int64_t slot, P* run) {
  int16_t row[kMaxDim];
  const float scale = FixVector(values, dim, most, row);
  if (keys) {
    for (int64_t i = 0; i < dim; i += 2) {
      P* to = run + i * 16 + slot * 2;
      to[0] = static_cast<P>(row[i]), to[1] = static_cast<P>(row[i + 1]);
    }
  } else {
    for (int64_t i = 0; i < dim; ++i) run[(slot / 2 * dim + i) * 2 + slot % 2] = static_cast<P>(row[i]);
  }
  std::memcpy(run + 16 * dim + slot * (4 / sizeof(P)), &scale, sizeof(scale));
}

template <typename T>
struct Pages {
  static constexpr int kF = Pack<T>::kFactor, kPage = 16;
  const RopeAppendParams& p;

  void PutRun(void* pages, int64_t page, int64_t slot, int64_t head, const float* values, int64_t dim, bool keys) const {
    const int64_t at = (page * p.kv_heads + head) * FixedRun(dim, p.form);
    const float most = MostOf(p.form);
    if (p.form == KvForm::kInt16) PutFixed(values, dim, most, keys, slot, static_cast<int16_t*>(pages) + at);
    else PutFixed(values, dim, most, keys, slot, static_cast<int8_t*>(pages) + at);
  }

  static int64_t Offset(const KvStrides& s, int64_t page, int64_t slot, int64_t head) {
    return page * s.page + slot * s.token + head * s.head;
  }
  void PutK(int64_t page, int64_t slot, int64_t head, const float* values) const {
    if (p.form != KvForm::kFloat) return PutRun(p.k_pages, page, slot, head, values, p.head_dim, true);
    T* base = static_cast<T*>(p.k_pages);
    if (!p.packed) return StoreHead(values, p.head_dim, base + Offset(p.k_strides, page, slot, head));
    T row[kMaxDim];
    StoreHead(values, p.head_dim, row);
    T* to = base + (page * p.kv_heads + head) * p.head_dim * kPage + slot * kF;
    for (int64_t i = 0; i < p.head_dim; i += kF) std::memcpy(to + i * kPage, row + i, sizeof(T) * kF);
  }
  void PutV(int64_t page, int64_t slot, int64_t head, const float* values) const {
    if (p.form != KvForm::kFloat) return PutRun(p.v_pages, page, slot, head, values, p.v_dim, false);
    T* base = static_cast<T*>(p.v_pages);
    if (!p.packed) return StoreHead(values, p.v_dim, base + Offset(p.v_strides, page, slot, head));
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
  ForEach(p.rows, p.rows * (p.q_heads + p.kv_heads) * p.head_dim > 32768, [&](int64_t r) {
    float own[kMaxDim], head[kMaxDim];
    const float* table = own;
    if (p.cos_sin != nullptr) table = p.cos_sin + r * 2 * p.pairs;
    else RopeTable(p.positions + r, 1, p.inv_freq, p.pairs, p.rope_scale, own);
    const In* q = static_cast<const In*>(p.q_in) + r * p.q_in_stride;
    T* q_out = static_cast<T*>(p.q_out) + r * p.q_out_stride;
    const float* norm = p.q_norm != nullptr ? q_norm : nullptr;
    for (int64_t h = 0; h < p.q_heads; ++h) {
      TurnHead(q + h * p.head_dim, p.head_dim, norm, p.eps, table, p.pairs, q_out + h * p.head_dim);
    }
    if (p.slots[r] < 0) return;
    const int64_t page = p.slots[r] / p.page_size, slot = p.slots[r] % p.page_size;
    const In* k = static_cast<const In*>(p.k_in) + r * p.k_in_stride;
    const In* v = static_cast<const In*>(p.v_in) + r * p.v_in_stride;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      TurnHead(k + h * p.head_dim, p.head_dim, p.k_norm != nullptr ? k_norm : nullptr, p.eps, table, p.pairs, head);
      pages.PutK(page, slot, h, head);
      LoadHead(v + h * p.v_dim, p.v_dim, head);
      pages.PutV(page, slot, h, head);
    }
  });
}

template <typename T>
void Append(const RopeAppendParams& p) {
  if (p.in_dtype == DType::kFloat32) AppendRows<float, T>(p);
  else AppendRows<T, T>(p);
}

}  // namespace

void RopeAppend(const RopeAppendParams& p) {
  if (p.dtype == DType::kFloat32) return Append<float>(p);
  if (p.dtype == DType::kFloat16) return Append<Fp16>(p);
  Append<Bf16>(p);
}

}  // namespace ttsk::TTSK_ISA
