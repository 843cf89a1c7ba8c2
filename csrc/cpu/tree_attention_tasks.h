// What a call of tree attention is divided into, and how its threads share that. Included by kernels/tree_attention.cpp.
#pragma once

#include <atomic>
#include <utility>
#include <vector>

#include "tree_attention_layout.h"
#include "tree_attention_tile.h"
#include "ttskernels/threads.h"

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

// Rows [row, row + rows) of a walk, one kv head: an item, and those behind it that go on with its rows.
struct Task {
  const PlanItem* item;  // null: there is none
  const PlanItem* end;   // of the walk
  const PlanSeg* segs;
  int64_t row, rows, kv_head;

  // The partial at segment `at`, of which `rest` tokens of the item are left.
  Upcoming PartialAt(const PlanSeg* at, int32_t rest) const { return {{at, 0}, at->left < rest ? at->left : rest, kv_head}; }
  Upcoming Begin(const PlanItem* of) const { return PartialAt(segs + of->seg_lo, of->tokens); }
  Upcoming Begin() const { return item == nullptr ? Upcoming{} : Begin(item); }
  // [first, second): those of its plan rows that an item of the walk has.
  std::pair<int64_t, int64_t> RowsOf(const PlanItem& of) const {
    const int64_t of_end = of.row_lo + of.row_n, task_end = row + rows;
    return {of.row_lo > row ? of.row_lo : row, of_end < task_end ? of_end : task_end};
  }
  // The next item of the walk that has some of its rows; null: there is none.
  const PlanItem* After(const PlanItem* of) const {
    while (++of < end) {
      const auto [lo, hi] = RowsOf(*of);
      if (lo < hi) return of;
    }
    return nullptr;
  }
};

// Work that a thread takes at once if tasks are smaller: some microseconds.
constexpr double kClaimFlops = 1e6;
// A task of fewer q rows waits for memory: it takes as long as one of so many.
constexpr int64_t kMemoryRows = 16;

// The kv heads that a thread takes first: its share of them, with those that it has a part of.
struct HeadRange {
  HeadRange(int64_t heads, int index, int count)
      : first(index * heads / count), end(((index + 1) * heads + count - 1) / count) {}
  int64_t first, end;
};

// The tasks of a call: for each kv head the blocks of all walks, most expensive first, and which of them are left. Where a
// head has fewer blocks than threads have a part of it, each block's rows are divided among them.
class TaskList {
 public:
  TaskList(const TreeAttentionParams& p, const TreeLayout& tree)
      : layout(tree), items(reinterpret_cast<const PlanItem*>(PlanSection(p.plan, kFieldItems))),
        items_end(items + p.plan[kFieldNumItems]),
        segs(reinterpret_cast<const PlanSeg*>(PlanSection(p.plan, kFieldSegs))), heads(p.kv_heads), head_(p.kv_heads),
        group_(p.q_heads / p.kv_heads), width_(p.head_dim + p.v_dim) {
    for (int thread = 0; thread < layout.threads; ++thread) {
      const HeadRange own(heads, thread, layout.threads);
      for (int64_t head = own.first; head < own.end; ++head) ++head_[head].parts;
    }
    const int64_t blocks = layout.block_indptr[items_end - items];
    for (Head& head : head_) head.parts = head.parts > blocks && blocks > 0 ? (head.parts + blocks - 1) / blocks : 1;
  }
  // A walk is an item and those that go on with its rows.
  const PlanItem* WalkEnd(const PlanItem* item) const {
    while (++item < items_end && (item->flags & kFollows) != 0) {}
    return item;
  }
  // Of a block of the walk that item number `item` begins.
  double Flops(int64_t item) const {
    const int64_t blocks = Blocks(item);
    int64_t result = 0;
    for (const PlanItem *it = items + item, *end = WalkEnd(it); it < end; ++it) {
      const int64_t rows = it->row_n * group_ / blocks;
      result += (rows > kMemoryRows ? rows : kMemoryRows) * (it->tokens + kTileTokens);
    }
    return 2.0 * static_cast<double>(width_ * result);
  }
  int64_t Blocks(int64_t item) const { return layout.block_indptr[item + 1] - layout.block_indptr[item]; }
  int64_t Parts(int64_t head) const { return head_[head].parts; }
  // Tasks of a head, and the first one that is left.
  int64_t End(int64_t head) const { return layout.block_indptr[items_end - items] * head_[head].parts; }
  int64_t Next(int64_t head) const { return head_[head].next.load(std::memory_order_relaxed); }
  // take gives, of the first one left, the first left afterwards; it is called again when others were faster.
  template <typename F>
  void Claim(int64_t head, F take) {
    std::atomic<int64_t>& next = head_[head].next;
    int64_t first = next.load(std::memory_order_relaxed);
    while (!next.compare_exchange_weak(first, take(first), std::memory_order_relaxed)) {}
  }

  const TreeLayout& layout;
  const PlanItem* items;
  const PlanItem* items_end;
  const PlanSeg* segs;
  const int64_t heads;

 private:
  struct Head {
    alignas(64) std::atomic<int64_t> next{0};
    int64_t parts = 0;  // of each block
  };

  std::vector<Head> head_;
  int64_t group_, width_;
};

// A thread's tasks, a few small ones at a time: each taking waits until the thread's writes have left its core. First those of
// its own heads, odd threads from the last one down, so that two threads come to one that they share at the end; then those of
// others. A thread merges the records of its own heads afterwards.
class TaskQueue {
 public:
  TaskQueue(TaskList* list, const Member& me) : list_(list), down_(me.index % 2 == 1) {
    const HeadRange own(list->heads, me.index, me.count);
    own_ = own.end - own.first - 1;
    head_ = down_ ? own.end - 1 : own.first;
  }

  // {} when there are no more.
  Task Take() {
    while (next_ == end_ && !Claim()) {
      if (!NextHead()) return {};
    }
    item_ = ItemOf(next_);
    return At(next_++);
  }
  // What Take is likely to return next; taking it already would keep large tasks from threads that have nothing to do.
  Task Guess() const {
    const int64_t next = next_ != end_ ? next_ : list_->Next(head_);
    return next < list_->End(head_) ? At(next) : Task{};
  }

 private:
  // Of the other heads the one with most left, when all of its own are done.
  bool NextHead() {
    if (own_-- > 0) {
      head_ += down_ ? -1 : 1;
      return true;
    }
    int64_t most = 0;
    for (int64_t head = 0; head < list_->heads; ++head) {
      const int64_t left = list_->End(head) - list_->Next(head);
      if (left > most) most = left, head_ = head;
    }
    return most > 0;
  }

  // Takes some of the head's tasks: [next_, end_). Whether there were any.
  bool Claim() {
    const int64_t hint = item_, end = list_->End(head_);
    list_->Claim(head_, [&](int64_t first) {
      item_ = hint;
      next_ = end_ = first;
      for (double flops = 0.0; end_ < end && flops < kClaimFlops; ++end_) flops += list_->Flops(item_ = ItemOf(end_));
      return end_;
    });
    return next_ != end_;
  }

  int64_t ItemOf(int64_t number) const {
    const int64_t block = number / list_->Parts(head_);
    int64_t at = item_;
    while (list_->layout.block_indptr[at + 1] <= block) ++at;
    while (list_->layout.block_indptr[at] > block) --at;
    return at;
  }
  Task At(int64_t number) const {
    const int64_t at = ItemOf(number), parts = list_->Parts(head_), blocks = list_->Blocks(at) * parts;
    const int64_t block = number - list_->layout.block_indptr[at] * parts;
    const PlanItem& it = list_->items[at];
    const int64_t lo = it.row_n * block / blocks, hi = it.row_n * (block + 1) / blocks;
    return {&it, list_->WalkEnd(&it), list_->segs, it.row_lo + lo, hi - lo, head_};
  }

  TaskList* list_;
  bool down_;
  int64_t head_, own_, item_ = 0, next_ = 0, end_ = 0;
};

}  // namespace
}  // namespace ttsk::TTSK_ISA
