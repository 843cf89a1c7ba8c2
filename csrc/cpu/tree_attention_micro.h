// Microkernels of tree attention: a few rows of q against one 64-token KV tile. Every accumulator is one chain over
// head_dim (or tokens), so a row's bits do not depend on which rows it is computed with. Included by
// kernels/tree_attention.cpp.
#pragma once

#include "ttskernels/plan.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

// Rows x vectors of accumulators that fit the registers.
#if defined(__AVX512F__)
constexpr int kMicroRows = 6, kMicroVecs = 4;
#elif defined(__AVX2__)
constexpr int kMicroRows = 6, kMicroVecs = 1;
#else
constexpr int kMicroRows = 3, kMicroVecs = 1;
#endif
constexpr int kBlock = 16;                          // tokens of a packed page
constexpr int kTileBlocks = 2 * kTileTokens / kBlock;  // of the longest tile
constexpr float kInf = __builtin_inff();
// Without it gcc 12 sends the accumulators through the stack before and after the loops.
#define TTSK_UNROLL _Pragma("GCC unroll 8")
// For inner loops: constants of what surrounds them, kept in registers, would cost them theirs.
#define TTSK_NOINLINE __attribute__((noinline))

// How a tile is read. Element: what its blocks hold; Query: what q and p are held in; kPack elements of the reduced
// dimension lie side by side, and take kSteps multiply-adds; a tile is kTile tokens at most. All but PairDot give the same bits
// for the same values.
struct PlainFloat {
  using Element = float;
  using Query = float;
  using Operand = Vec;
  static constexpr bool kFixed = false;
  static constexpr int kPack = 1, kSteps = 1, kTile = kTileTokens;
  static Operand Wide(const float* p, int) { return Load(p); }
  static Operand One(const float* p) { return Broadcast(*p); }
  static Vec Dot(Vec acc, Operand a, Operand b) { return Fma(a, b, acc); }
};
struct WidenHalf : PlainFloat {
  using Element = Fp16;
  static Operand Wide(const Fp16* p, int) { return LoadAs(p); }
};
struct WidenPairs : PlainFloat {
  using Element = Bf16;
  static constexpr int kPack = 2, kSteps = 2;
  static Operand Wide(const Bf16* p, int step) { return step == 0 ? Even(LoadPairs(p)) : Odd(LoadPairs(p)); }
};
#if defined(__AVX512BF16__)
struct PairDot {
  using Element = Bf16;
  using Query = Bf16;
  using Operand = Pairs;
  static constexpr bool kFixed = false;
  static constexpr int kPack = 2, kSteps = 1, kTile = 2 * kTileTokens;
  static Operand Wide(const Bf16* p, int) { return LoadPairs(p); }
  static Operand One(const Bf16* p) {
    uint32_t pair;
    std::memcpy(&pair, p, 4);
    return BroadcastPair(pair);
  }
  static Vec Dot(Vec acc, Operand a, Operand b) { return DotPairs(acc, a, b); }
};
#endif

// Pool element -> mode for aligned pages used in place, and mode for everything else (and for many rows: a tile is
// then expanded once, into L1).
template <typename T> struct Modes;
template <> struct Modes<float> { using InPlace = PlainFloat; using Copied = PlainFloat; };
template <> struct Modes<Fp16> { using InPlace = WidenHalf; using Copied = PlainFloat; };
#if defined(__AVX512BF16__)
template <> struct Modes<Bf16> { using InPlace = PairDot; using Copied = PairDot; };
#else
template <> struct Modes<Bf16> { using InPlace = WidenPairs; using Copied = PlainFloat; };
#endif

// Sixteen-token blocks: k[b] is [head_dim / pack][16][pack], v[b] is [16 / pack][v_dim][pack].
template <typename E>
struct Tile {
  const E* k[kTileBlocks];
  const E* v[kTileBlocks];
};

// Fetches the line at block + i of a tile ahead, or nothing. Fetched a line for each that is used, the next tile arrives while
// this one is computed; all at once they fill the queues of the core, and nothing is computed until they have left.
template <typename E>
inline void Fetch(const E* block, int64_t i) { __builtin_prefetch(block + i); }
struct None {
  struct Block {};
  Block k[kTileBlocks], v[kTileBlocks];
};
inline void Fetch(None::Block, int64_t) {}

// scores[r][16 * j ...] = scale * q[r] . k for blocks j = first .. first + NV - 1; rows of scores and of p are M::kTile apart.
// Meanwhile `ahead`, a Tile or None, is fetched line for line.
template <typename M, int MR, int NV, typename Ahead>
TTSK_NOINLINE void ScoreBlocks(const typename M::Query* q, int64_t dim, const Tile<typename M::Element>& tile,
                               const Ahead& ahead, int first, float scale, float* scores) {
  Vec acc[MR][NV];
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Zero();
  const typename M::Element* k[NV];
  TTSK_UNROLL
  for (int j = 0; j < NV; ++j) k[j] = tile.k[first + j];
  for (int64_t i = 0; i < dim; i += M::kPack) {
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) Fetch(ahead.k[first + j], i * kBlock);
    TTSK_UNROLL
    for (int step = 0; step < M::kSteps; ++step) {
      typename M::Operand b[NV];
      TTSK_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = M::Wide(k[j] + i * kBlock, step);
      TTSK_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename M::Operand a = M::One(q + r * dim + i + step);
        TTSK_UNROLL
        for (int j = 0; j < NV; ++j) acc[r][j] = M::Dot(acc[r][j], a, b[j]);
      }
    }
  }
  const Vec s = Broadcast(scale);
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) Store(scores + r * M::kTile + (first + j) * kBlock, Mul(acc[r][j], s));
}

// out[r] += sum over tokens [lo, hi) of p[r][t] * v[t][col ..], NV vectors of it.
template <typename M, int MR, int NV, typename Ahead>
TTSK_NOINLINE void WeighColumns(const typename M::Query* p, const Tile<typename M::Element>& tile, const Ahead& ahead, int lo,
                                int hi, int64_t v_dim, int64_t col, float* out) {
  Vec acc[MR][NV];
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Load(out + r * v_dim + j * kLanes);
  for (int t = lo / M::kPack * M::kPack; t < hi;) {
    const int block = t / kBlock, first = block * kBlock, end = hi < first + kBlock ? hi : first + kBlock;
    const typename M::Element* v = tile.v[block] + (t - first) * v_dim + col * M::kPack;
    for (; t < end; t += M::kPack, v += v_dim * M::kPack) {
      TTSK_UNROLL
      for (int j = 0; j < NV; ++j) Fetch(ahead.v[block], v + j * kLanes * M::kPack - tile.v[block]);
      TTSK_UNROLL
      for (int step = 0; step < M::kSteps; ++step) {
        typename M::Operand b[NV];
        TTSK_UNROLL
        for (int j = 0; j < NV; ++j) b[j] = M::Wide(v + j * kLanes * M::kPack, step);
        TTSK_UNROLL
        for (int r = 0; r < MR; ++r) {
          const typename M::Operand a = M::One(p + r * M::kTile + t + step);
          TTSK_UNROLL
          for (int j = 0; j < NV; ++j) acc[r][j] = M::Dot(acc[r][j], a, b[j]);
        }
      }
    }
  }
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) Store(out + r * v_dim + j * kLanes, acc[r][j]);
}

// Which passes of a group of rows fetch what: half of the passes of each of the first two groups, so that lines are asked for
// no faster than they come.
template <typename E>
struct Fetching {
  const Tile<E>* ahead;  // null: nothing is
  int64_t group, groups;

  bool In(int pass) const { return ahead != nullptr && (groups == 1 || group == pass % 2); }
};

template <int kN>
struct Vectors { static constexpr int kVectors = kN; };

// Calls f with a number of vectors, at most kMicroVecs, as a constant.
template <typename F>
void WithVectors(int n, F f) {
  if (n == 1) f(Vectors<1>{});
  if constexpr (kMicroVecs >= 4) {
    if (n == 2) f(Vectors<2>{});
    if (n == 3) f(Vectors<3>{});
    if (n == 4) f(Vectors<4>{});
  }
}

// Calls f(first block, vectors as a constant, what to fetch: a Tile or None) for all blocks of a tile.
template <typename E, typename F>
void ForBlocks(int blocks, const Fetching<E>& fetching, F f) {
  for (int j = 0; j < blocks; j += kMicroVecs) {
    WithVectors(blocks - j < kMicroVecs ? blocks - j : kMicroVecs, [&](auto n) {
      if (fetching.In(j / kMicroVecs)) f(j, n, *fetching.ahead);
      else f(j, n, None{});
    });
  }
}

template <typename M, int MR>
void Scores(const typename M::Query* q, int64_t dim, const Tile<typename M::Element>& tile,
            const Fetching<typename M::Element>& fetching, int blocks, float scale, float* scores) {
  ForBlocks(blocks, fetching, [&](int j, auto n, const auto& ahead) {
    ScoreBlocks<M, MR, n.kVectors>(q, dim, tile, ahead, j, scale, scores);
  });
}

// Vectors of columns that one call of Weigh takes when `left` of them are left: 5 as 3 + 2, 6 as 3 + 3.
constexpr int ColumnVectors(int left) {
  return kMicroVecs == 1 ? 1 : left == 5 || left == 6 ? 3 : left < 4 ? left : 4;
}

template <typename M, int MR, typename Ahead>
void Weigh(const typename M::Query* p, const Tile<typename M::Element>& tile, const Ahead& ahead, int lo, int hi,
           int64_t v_dim, int64_t col, int vectors, float* out) {
  WithVectors(vectors, [&](auto n) { WeighColumns<M, MR, n.kVectors>(p, tile, ahead, lo, hi, v_dim, col, out); });
}

inline void StoreP(float* p, Vec a) { Store(p, a); }
#if defined(__AVX512BF16__)
inline void StoreP(Bf16* p, Vec a) {
  const __m256bh packed = _mm512_cvtneps_pbh(a.v);
  std::memcpy(p, &packed, sizeof(packed));
}
#endif

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

// The larger of each lane's scores.
inline Vec MaxOf(const float* s, int blocks) {
  Vec max = Load(s);
  for (int j = 1; j < blocks; ++j) max = Max(max, Load(s + j * kBlock));
  return max;
}

// 2^x for weights of a tile that are held as E; those of bf16 products need not have other levels' bits.
template <typename E>
inline Vec WeightExp2(Vec x) { return Exp2(x); }
#if defined(__AVX512BF16__)
template <>
inline Vec WeightExp2<Bf16>(Vec x) { return Exp2FromFloor(x); }
#endif

// Where a row's online softmax stands, and where the row may look.
struct RowState {
  float m;             // what scores are taken relative to, in log2 units; 0 until one has been seen
  float limit;         // m + kSlack, a score above it moves m; -inf until one has been seen
  int32_t first, end;  // absolute positions [first, end)

  void Reset() { m = 0.0f, limit = -kInf; }
  bool Seen() const { return limit != -kInf; }
};
// m need not be the maximum, only near it: weights reach 2^kSlack, their relative accuracy is the same, and after a row's first
// tile neither m nor the output is rescaled but rarely (as FlashAttention-4 skips rescaling).
constexpr float kSlack = 8.0f;

// A group's rows: their states, each lane's share of the denominators [rows, 16], and the outputs so far [rows, v_dim].
struct RowsOf {
  RowState* state;
  float* sums;
  float* o;
  int64_t v_dim;
};

// Caps the scores of a tile whose first token is at position pos0, and hides what rows may not see, whatever it holds. Tokens
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

// A tile of scores has some above the limit: moves m there, and what was summed up relative to it.
template <typename M>
void MoveMaxima(const float* scores, int rows, int blocks, const RowsOf& of) {
  for (int r = 0; r < rows; ++r) {
    RowState& state = of.state[r];
    const float top = ReduceMax(MaxOf(scores + r * M::kTile, blocks));
    if (!(top > state.limit)) continue;
    if (state.Seen()) {
      const Vec factor = Exp2(Broadcast(state.m - top));
      float* o = of.o + r * of.v_dim;
      for (int64_t i = 0; i < of.v_dim; i += kLanes) Store(o + i, Mul(Load(o + i), factor));
      Store(of.sums + r * kLanes, Mul(Load(of.sums + r * kLanes), factor));
    }
    state.m = top, state.limit = top + kSlack;
  }
}

// Online softmax of MR score rows over a tile. Writes p, which may be `scores`.
template <typename M, int MR, typename E>
void Softmax(float* scores, int blocks, const RowsOf& of, E* p) {
  bool moves = false;
  for (int r = 0; r < MR; ++r) {
    moves |= AnyGreater(MaxOf(scores + r * M::kTile, blocks), Broadcast(of.state[r].limit));
  }
  if (moves) MoveMaxima<M>(scores, MR, blocks, of);
  for (int r = 0; r < MR; ++r) {
    const float* s = scores + r * M::kTile;
    const Vec m = Broadcast(of.state[r].m);
    Vec sum = Load(of.sums + r * kLanes);
    for (int j = 0; j < blocks; ++j) {
      const Vec e = WeightExp2<E>(Sub(Load(s + j * kBlock), m));
      StoreP(p + r * M::kTile + j * kBlock, e);
      sum = Add(sum, e);
    }
    Store(of.sums + r * kLanes, sum);
  }
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
