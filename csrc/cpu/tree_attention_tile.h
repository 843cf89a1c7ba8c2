// Loads 64-token KV tiles for tree attention: packed page blocks in place where they have the tile's element type, else
// expanded, gathered or transposed into a scratch of the same form. Included by kernels/tree_attention.cpp.
#pragma once

#include "tree_attention_micro.h"
#include "ttskernels/tree_attention.h"

namespace ttsk::TTSK_ISA {
namespace {

// Tokens [slot, slot + count) of one page, at [at, at + count) of a sixteen-token block.
struct Run {
  int32_t page, slot, count, at;
};

// Position in an item's segments.
struct SegCursor {
  const PlanSeg* seg;
  int32_t used;  // tokens of seg already passed

  Run Take(int32_t want) {
    const int32_t left = seg->count - used, n = want < left ? want : left;
    const Run run = {seg->page, seg->offset + used, n, 0};
    used += n;
    if (used == seg->count) ++seg, used = 0;
    return run;
  }
  void Skip(int32_t tokens) {
    while (tokens > 0) tokens -= Take(tokens).count;
  }
};

// Where the tokens of a tile are, block by block.
struct TileRuns {
  Run runs[kTileBlocks][kBlock];
  int count[kTileBlocks];

  // Tokens [16 * b, 16 * b + end) of block b, from the cursor on.
  void Take(SegCursor* cursor, int b, int end) {
    count[b] = 0;
    for (int at = 0; at < end;) {
      Run& run = runs[b][count[b]];
      run = cursor->Take(end - at);
      run.at = at;
      at += run.count;
      count[b] += run.count > 0;
    }
  }
  // Block b is (the beginning of) one page of sixteen slots.
  bool Aligned(int b) const { return count[b] == 1 && runs[b][0].slot == 0; }
};

// Calls found(b, page) for each block of a tile of at most `tokens` tokens; returns how many there are.
template <typename F>
int FindBlocks(SegCursor cursor, int32_t tokens, F found) {
  int b = 0;
  for (; b < kTileBlocks && b * kBlock < tokens; ++b) {
    found(b, cursor.seg->page);
    cursor.Skip(tokens - b * kBlock < kBlock ? tokens - b * kBlock : kBlock);
  }
  return b;
}

inline int BlockEnd(int b, int hi) { return hi - b * kBlock < kBlock ? hi - b * kBlock : kBlock; }

// Sixteen lanes of row i of a packed K block: element i of sixteen tokens.
inline Vec KRow(const float* k, int64_t i) { return Load(k + i * kBlock); }
inline Vec KRow(const Fp16* k, int64_t i) { return LoadAs(k + i * kBlock); }
inline Vec KRow(const Bf16* k, int64_t i) {
  const Pairs pairs = LoadPairs(k + i / 2 * 2 * kBlock);
  return i % 2 == 0 ? Even(pairs) : Odd(pairs);
}

template <typename T> struct PoolPack { static constexpr int kPack = 1; };
template <> struct PoolPack<Bf16> { static constexpr int kPack = 2; };

// T: element of the pool; E: element of the tile, T itself or float.
template <typename T, typename E>
class TileLoader {
 public:
  static constexpr int kPack = PoolPack<E>::kPack, kPoolPack = PoolPack<T>::kPack;
  static constexpr bool kInPlace = sizeof(E) == sizeof(T);

  TileLoader(const TreeAttentionParams& p, int64_t head, E* scratch)
      : dim_(p.head_dim), v_dim_(p.v_dim), packed_(p.packed) {
    ks_ = p.packed ? KvStrides{p.kv_heads * dim_ * kBlock, 0, dim_ * kBlock} : p.k_strides;
    vs_ = p.packed ? KvStrides{p.kv_heads * v_dim_ * kBlock, 0, v_dim_ * kBlock} : p.v_strides;
    k_ = static_cast<const T*>(p.k) + head * ks_.head;
    v_ = static_cast<const T*>(p.v) + head * vs_.head;
    scratch_ = scratch;
  }

  // The tile's tokens [0, hi), from the cursor on: K now, V (of which tokens before lo are not read) by LoadV.
  Tile<E> LoadK(SegCursor cursor, int lo, int hi) {
    Tile<E> tile;
    lo_ = lo, hi_ = hi;
    for (int b = 0; b * kBlock < hi; ++b) {
      at_.Take(&cursor, b, BlockEnd(b, hi));
      const Run* runs = at_.runs[b];
      const int n = at_.count[b];
      E* k = scratch_ + b * kBlock * dim_;
      tile.k[b] = k;
      if (Aligned(b)) {
        const T* page = k_ + runs[0].page * ks_.page;
        if constexpr (kInPlace) tile.k[b] = page;
        else for (int64_t i = 0; i < dim_; i += kPoolPack) ExpandRow(page + i * kBlock, k + i * kBlock, kBlock);
      } else if (packed_) {
        GatherK(runs, n, k);
      } else {
        TransposeK(runs, n, k);
      }
    }
    return tile;
  }

  void LoadV(Tile<E>* tile) {
    for (int b = lo_ / kBlock; b * kBlock < hi_; ++b) {
      const int begin = b == lo_ / kBlock ? lo_ % kBlock : 0, end = BlockEnd(b, hi_);
      E* v = scratch_ + b * kBlock * v_dim_;
      tile->v[b] = v;
      const T* page = v_ + at_.runs[b][0].page * vs_.page;
      if (!Aligned(b) || (kInPlace && (begin % kPack != 0 || end % kPack != 0))) {
        GatherV(at_.runs[b], at_.count[b], begin, end, v);
      } else if constexpr (kInPlace) {
        tile->v[b] = page;
      } else {
        for (int t = 0; t < end; t += kPoolPack) ExpandRow(page + t * v_dim_, v + t * v_dim_, v_dim_);
      }
    }
  }

  // Where pages used in place hold the first blocks of `tokens` tokens from the cursor on; how many were found.
  int Find(SegCursor cursor, int32_t tokens, Tile<E>* tile) const {
    if (!packed_ || !kInPlace) return 0;
    return FindBlocks(cursor, tokens, [&](int b, int64_t page) {
      tile->k[b] = reinterpret_cast<const E*>(k_ + page * ks_.page);
      tile->v[b] = reinterpret_cast<const E*>(v_ + page * vs_.page);
    });
  }

 private:
  bool Aligned(int b) const { return packed_ && at_.Aligned(b); }

  // One pool row of `n` lanes (pairs) to one (two) rows of the tile.
  static void ExpandRow(const float*, float*, int64_t) {}
  static void ExpandRow(const Fp16* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) Store(to + i, LoadAs(from + i));
  }
  static void ExpandRow(const Bf16* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Pairs pairs = LoadPairs(from + 2 * i);
      Store(to + i, Even(pairs));
      Store(to + n + i, Odd(pairs));
    }
  }

  // Block rows in ascending order, every run as a whole vector: what it writes too much, a later store replaces.
  void GatherK(const Run* runs, int n, E* to) const {
    for (int64_t i = 0; i < dim_; i += kPack) {
      for (int r = 0; r < n; ++r) {
        const T* row = k_ + runs[r].page * ks_.page + i / kPoolPack * kPoolPack * kBlock;
        T last[2 * kPoolPack * kBlock] = {};
        if (i + kPoolPack >= dim_) {  // a whole vector would read past the page
          std::memcpy(last, row, sizeof(T) * kPoolPack * kBlock);
          row = last;
        }
        row += runs[r].slot * kPoolPack;
        E* at = to + i * kBlock + runs[r].at * kPack;
        if constexpr (kInPlace) std::memcpy(at, row, sizeof(E) * kPack * kBlock);
        else Store(at, KRow(row, i % kPoolPack));
      }
    }
  }

  // Token-major rows to a K block, in units of kPack elements.
  void TransposeK(const Run* runs, int n, E* to) const {
    constexpr int kUnits = kLanes / kPack;
    for (int r = 0; r < n; ++r) {
      for (int t = 0; t < runs[r].count; ++t) {
        const T* row = k_ + runs[r].page * ks_.page + (runs[r].slot + t) * ks_.token;
        E* at = to + (runs[r].at + t) * kPack;
        for (int64_t i = 0; i < dim_; i += kLanes) {
          E lanes[kLanes];
          if constexpr (kInPlace) std::memcpy(lanes, row + i, sizeof(lanes));
          else Store(lanes, LoadAs(row + i));
          for (int u = 0; u < kUnits; ++u) {
            std::memcpy(at + (i + u * kPack) * kBlock, lanes + u * kPack, sizeof(E) * kPack);
          }
        }
      }
    }
  }

  // Sixteen columns of one token's V as floats, or as they are.
  Vec VRow(const T* page, int slot, int64_t col) const {
    if (!packed_) return LoadAs(page + slot * vs_.token + col);
    if constexpr (kPoolPack == 2) {
      const Pairs pairs = LoadPairs(page + (slot / 2 * v_dim_ + col) * 2);
      return slot % 2 == 0 ? Even(pairs) : Odd(pairs);
    } else {
      return LoadAs(page + slot * v_dim_ + col);
    }
  }

  void GatherV(const Run* runs, int n, int begin, int end, E* to) const {
    for (int r = 0; r < n; ++r) {
      const T* page = v_ + runs[r].page * vs_.page;
      for (int t = 0; t < runs[r].count; ++t) {
        const int slot = runs[r].slot + t, at = runs[r].at + t;
        for (int64_t col = 0; col < v_dim_; col += kLanes) {
          const Vec lanes = VRow(page, slot, col);
          if constexpr (kPack == 1) {
            StoreAs(to + at * v_dim_ + col, lanes);
          } else {
            PutV(to + (at / 2 * v_dim_ + col) * 2 + at % 2, lanes);
          }
        }
      }
    }
    if constexpr (kPack == 2) {  // other halves of the first and last pair are multiplied by p = 0, so they must be finite
      for (int64_t col = 0; col < v_dim_ && begin % 2 != 0; ++col) to[(begin / 2 * v_dim_ + col) * 2] = E{};
      for (int64_t col = 0; col < v_dim_ && end % 2 != 0; ++col) to[(end / 2 * v_dim_ + col) * 2 + 1] = E{};
    }
  }
  static void PutV(Bf16* to, Vec lanes) {
    Bf16 bits[kLanes];
    StoreAs(bits, lanes);
    for (int i = 0; i < kLanes; ++i) to[2 * i] = bits[i];
  }

  const T* k_;
  const T* v_;
  KvStrides ks_, vs_;
  int64_t dim_, v_dim_;
  bool packed_;
  E* scratch_;  // K, then V: K is done with when V is loaded
  TileRuns at_;
  int lo_, hi_;
};

}  // namespace
}  // namespace ttsk::TTSK_ISA
