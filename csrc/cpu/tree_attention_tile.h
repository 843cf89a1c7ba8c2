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
      : dim_(p.head_dim), v_dim_(p.v_dim), head_(head), packed_(p.packed) {
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
      const int end = hi - b * kBlock < kBlock ? hi - b * kBlock : kBlock;
      Run* runs = runs_[b];
      int n = 0;
      for (int at = 0; at < end;) {
        runs[n] = cursor.Take(end - at);
        runs[n].at = at;
        at += runs[n].count;
        n += runs[n].count > 0;
      }
      num_runs_[b] = n;
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

  // The pages of the tile at `cursor` (segments end at `last`), to be fetched into L2 while this one is in use.
  void SetNext(SegCursor cursor, const PlanSeg* last, int64_t head) {
    num_next_ = 0;
    if (!packed_) return;
    next_k_ = k_ + (head - head_) * ks_.head;
    next_v_ = v_ + (head - head_) * vs_.head;
    for (int b = 0; b < kTileBlocks && cursor.seg < last; ++b) {
      next_[num_next_++] = cursor.seg->page;
      for (int left = kBlock; left > 0 && cursor.seg < last;) left -= cursor.Take(left).count;
    }
  }
  // The share of that which falls to one of `parts` equal stretches of computation.
  void Prefetch(int64_t part, int64_t parts) const {
    const int64_t k_lines = kBlock * dim_ * sizeof(T) / 64, page_lines = kBlock * (dim_ + v_dim_) * sizeof(T) / 64;
    const int64_t lines = num_next_ * page_lines, end = lines * (part + 1) / parts;
    for (int64_t i = lines * part / parts; i < end; ++i) {
      const int64_t page = next_[i / page_lines], line = i % page_lines;
      const bool is_k = line < k_lines;
      const T* base = is_k ? next_k_ + page * ks_.page : next_v_ + page * vs_.page;
      __builtin_prefetch(reinterpret_cast<const char*>(base) + (is_k ? line : line - k_lines) * 64, 0, 2);
    }
  }

  void LoadV(Tile<E>* tile) {
    for (int b = lo_ / kBlock; b * kBlock < hi_; ++b) {
      const int end = hi_ - b * kBlock < kBlock ? hi_ - b * kBlock : kBlock;
      E* v = scratch_ + b * kBlock * v_dim_;
      tile->v[b] = v;
      const T* page = v_ + runs_[b][0].page * vs_.page;
      if (!Aligned(b) || (kInPlace && end % kPack != 0)) {
        GatherV(runs_[b], num_runs_[b], end, v);
      } else if constexpr (kInPlace) {
        tile->v[b] = page;
      } else {
        for (int t = 0; t < end; t += kPoolPack) ExpandRow(page + t * v_dim_, v + t * v_dim_, v_dim_);
      }
    }
  }

 private:
  // Block b is (the beginning of) one packed page.
  bool Aligned(int b) const { return packed_ && num_runs_[b] == 1 && runs_[b][0].slot == 0; }

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

  void GatherV(const Run* runs, int n, int end, E* to) const {
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
    if constexpr (kPack == 2) {  // the odd half of the last pair is multiplied by p = 0, so it must be finite
      if (end % 2 != 0)
        for (int64_t col = 0; col < v_dim_; ++col) to[(end / 2 * v_dim_ + col) * 2 + 1] = E{};
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
  int64_t dim_, v_dim_, head_;
  bool packed_;
  E* scratch_;  // K, then V: K is done with when V is loaded, and the lines are still in L1
  Run runs_[kTileBlocks][kBlock];
  int num_runs_[kTileBlocks], lo_, hi_, num_next_ = 0;
  int32_t next_[kTileBlocks];
  const T* next_k_;
  const T* next_v_;
};

}  // namespace
}  // namespace ttsk::TTSK_ISA
