// Loads 64-token tiles of fixed-point pages for tree attention: in place where a page is aligned to its block and has the
// tile's element type, else widened or gathered into a scratch of int16. Included by kernels/tree_attention.cpp.
#pragma once

#include "tree_attention_fixed.h"
#include "tree_attention_tile.h"

namespace ttsk::TTSK_ISA {
namespace {

// A pair of adjacent integers as one number, the lower one first.
template <typename P> struct PairOf;
template <> struct PairOf<int16_t> { using Type = uint32_t; };
template <> struct PairOf<int8_t> { using Type = uint16_t; };

// P: integer of the pool; E: integer of the tile, P itself or int16_t. With E int8_t, every block is an aligned page.
template <typename P, typename E>
class FixedLoader {
 public:
  FixedLoader(const TreeAttentionParams& p, int64_t head, E* scratch)
      : dim_(p.head_dim), v_dim_(p.v_dim), scratch_(scratch) {
    const int64_t k_run = FixedRun(dim_, p.form), v_run = FixedRun(v_dim_, p.form);
    k_page_ = p.kv_heads * k_run, v_page_ = p.kv_heads * v_run;
    k_ = static_cast<const P*>(p.k) + head * k_run;
    v_ = static_cast<const P*>(p.v) + head * v_run;
  }

  // The tile's tokens [0, hi), from the cursor on: K and all scales now, V (from token lo on) by LoadV.
  FixedTile<E> LoadK(SegCursor cursor, int lo, int hi) {
    FixedTile<E> tile;
    lo_ = lo, hi_ = hi;
    Vec odd = Zero();
    for (int b = 0; b * kBlock < hi; ++b) {
      at_.Take(&cursor, b, BlockEnd(b, hi));
      TakeScales(b, k_, k_page_, dim_, tile.k_scale + b * kBlock);
      TakeScales(b, v_, v_page_, v_dim_, tile.v_scale + b * kBlock);
      const Vec s = Load(tile.v_scale + b * kBlock);
      odd = Add(odd, Sub(s, s));
      tile.k[b] = Block(b, k_, k_page_, dim_, [&](E* to) {
        if constexpr (sizeof(E) == 2) GatherK(b, to);
      });
    }
    tile.finite = ReduceAdd(odd) == 0.0f;
    return tile;
  }

  void LoadV(FixedTile<E>* tile) {
    for (int b = lo_ / kBlock; b * kBlock < hi_; ++b) {
      tile->v[b] = Block(b, v_, v_page_, v_dim_, [&](E* to) {
        if constexpr (sizeof(E) == 2) GatherV(b, to);
      });
    }
  }

  // Where pages used in place hold the first blocks of `tokens` tokens from the cursor on; how many were found.
  int Find(SegCursor cursor, int32_t tokens, Tile<E>* tile) const {
    if constexpr (sizeof(E) != sizeof(P)) return 0;
    return FindBlocks(cursor, tokens, [&](int b, int64_t page) {
      tile->k[b] = reinterpret_cast<const E*>(k_ + page * k_page_);
      tile->v[b] = reinterpret_cast<const E*>(v_ + page * v_page_);
    });
  }

 private:
  // Sixteen scales of block b, 0 for tokens past its end.
  void TakeScales(int b, const P* pages, int64_t page_stride, int64_t dim, float* to) const {
    if (at_.count[b] > 1 || at_.runs[b][0].count < kBlock) Store(to, Zero());
    for (int r = 0; r < at_.count[b]; ++r) {
      const Run& run = at_.runs[b][r];
      const float* from = reinterpret_cast<const float*>(pages + run.page * page_stride + kBlock * dim) + run.slot;
      if (run.count == kBlock) Store(to, Load(from));
      else std::memcpy(to + run.at, from, sizeof(float) * run.count);
    }
  }

  template <typename Gather>
  const E* Block(int b, const P* pages, int64_t page_stride, int64_t dim, Gather gather) const {
    const P* page = pages + at_.runs[b][0].page * page_stride;
    if constexpr (sizeof(E) == sizeof(P)) {
      if (sizeof(E) == 1 || at_.Aligned(b)) return page;
    }
    E* to = scratch_ + b * kBlock * dim;
    if constexpr (sizeof(E) > sizeof(P)) {
      if (at_.Aligned(b)) {
        for (int64_t i = 0; i < kBlock * dim; i += 2 * kLanes) WidenBytes(page + i, to + i);
        return to;
      }
    }
    gather(to);
    return to;
  }

  // Block rows in ascending order, every run as a whole vector: what it writes too much, a later store replaces; what the
  // last row reads too much are the page's scales.
  void GatherK(int b, E* to) const {
    for (int64_t i = 0; i < dim_; i += 2) {
      for (int r = 0; r < at_.count[b]; ++r) {
        const Run& run = at_.runs[b][r];
        const P* row = k_ + run.page * k_page_ + i * kBlock + run.slot * 2;
        E* at = to + i * kBlock + run.at * 2;
        if constexpr (sizeof(P) == 1) WidenBytes(row, at);
        else std::memcpy(at, row, sizeof(E) * 2 * kBlock);
      }
    }
  }

  // Token by token: the first of a pair writes a lane of 0 above it, the second goes there.
  void GatherV(int b, E* to) const {
    using Pair = typename PairOf<P>::Type;
    for (int r = 0; r < at_.count[b]; ++r) {
      const Run& run = at_.runs[b][r];
      for (int t = 0; t < run.count; ++t) {
        const int slot = run.slot + t, at = run.at + t, shift = slot % 2 * 8 * static_cast<int>(sizeof(P));
        const P* from = v_ + run.page * v_page_ + slot / 2 * 2 * v_dim_;
        E* lanes = to + at / 2 * 2 * v_dim_;
        for (int64_t col = 0; col < v_dim_; ++col) {
          Pair pair;
          std::memcpy(&pair, from + 2 * col, sizeof(pair));
          const uint32_t value = static_cast<uint16_t>(static_cast<int16_t>(static_cast<P>(pair >> shift)));
          uint32_t lane = 0;
          if (at % 2 != 0) std::memcpy(&lane, lanes + 2 * col, sizeof(lane));
          lane = at % 2 == 0 ? value : lane | value << 16;
          std::memcpy(lanes + 2 * col, &lane, sizeof(lane));
        }
      }
    }
  }

  const P* k_;
  const P* v_;
  int64_t k_page_, v_page_, dim_, v_dim_;
  E* scratch_;  // K, then V: K is done with when V is loaded
  TileRuns at_;
  int lo_, hi_;
};

}  // namespace
}  // namespace ttsk::TTSK_ISA
