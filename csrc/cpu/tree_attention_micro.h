// Microkernels of tree attention: a few rows of q against one KV tile. Every accumulator is one chain over
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
constexpr int kBlock = 16;                             // tokens of a packed page
constexpr int kTileBlocks = 2 * kTileTokens / kBlock;  // of the longest tile
constexpr int kPartBlocks = kTileTokens / kBlock;      // of what a group of rows scores at once
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
#if defined(TTSK_DOT_PAIRS)
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
#if defined(TTSK_DOT_PAIRS)
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

// What is fetched of the next tile by a step that reads NV lines of this one: as many lines of that one (Tile), one or two of
// them (Lines) or nothing (None). Line by line it arrives while this one is computed; all at once it fills the queues of the
// core, and nothing is computed until it has left.
template <typename E, int kN>
struct Lines {
  const Tile<E>* tile;
  int number;  // of NV
};
struct None {};

// The lines at blocks first .. + i, and those at a block of V + i, + i + kStep, ...
template <int NV, typename E>
inline void FetchK(const Tile<E>& ahead, int first, int64_t i) {
  TTSK_UNROLL
  for (int j = 0; j < NV; ++j) FetchFar(ahead.k[first + j] + i);
}
template <int NV, typename E, int kN>
inline void FetchK(const Lines<E, kN>& ahead, int first, int64_t i) {
  TTSK_UNROLL
  for (int j = 0; j < kN; ++j) FetchFar(ahead.tile->k[first + ahead.number + j] + i);
}
template <int NV>
inline void FetchK(const None&, int, int64_t) {}
template <int NV, int kStep, typename E>
inline void FetchV(const Tile<E>& ahead, int block, int64_t i) {
  TTSK_UNROLL
  for (int j = 0; j < NV; ++j) FetchFar(ahead.v[block] + i + j * kStep);
}
template <int NV, int kStep, typename E, int kN>
inline void FetchV(const Lines<E, kN>& ahead, int block, int64_t i) {
  TTSK_UNROLL
  for (int j = 0; j < kN; ++j) FetchFar(ahead.tile->v[block] + i + (ahead.number + j) * kStep);
}
template <int NV, int kStep>
inline void FetchV(const None&, int, int64_t) {}

// Where a row's online softmax stands, and where the row may look.
struct RowState {
  float m;             // what scores are taken relative to, in log2 units; 0 until one has been seen
  float limit;         // m + kSlack, a score above it moves m; -inf until one has been seen
  int32_t first, end;  // absolute positions [first, end)

  void Reset() { m = 0.0f, limit = -kInf; }
  bool Seen() const { return limit != -kInf; }
};
// Work that can be done vector by vector beside products of pairs: here there is none.
struct Idle {
  static constexpr int left = 0;
  template <typename F>
  void Beside(const RowState*, int, F f) { f(*this); }
  void One() {}
  void Finish() {}
};

// scores[r][16 * j ...] = scale * q[r] . k for blocks j = first .. first + NV - 1; rows of scores and of p are M::kTile apart.
// Before it is written, work given by `beside` is done, a vector a step; meanwhile `ahead` is fetched. Returns whether some
// score is above its row's limit.
template <typename M, int MR, int NV, typename Ahead, typename Beside>
TTSK_NOINLINE bool ScoreBlocks(const typename M::Query* q, int64_t dim, const Tile<typename M::Element>& tile,
                               const Ahead& ahead, int first, float scale, const RowState* state, const Beside& beside,
                               float* scores) {
  Beside work = beside;  // in registers
  Vec acc[MR][NV];
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Zero();
  const typename M::Element* k[NV];
  TTSK_UNROLL
  for (int j = 0; j < NV; ++j) k[j] = tile.k[first + j];
  const auto step = [&](int64_t i) __attribute__((always_inline)) {
    FetchK<NV>(ahead, first, i * kBlock);
    TTSK_UNROLL
    for (int half = 0; half < M::kSteps; ++half) {
      typename M::Operand b[NV];
      TTSK_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = M::Wide(k[j] + i * kBlock, half);
      TTSK_UNROLL
      for (int r = 0; r < MR; ++r) {
        const typename M::Operand a = M::One(q + r * dim + i + half);
        TTSK_UNROLL
        for (int j = 0; j < NV; ++j) acc[r][j] = M::Dot(acc[r][j], a, b[j]);
      }
    }
  };
  int64_t i = 0;
  for (; i < dim && work.left > 0; i += M::kPack) step(i), work.One();
  for (; i < dim; i += M::kPack) step(i);
  work.Finish();
  const Vec s = Broadcast(scale);
  bool above = false;
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r) {
    Vec max;
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) {
      acc[r][j] = Mul(acc[r][j], s);
      max = j == 0 ? acc[r][j] : Max(max, acc[r][j]);
      Store(scores + r * M::kTile + (first + j) * kBlock, acc[r][j]);
    }
    above |= AnyGreater(max, Broadcast(state[r].limit));
  }
  return above;
}

// Outputs that nothing has been added to, as long as those that a call of Weigh takes of a row.
alignas(64) constexpr float kNothing[kMicroVecs * kLanes] = {};

// out[r] = from[r] + sum over tokens [lo, hi) of p[r][t] * v[t][col ..], NV vectors of it; rows of `from` are from_dim apart.
// Work given by `beside` is done meanwhile, as above.
template <typename M, int MR, int NV, typename Ahead, typename Beside>
TTSK_NOINLINE void WeighColumns(const typename M::Query* p, const Tile<typename M::Element>& tile, const Ahead& ahead, int lo,
                                int hi, int64_t v_dim, int64_t col, const float* from, int64_t from_dim, const Beside& beside,
                                float* out) {
  Beside work = beside;
  Vec acc[MR][NV];
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = Load(from + r * from_dim + j * kLanes);
  for (int t = lo / M::kPack * M::kPack; t < hi;) {
    const int block = t / kBlock, first = block * kBlock, end = hi < first + kBlock ? hi : first + kBlock;
    const typename M::Element* v = tile.v[block] + (t - first) * v_dim + col * M::kPack;
    for (; t < end; t += M::kPack, v += v_dim * M::kPack) {
      FetchV<NV, kLanes * M::kPack>(ahead, block, v - tile.v[block]);
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
      if (work.left > 0) work.One();
    }
  }
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) Store(out + r * v_dim + j * kLanes, acc[r][j]);
  work.Finish();
}

// What the groups of rows of a tile fetch of the next one, no faster than it comes (bench/LOG.md): of each step, two groups
// half of the lines, three of them 1, 1 and 2, more of them a line each, and from eight on in every other pass; where a step
// has too few lines for that, the first two groups all of them, in alternate passes.
template <typename E>
struct Fetching {
  const Tile<E>* ahead;  // null: nothing is
  int64_t group, groups;

  // Calls f with what is fetched in pass number `pass`, by steps of so many vectors.
  template <typename F>
  auto With(int pass, int vectors, F f) const {
    const int at = static_cast<int>(group);
    if (ahead == nullptr) return f(None{});
    if (groups == 1) return f(*ahead);
    if (groups < 4 ? vectors < 4 : groups < 8 && vectors == 1) return at == pass % 2 ? f(*ahead) : f(None{});
    if (groups == 2) return f(Lines<E, 2>{ahead, 2 * at});
    if (groups == 3 && at == 2) return f(Lines<E, 2>{ahead, 2});
    const int line = groups < 8 ? at : at / 2;
    const bool turn = groups < 8 || at % 2 == pass % 2;
    return turn && line < vectors ? f(Lines<E, 1>{ahead, line}) : f(None{});
  }
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

// Calls f(block, vectors as a constant, what to fetch) for the blocks [first, end) of a tile; whether some call
// says so.
template <typename E, typename F>
bool AnyBlocks(int first, int end, const Fetching<E>& fetching, F f) {
  bool any = false;
  for (int j = first; j < end; j += kMicroVecs) {
    WithVectors(end - j < kMicroVecs ? end - j : kMicroVecs, [&](auto n) {
      any |= fetching.With(j / kMicroVecs, n.kVectors, [&](const auto& ahead) { return f(j, n, ahead); });
    });
  }
  return any;
}

template <typename M, int MR, typename Beside>
bool Scores(const typename M::Query* q, int64_t dim, const Tile<typename M::Element>& tile,
            const Fetching<typename M::Element>& fetching, int first, int end, float scale, const RowState* state,
            const Beside& beside, float* scores) {
  return AnyBlocks(first, end, fetching, [&](int j, auto n, const auto& ahead) {
    return ScoreBlocks<M, MR, n.kVectors>(q, dim, tile, ahead, j, scale, state, beside, scores);
  });
}

// Vectors of columns that one call of Weigh takes when `left` of them are left: 5 as 3 + 2, 6 as 3 + 3.
constexpr int ColumnVectors(int left) {
  return kMicroVecs == 1 ? 1 : left == 5 || left == 6 ? 3 : left < 4 ? left : 4;
}

template <typename M, int MR, typename Ahead, typename Beside>
void Weigh(const typename M::Query* p, const Tile<typename M::Element>& tile, const Ahead& ahead, int lo, int hi,
           int64_t v_dim, int64_t col, int vectors, bool begins, const Beside& beside, float* out) {
  const float* from = begins ? kNothing : out;
  WithVectors(vectors, [&](auto n) {
    WeighColumns<M, MR, n.kVectors>(p, tile, ahead, lo, hi, v_dim, col, from, begins ? 0 : v_dim, beside, out);
  });
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
