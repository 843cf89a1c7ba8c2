// The plan: one packed int32 buffer that tells the attention kernels (CPU and GPU) which queries read which KV, and
// where each row's new token is written. Built by the planner when the tree changes; advanced once per decode
// iteration. Torch-free. The NumPy twin of this layout is ttskernels/kv/plan.py.
//
// A "row" is one query token. Rows keep the caller's order in row_pos / row_slot / row_leaf; items and merges use plan
// order (DFS over the forest, so that every node's rows are one interval), and row_perm maps plan row -> caller row.
//
// Visibility is by position alone: a row at absolute position p sees the tokens of its path at positions
// max(0, p - window + 1) .. p. A segment's `count` may reach past p (slack to the end of the reserved pages, or the
// causal part of a prefill); kernels clip at p. So advancing a plan is `row_pos += 1` and the next row_slot.
//
// Numerics: a "partial" begins at an item's first segment and where the one before ended (left == count): at a node's
// first token and every 512th token of a node. It starts from a fresh accumulator, runs in KV tiles of 64 tokens counted
// from its first token, and partials are merged left to right, root to leaf. Within a partial every segment but the first
// starts at slot 0 of its page, and every one but the last ends at the end of its page: the GPU finds a token's segment by
// division. An item with kFold covers its rows' paths from the root on and folds its partials as it goes; any other item
// writes each partial to its own slot. Which items exist therefore never changes a result's bits.
// An item with kFollows goes on with some of the rows of the item in front, root to leaf, where that one left their fold: an
// item and all that follow it are a walk, which writes its rows' results, or records, once. Only plans for a CPU have such.
// Plans for a GPU (PlanCosts.fold) fold in every item, one record a row and item; a node is one partial, which items may
// cut between any two segments. There, which items exist may show in the last bits. Where a page does not follow the one in
// front, and such breaks are kRunTokens tokens apart or more on average, each run of pages is a partial: kernels then read
// boxes of rows (TMA), else they gather.
#pragma once

#include <cstdint>

namespace ttsk {

constexpr int32_t kPlanMagic = 0x4b535454;  // "TTSK"
constexpr int32_t kPlanVersion = 1;
constexpr int32_t kPartialTokens = 512;
constexpr int32_t kTileTokens = 64;
constexpr int32_t kRunTokens = 64;

enum PlanField : int {
  kFieldMagic = 0,
  kFieldVersion = 1,
  kFieldTotalInts = 2,   // capacity of the whole buffer
  kFieldPageSize = 3,
  kFieldNumRows = 4,
  kFieldNumItems = 5,
  kFieldNumSegs = 6,
  kFieldNumSlots = 7,    // partial records that the items write
  kFieldNumMerges = 8,   // entries of merge_slots
  kFieldNumWorkers = 9,
  kFieldCapRows = 10,
  kFieldCapItems = 11,
  kFieldCapSegs = 12,
  kFieldCapMerges = 13,
  // Offsets of the sections, in int32 from the start of the buffer.
  kFieldRowPos = 14,      // [rows] absolute position of the row's token
  kFieldRowSlot = 15,     // [rows] page * page_size + slot where the row's K, V go; -1: already there, do not write
  kFieldRowPerm = 16,     // [rows] plan row -> caller row
  kFieldRowLeaf = 17,     // [rows * 4] {segment of row_slot, tokens used before it in that segment, end segment, 0}
  kFieldItems = 18,       // [items] PlanItem, most expensive first within a worker
  kFieldSegs = 19,        // [segs] PlanSeg
  kFieldMergeIndptr = 20, // [rows + 1] plan-row order; empty: the row has one direct item
  kFieldMergeSlots = 21,  // [merges] slots, root to leaf
  kFieldWorkerIndptr = 22,// [workers + 1] items of each worker with a list of its own; where there is one list, workers draw from it
  kFieldUncoveredRows = 23,  // rows that no item covers, whose result is 0 and -inf; the planner makes none
  kFieldPageBreaks = 24,  // segments that go on with a partial on a page that does not follow the one before
  kFieldLargeItems = 25,  // plans for a GPU: the first so many items have more (row, head of a group) pairs than a small tile
  kFieldFollowers = 26,   // items with kFollows
  kPlanHeaderInts = 32,
};

enum PlanItemFlags : int32_t { kFold = 1, kFollows = 2 };

struct PlanItem {
  int32_t row_lo, row_n;  // plan rows
  int32_t seg_lo, seg_n;
  int32_t pos0;           // absolute position of the first token of the first segment; segments are consecutive
  int32_t slot;           // first partial slot, or -1: one result per row, written to the output directly.
                          // Slot of (partial g, row r): slot + g * row_n + (r - row_lo); with kFold only g = 0 exists.
                          // Of an item with kFollows: -1.
  int32_t flags;
  int32_t tokens;         // sum of segment counts
};

struct PlanSeg {
  int32_t page, offset, count;  // tokens [offset, offset + count) of one page
  int32_t left;                 // tokens of its partial from its first token on
};

inline const int32_t* PlanSection(const int32_t* plan, PlanField field) { return plan + plan[field]; }
inline int32_t* PlanSection(int32_t* plan, PlanField field) { return plan + plan[field]; }

// One token further: row_pos += 1 and row_slot moves on. Returns the number of rows whose reserved slots are used up
// (0: advanced; otherwise nothing has changed and the caller reserves and builds a new plan). O(rows), no allocation.
int32_t PlanAdvance(int32_t* plan);

}  // namespace ttsk
