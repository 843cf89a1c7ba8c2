// Softmax of tree attention, a part of a tile at a time: masks, the running maximum, weights and denominators. Included by
// kernels/tree_attention.cpp.
#pragma once

#include "tree_attention_micro.h"

namespace ttsk::TTSK_ISA {
namespace {

// tanh with relative error near 1e-7: an odd polynomial below 0.625 (Cephes), else by exp.
inline Vec Tanh(Vec x) {
  const Vec z = Mul(x, x), one = Broadcast(1.0f);
  Vec p = Broadcast(-5.70498872745e-3f);
  p = Fma(p, z, Broadcast(2.06390887954e-2f));
  p = Fma(p, z, Broadcast(-5.37397155531e-2f));
  p = Fma(p, z, Broadcast(1.33314422036e-1f));
  p = Fma(p, z, Broadcast(-3.33332819422e-1f));
  const Vec small = Fma(Mul(p, z), x, x);
  const Vec e = Exp(Add(x, x));
  const Vec large = Sub(one, Div(Broadcast(2.0f), Add(e, one)));
  return SelectLess(z, Broadcast(0.625f * 0.625f), small, large);
}

// m need not be the maximum, only near it: weights reach 2^kSlack, their relative accuracy is the same, and after a row's first
// part neither m nor the output is rescaled but rarely (as FlashAttention-4 skips rescaling).
constexpr float kSlack = 8.0f;

// A group's rows: their states, each lane's share of the denominators [rows, 16], and the outputs so far [rows, v_dim].
struct RowsOf {
  RowState* state;
  float* sums;
  float* o;
  int64_t v_dim;
};

// Caps the scores of a part whose first token is at position pos0, and hides what rows may not see, whatever it holds. Tokens
// from `hi` on do not exist.
template <typename M>
void MaskScores(float* scores, int rows, int32_t pos0, int blocks, int hi, float softcap, const RowState* state) {
  const Vec hidden = Broadcast(-kInf);
  for (int r = 0; r < rows; ++r) {
    const int first = state[r].first - pos0;
    const int end = state[r].end - pos0 < hi ? state[r].end - pos0 : hi;
    for (int j = 0; j < blocks; ++j) {
      float* s = scores + r * M::kTile + j * kBlock;
      Vec x = Load(s);
      if (softcap != 0.0f) x = Mul(Tanh(Mul(x, Broadcast(1.0f / softcap))), Broadcast(softcap * kLog2e));
      const int a = first - j * kBlock, b = end - j * kBlock;
      x = SelectFirst(b < 0 ? 0 : b < kLanes ? b : kLanes, x, hidden);
      Store(s, SelectFirst(a < 0 ? 0 : a < kLanes ? a : kLanes, hidden, x));
    }
  }
}

// Weights 2^(s - m) of a vector of scores, and their sum.
inline void TakeWeight(const float* s, const float* m, float* weights, Vec* sum) {
  const Vec e = Exp2(Sub(Load(s), Broadcast(*m)));
  Store(weights, e);
  *sum = Add(*sum, e);
}
#if defined(TTSK_DOT_PAIRS)
inline void TakeWeight(const float* s, const float* m, Bf16* weights, Vec* sum) { Exp2Bf16(s, m, weights, sum); }
#endif

// Some scores of the blocks [first, end) of a tile may be above the limit: moves m there, and what is relative to it, weights
// of earlier blocks included.
template <typename M, typename E>
TTSK_NOINLINE void MoveMaxima(const float* scores, int rows, int first, int end, const RowsOf& of, E* weights) {
  for (int r = 0; r < rows; ++r, scores += M::kTile, weights += M::kTile) {
    RowState& state = of.state[r];
    Vec most = Load(scores + first * kBlock);
    for (int j = first + 1; j < end; ++j) most = Max(most, Load(scores + j * kBlock));
    const float top = ReduceMax(most);
    if (!(top > state.limit)) continue;
    if (state.Seen()) {
      const Vec factor = Exp2(Broadcast(state.m - top));
      float* o = of.o + r * of.v_dim;
      for (int64_t i = 0; i < of.v_dim; i += kLanes) Store(o + i, Mul(Load(o + i), factor));
      Store(of.sums + r * kLanes, Mul(Load(of.sums + r * kLanes), factor));
    }
    state.m = top, state.limit = top + kSlack;
    Vec scaled = Zero();  // their sum, which is above
    for (int j = 0; j < first; ++j) TakeWeight(scores + j * kBlock, &state.m, weights + j * kBlock, &scaled);
  }
}

// Weights that are still to be taken of scores, where that can wait (weights E); elsewhere there are none.
template <typename E>
struct Deferred : Idle {};

#if defined(__AVX512BF16__)
// `left` vectors of rows of `blocks`. Beside products of pairs they cost a third of what they cost alone.
template <>
struct Deferred<Bf16> {
  const float* scores = nullptr;
  Bf16* weights = nullptr;
  const RowState* row = nullptr;
  float* sums = nullptr;
  int left = 0, blocks = 0, in_row = 0;
  int64_t skip = 0;  // from the end of a row's blocks to the next row

  // Calls f, which needs what is left of the rows from `state` on and may do what is left of others.
  template <typename F>
  void Beside(const RowState* state, int rows, F f) {
    if (row >= state && row < state + rows) Finish();
    if (left == 0) return f(Idle{});
    f(*this);
    left = 0;
  }
  void One() {
    Vec sum = Load(sums);
    Next(&sum);
    Store(sums, sum);
    if (in_row == 0) NextRow();
  }
  void Finish() {
    while (left > 0) {
      Vec sum = Load(sums);
      while (in_row > 0) Next(&sum);
      Store(sums, sum);
      NextRow();
    }
  }

 private:
  void Next(Vec* sum) {
    TakeWeight(scores, &row->m, weights, sum);
    scores += kBlock, weights += kBlock, --in_row, --left;
  }
  void NextRow() { scores += skip, weights += skip, ++row, sums += kLanes, in_row = blocks; }
};
#endif

// Takes the weights of rows of scores over some blocks, and adds them to the denominators. Weights may be `scores`.
template <typename M, typename E>
void TakeWeights(const float* scores, int rows, int blocks, const RowsOf& of, E* weights, Deferred<E>*) {
  for (int r = 0; r < rows; ++r, scores += M::kTile, weights += M::kTile) {
    Vec sum = Load(of.sums + r * kLanes);
    for (int j = 0; j < blocks; ++j) TakeWeight(scores + j * kBlock, &of.state[r].m, weights + j * kBlock, &sum);
    Store(of.sums + r * kLanes, sum);
  }
}
#if defined(__AVX512BF16__)
template <typename M>
void TakeWeights(const float* scores, int rows, int blocks, const RowsOf& of, Bf16* weights, Deferred<Bf16>* later) {
  later->scores = scores, later->weights = weights, later->row = of.state, later->sums = of.sums;
  later->left = rows * blocks, later->blocks = later->in_row = blocks, later->skip = M::kTile - blocks * kBlock;
}
#endif

// A merged state is (m, l, o): maximum in log2 units, denominator, unnormalised output. Merging is the same arithmetic
// wherever it happens; an empty partial changes nothing and a first one is copied.
void MergePartial(float part_m, float part_l, const float* part_o, int64_t v_dim, float* m, float* l, float* o) {
  if (part_m == -kInf) return;
  if (*m == -kInf) {
    *m = part_m, *l = part_l;
    std::memcpy(o, part_o, sizeof(float) * v_dim);
    return;
  }
  const bool larger = part_m > *m;  // one factor is 1, so one exponential is enough
  const Vec less = Exp2(Broadcast(larger ? *m - part_m : part_m - *m)), one = Broadcast(1.0f);
  const Vec a = larger ? less : one, b = larger ? one : less;
  for (int64_t i = 0; i < v_dim; i += kLanes) Store(o + i, Fma(Load(o + i), a, Mul(Load(part_o + i), b)));
  *l = __builtin_fmaf(*l, First(a), part_l * First(b));
  if (larger) *m = part_m;
}

// Whether n values, a multiple of the lanes, are.
inline bool AllFinite(const float* p, int64_t n) {
  Vec zero = Zero();
  for (int64_t i = 0; i < n; i += kLanes) zero = Fma(Load(p + i), Zero(), zero);
  return ReduceAdd(zero) == 0.0f;
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
