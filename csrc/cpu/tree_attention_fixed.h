// Microkernels of tree attention over fixed-point pages: the blocking of tree_attention_micro.h, with sums that are exact in
// int32, so a row's bits do not depend on their order either. Included by kernels/tree_attention.cpp.
#pragma once

#include "fixed_vector.h"
#include "tree_attention_micro.h"
#include "ttskernels/kv_form.h"

namespace ttsk::TTSK_ISA {
namespace {

// A tile of int16, or of int8 that are widened as they are read.
struct WordDot {
  using Element = int16_t;
  using Query = int16_t;
  static constexpr bool kFixed = true;
  static constexpr int kTile = kTileTokens;
  static Words Wide(const int16_t* p) { return LoadWords(p); }
};
struct ByteDot {
  using Element = int8_t;
  using Query = int16_t;
  static constexpr bool kFixed = true;
  static constexpr int kTile = kTileTokens;
  static Words Wide(const int8_t* p) { return LoadBytes(p); }
};
template <> struct Modes<int16_t> { using InPlace = WordDot; using Copied = WordDot; };
template <> struct Modes<int8_t> { using InPlace = ByteDot; using Copied = WordDot; };

// Largest integers of q (head_dim products with K fit in int32) and of the weights of a tile's tokens.
inline float MostQuery(KvForm form, int64_t head_dim) {
  const int64_t fits = INT32_MAX / (static_cast<int64_t>(MostOf(form)) * head_dim);
  return fits < INT16_MAX ? static_cast<float>(fits) : static_cast<float>(INT16_MAX);
}
inline float MostWeight(KvForm form) { return form == KvForm::kInt16 ? kMostRowOfWords : kMostRowOfBytes; }
static_assert(int64_t{4095} * 8191 * kTileTokens <= INT32_MAX && int64_t{127} * 32767 * kTileTokens <= INT32_MAX);
static_assert(kMostWord == 4095 && kMostRowOfWords == 8191 && kMostByte == 127 && kMostRowOfBytes == 32767);

// Scales of a block's tokens that no row sees are 0, whatever their slots hold.
template <typename E>
struct FixedTile : Tile<E> {
  alignas(64) float k_scale[kTileTokens];
  alignas(64) float v_scale[kTileTokens];
  bool finite;  // every v_scale is
};

// scores[r][16 * j ...] = row_scale[r] * k_scale * (q[r] . k) for blocks j = first .. first + NV - 1. Returns whether some
// score is above its row's limit.
template <typename M, int MR, int NV, typename Ahead>
TTSK_NOINLINE bool FixedScoreBlocks(const int16_t* q, int64_t dim, const FixedTile<typename M::Element>& tile,
                                    const Ahead& ahead, int first, const float* row_scale, const RowState* state,
                                    float* scores) {
  Ints acc[MR][NV];
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = ZeroInts();
  const typename M::Element* k[NV];
  TTSK_UNROLL
  for (int j = 0; j < NV; ++j) k[j] = tile.k[first + j];
  for (int64_t i = 0; i < dim; i += 2) {
    FetchK<NV>(ahead, first, i * kBlock);
    Words b[NV];
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) b[j] = M::Wide(k[j] + i * kBlock);
    TTSK_UNROLL
    for (int r = 0; r < MR; ++r) {
      const Words a = BroadcastWords(q + r * dim + i);
      TTSK_UNROLL
      for (int j = 0; j < NV; ++j) acc[r][j] = DotWords(acc[r][j], b[j], a);
    }
  }
  bool above = false;
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r) {
    const Vec scale = Broadcast(row_scale[r]);
    Vec max;
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) {
      const Vec s = Mul(Mul(ToFloat(acc[r][j]), Load(tile.k_scale + (first + j) * kBlock)), scale);
      max = j == 0 ? s : Max(max, s);
      Store(scores + r * kTileTokens + (first + j) * kBlock, s);
    }
    above |= AnyGreater(max, Broadcast(state[r].limit));
  }
  return above;
}

// out[r] = from[r] + weight_scale[r] * sum over tokens [lo, hi) of p[r][t] * v[t][col ..], NV vectors of it.
template <typename M, int MR, int NV, typename Ahead>
TTSK_NOINLINE void FixedWeighColumns(const int16_t* p, const FixedTile<typename M::Element>& tile,
                                     const Ahead& ahead, int lo, int hi, int64_t v_dim, int64_t col,
                                     const float* weight_scale, const float* from, int64_t from_dim, float* out) {
  Ints acc[MR][NV];
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r)
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) acc[r][j] = ZeroInts();
  for (int t = lo / 2 * 2; t < hi;) {
    const int block = t / kBlock, first = block * kBlock, end = hi < first + kBlock ? hi : first + kBlock;
    const typename M::Element* v = tile.v[block] + (t - first) * v_dim + col * 2;
    for (; t < end; t += 2, v += v_dim * 2) {
      FetchV<NV, kLanes * 2>(ahead, block, v - tile.v[block]);
      Words b[NV];
      TTSK_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = M::Wide(v + j * kLanes * 2);
      TTSK_UNROLL
      for (int r = 0; r < MR; ++r) {
        const Words a = BroadcastWords(p + r * kTileTokens + t);
        TTSK_UNROLL
        for (int j = 0; j < NV; ++j) acc[r][j] = DotWords(acc[r][j], b[j], a);
      }
    }
  }
  TTSK_UNROLL
  for (int r = 0; r < MR; ++r) {
    const Vec scale = Broadcast(weight_scale[r]);
    TTSK_UNROLL
    for (int j = 0; j < NV; ++j) {
      Store(out + r * v_dim + j * kLanes, Fma(ToFloat(acc[r][j]), scale, Load(from + r * from_dim + j * kLanes)));
    }
  }
}

template <typename M, int MR>
bool FixedScores(const int16_t* q, int64_t dim, const FixedTile<typename M::Element>& tile,
                 const Fetching<typename M::Element>& fetching, int blocks, const float* row_scale, const RowState* state,
                 float* scores) {
  return AnyBlocks(0, blocks, fetching, [&](int j, auto n, const auto& ahead) {
    return FixedScoreBlocks<M, MR, n.kVectors>(q, dim, tile, ahead, j, row_scale, state, scores);
  });
}

template <typename M, int MR, typename Ahead>
void FixedWeigh(const int16_t* p, const FixedTile<typename M::Element>& tile, const Ahead& ahead,
                int lo, int hi, int64_t v_dim, int64_t col, int vectors, const float* weight_scale, bool begins, float* out) {
  const float* from = begins ? kNothing : out;
  WithVectors(vectors, [&](auto n) {
    FixedWeighColumns<M, MR, n.kVectors>(p, tile, ahead, lo, hi, v_dim, col, weight_scale, from, begins ? 0 : v_dim, out);
  });
}

// What Softmax left in e, times V's scale of each token, as integers p with one scale a row and tile. A row's tile begins
// where its node (or 512 tokens of it) says, and tokens that it does not see have e = 0: the scale is a function of its path.
// e is overwritten.
inline void FixWeights(float* e, int rows, int blocks, const float* v_scale, bool finite, float most_weight, int16_t* p,
                       float* weight_scale) {
  float top[kLanes] = {}, up[kLanes], scale[kLanes];
  for (int r = 0; r < rows; ++r) {
    float* w = e + r * kTileTokens;
    Vec most = Zero(), odd = Zero();
    for (int j = 0; j < blocks; ++j) {
      const Vec x = Load(w + j * kBlock), y = Mul(x, Load(v_scale + j * kBlock));
      const Vec seen = SelectLess(Zero(), x, y, Zero());  // 0 * NaN of a token that another row sees; e = NaN is in l
      Store(w + j * kBlock, seen);
      most = Max(most, seen);
      if (!finite) odd = Add(odd, Sub(seen, seen));
    }
    top[r] = ReduceMax(most);
    if (!finite && ReduceAdd(odd) != 0.0f) {
      top[r] = __builtin_nanf("");
      std::memset(w, 0, sizeof(float) * blocks * kBlock);
    }
  }
  const Vec t = Load(top), least = Broadcast(kLeastScaled), zero = Zero();
  Store(up, SelectLess(least, t, Div(Broadcast(most_weight), t), zero));
  Store(scale, SelectLess(t, least, zero, Mul(t, Broadcast(1.0f / most_weight))));
  for (int r = 0; r < rows; ++r) {
    const Vec u = Broadcast(up[r]);
    for (int j = 0; j < blocks; ++j) {
      const int at = r * kTileTokens + j * kBlock;
      StoreRounded(p + at, Mul(Load(e + at), u));
    }
    weight_scale[r] = scale[r];
  }
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
