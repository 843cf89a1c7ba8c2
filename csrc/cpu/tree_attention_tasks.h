// What a call of tree attention is divided into, and how its threads share that. Included by kernels/tree_attention.cpp.
#pragma once

#include <atomic>

#include "tree_attention_layout.h"
#include "tree_attention_tile.h"

namespace ttsk::TTSK_ISA {
namespace {

// What the rows of a task see: positions from the least `first` to the greatest `end` at all, from the greatest first to the
// least end each of them.
struct Sight {
  int32_t first, last_first, first_end, end;
};

// A tile: the position of its first token, the tokens [lo, hi) that some row sees, and whether some row does not see all.
struct TileView {
  int32_t pos;
  int lo, hi;
  bool masked;
};

// Where the next tile begins, and the tokens from there on; 0 if there is none.
struct Upcoming {
  SegCursor at;
  int32_t tokens;
  int64_t kv_head;
};

// Rows [row, row + rows) of an item, one kv head.
struct Task {
  const PlanItem* item;  // null: there is none
  const PlanSeg* seg;
  const PlanSeg* last;
  int64_t row, rows, kv_head;

  // The partial at segment `at`, of which `rest` tokens of the item are left.
  Upcoming PartialAt(const PlanSeg* at, int32_t rest) const { return {{at, 0}, at->left < rest ? at->left : rest, kv_head}; }
  Upcoming Begin() const { return item == nullptr ? Upcoming{} : PartialAt(seg, item->tokens); }
};

// Work that a thread takes at once if tasks are smaller: some microseconds.
constexpr double kClaimFlops = 1e6;

// A thread's tasks, taken from the shared counter a few small ones at a time: each taking waits until the thread's writes have
// left its core. Tasks only grow.
struct TaskQueue {
  const TreeAttentionParams& p;
  const TreeLayout& layout;
  std::atomic<int64_t>* shared;
  const PlanItem* items = reinterpret_cast<const PlanItem*>(PlanSection(p.plan, kFieldItems));
  const PlanSeg* segs = reinterpret_cast<const PlanSeg*>(PlanSection(p.plan, kFieldSegs));
  const int64_t tasks = layout.task_indptr[p.plan[kFieldNumItems]];
  int64_t item = 0, next = 0, end = 0;

  // {} when there are no more.
  Task Take() {
    if (next == end) Claim();
    if (next == end) return {};
    item = ItemOf(next);
    return At(next++);
  }
  // What Take is likely to return next; taking it already would keep large tasks from threads that have nothing to do.
  Task Guess() const {
    const int64_t task = next < end ? next : shared->load(std::memory_order_relaxed);
    return task < tasks ? At(task) : Task{};
  }

  int64_t ItemOf(int64_t task) const {
    int64_t at = item;
    while (layout.task_indptr[at + 1] <= task) ++at;
    return at;
  }
  Task At(int64_t task) const {
    const int64_t at = ItemOf(task), first = layout.task_indptr[at], blocks = Blocks(at), block = (task - first) % blocks;
    const PlanItem& it = items[at];
    const int64_t lo = it.row_n * block / blocks, hi = it.row_n * (block + 1) / blocks;
    const PlanSeg* seg = segs + it.seg_lo;
    return {&it, seg, seg + it.seg_n, it.row_lo + lo, hi - lo, (task - first) / blocks};
  }

  void Claim() {
    const double row_flops = 2.0 * (p.head_dim + p.v_dim) * p.q_heads / p.kv_heads;
    next = shared->load(std::memory_order_relaxed);
    do {
      end = next;
      double flops = 0.0;
      for (int64_t at = item; end < tasks && flops < kClaimFlops; ++end) {
        while (layout.task_indptr[at + 1] <= end) ++at;
        const PlanItem& it = items[at];
        flops += row_flops * it.row_n * (it.tokens + kTileTokens) / Blocks(at);
      }
    } while (end > next && !shared->compare_exchange_weak(next, end, std::memory_order_relaxed));
  }
  int64_t Blocks(int64_t at) const { return (layout.task_indptr[at + 1] - layout.task_indptr[at]) / p.kv_heads; }
};

}  // namespace
}  // namespace ttsk::TTSK_ISA
