// How tree attention divides its workspace: task counts, partial slots, and one scratch per thread. Levels share it, so
// everything here is sized for the largest element (float) and nothing here computes.
#pragma once

#include <cstdint>

#include "ttskernels/plan.h"
#include "ttskernels/tree_attention.h"

namespace ttsk {

constexpr int64_t kTreeMaxDim = 256;

// Tokens of a tile that a group of rows reads, and how many tiles of a partial it has read with this one.
struct GroupRange {
  int32_t lo, hi, tiles;

  bool Begins() const { return tiles == 1; }  // nothing is in its outputs yet
};

struct TreeScratch {
  void* q;         // [q rows, head_dim]
  void* tile;      // K, then V of a 64-token tile
  void* state;     // [q rows] of 16 bytes
  float* sums;     // [q rows, 16]
  void* weights;   // [q rows, 64] p of one tile
  float* row_scale;     // [q rows] of q and the scores, over fixed-point pages
  float* weight_scale;  // [q rows] of p of one tile, there
  GroupRange* ranges;
  float* o;        // [q rows, v_dim]
  float* fold_ml;  // [q rows, 2]
  float* fold_o;   // [q rows, v_dim]
};

struct TreeLayout {
  int32_t* block_indptr;  // [items + 1] blocks of at most block_rows rows before each item
  int8_t* direct;         // [rows] 1: some item writes this plan row's output itself
  float* slot_ml;         // [kv_heads, slots, q heads of a group, 2]
  float* slot_o;          // [kv_heads, slots, q heads of a group, v_dim]
  char* scratch;
  int64_t scratch_bytes, q_rows, head_dim, v_dim, bytes;
  int threads;

  // Lays out and, if workspace is given, fills task_indptr and direct. O(items + rows).
  TreeLayout(const TreeAttentionParams& p, void* workspace);
  TreeScratch Scratch(int thread) const;
  // K or V of a tile; gathering K stores whole vectors past the end.
  int64_t TileElements() const { return kTileTokens * (head_dim > v_dim ? head_dim : v_dim) + 64; }
};

}  // namespace ttsk
