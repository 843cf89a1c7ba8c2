// The planner's last steps: where items write, who runs them, where new tokens go, and the buffer.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "ttskernels/plan_build.h"

namespace ttsk {

// Slots and merge lists. Items are in root-to-leaf order for every row.
void Planner::AssignSlots() {
  const int32_t rows = static_cast<int32_t>(perm_.size());
  num_slots_ = 0;
  merge_indptr_.assign(rows + 1, 0);
  merge_slots_.clear();
  if (walks_) return;
  parts_.assign(rows, 0);
  for (const Item& item : items_) {
    for (int32_t r = item.row_lo; r < item.row_lo + item.row_n; ++r) ++parts_[r];
  }
  for (Item& item : items_) {
    bool direct = item.pos0 == 0;
    for (int32_t r = item.row_lo; direct && r < item.row_lo + item.row_n; ++r) direct = parts_[r] == 1;
    if (direct) continue;
    int32_t groups = Folds() || item.pos0 == 0;
    if (groups == 0) {
      groups = 1;
      for (int32_t s = item.seg_lo + 1; s < item.seg_lo + item.seg_n; ++s) groups += Starts(s);
    }
    item.slot = num_slots_;
    num_slots_ += groups * item.row_n;
    for (int32_t r = item.row_lo; r < item.row_lo + item.row_n; ++r) merge_indptr_[r + 1] += groups;
  }
  std::partial_sum(merge_indptr_.begin(), merge_indptr_.end(), merge_indptr_.begin());
  merge_cursor_.assign(merge_indptr_.begin(), merge_indptr_.end() - 1);
  merge_slots_.resize(merge_indptr_[rows]);
  for (size_t i = 0; i < items_.size(); ++i) {
    const Item& item = items_[i];
    if (item.slot < 0) continue;
    int32_t end = num_slots_;  // the next item with slots starts where this one ends
    for (size_t j = i + 1; j < items_.size(); ++j) {
      if (items_[j].slot >= 0) {
        end = items_[j].slot;
        break;
      }
    }
    for (int32_t slot = item.slot; slot < end; slot += item.row_n) {
      for (int32_t r = 0; r < item.row_n; ++r) merge_slots_[merge_cursor_[item.row_lo + r]++] = slot + r;
    }
  }
}

// Most expensive item or walk first, where items fold the large ones before the small; longest processing time first over the
// queues.
void Planner::AssignQueues() {
  const int32_t n = static_cast<int32_t>(items_.size()), queues = static_cast<int32_t>(costs_.queues);
  order_.resize(n);
  std::iota(order_.begin(), order_.end(), 0);
  std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) {
    const Item &first = items_[a], &second = items_[b];
    return first.cost != second.cost ? first.cost > second.cost : first.walk < second.walk;
  });
  large_items_ = 0;
  if (Folds()) {
    const auto large = [&](int32_t i) { return items_[i].row_n * costs_.group > costs_.tile_rows; };
    large_items_ = static_cast<int32_t>(std::stable_partition(order_.begin(), order_.end(), large) - order_.begin());
  }
  worker_indptr_.assign(queues + 1, 0);
  worker_indptr_[queues] = n;
  if (queues == 1) return;
  std::vector<std::pair<double, int32_t>> heap(queues);
  for (int32_t q = 0; q < queues; ++q) heap[q] = {0.0, q};
  const auto later = [](const auto& a, const auto& b) { return a > b; };
  queue_.resize(n);
  for (int32_t i = 0; i < n; ++i) {
    std::pop_heap(heap.begin(), heap.end(), later);
    auto& [load, q] = heap.back();
    queue_[order_[i]] = q;
    load += items_[order_[i]].cost;
    std::push_heap(heap.begin(), heap.end(), later);
  }
  std::stable_sort(order_.begin(), order_.end(), [&](int32_t a, int32_t b) { return queue_[a] < queue_[b]; });
  for (int32_t q = 0, i = 0; q < queues; ++q) {
    worker_indptr_[q] = i;
    while (i < n && queue_[order_[i]] == q) ++i;
  }
}

void Planner::SetRowTargets(const TreeSpec& spec) {
  row_slot_.resize(spec.rows);
  row_leaf_.resize(4 * static_cast<size_t>(spec.rows));
  for (int32_t r = 0; r < spec.rows; ++r) {
    const int32_t v = spec.row_node[r];
    const Node& node = nodes_[v];
    int32_t token = spec.row_pos[r] - node.pos0;
    const int32_t at = spec.first_offset[v] + token, page = at / page_size_;
    row_slot_[r] = token < spec.cached[v] ? -1
                                          : spec.pages[spec.page_indptr[v] + page] * page_size_ + at - page * page_size_;
    int32_t* leaf = &row_leaf_[4 * static_cast<size_t>(r)];
    leaf[0] = leaf[2] = -1;
    leaf[1] = leaf[3] = 0;
    if (!node.growing) continue;
    leaf[0] = node.seg_lo;
    leaf[2] = node.seg_lo + node.seg_n;
    for (; token >= segs_[leaf[0]].count; ++leaf[0]) token -= segs_[leaf[0]].count;
    leaf[1] = token;
  }
}

void Planner::Write(int32_t* plan) const {
  plan[kFieldPageSize] = page_size_;
  plan[kFieldNumRows] = rows();
  plan[kFieldNumItems] = items();
  plan[kFieldNumSegs] = segs();
  plan[kFieldNumSlots] = num_slots_;
  plan[kFieldNumMerges] = merges();
  int32_t breaks = 0;
  for (int32_t s = 1; s < segs(); ++s) breaks += !Starts(s) && segs_[s].page != segs_[s - 1].page + 1;
  plan[kFieldPageBreaks] = breaks;
  plan[kFieldLargeItems] = large_items_;
  const auto copy = [&](PlanField field, const auto& from) {
    if (!from.empty()) std::memcpy(PlanSection(plan, field), from.data(), from.size() * sizeof(from[0]));
  };
  copy(kFieldRowPos, input_pos_);
  copy(kFieldRowSlot, row_slot_);
  copy(kFieldRowPerm, perm_);
  copy(kFieldRowLeaf, row_leaf_);
  copy(kFieldSegs, segs_);
  copy(kFieldMergeIndptr, merge_indptr_);
  copy(kFieldMergeSlots, merge_slots_);
  copy(kFieldWorkerIndptr, worker_indptr_);
  auto* out = reinterpret_cast<PlanItem*>(PlanSection(plan, kFieldItems));
  int32_t walk = -1, followers = 0;
  for (const int32_t i : order_) {
    const Item& item = items_[i];
    int32_t flags = Folds() || walks_ || item.pos0 == 0 ? kFold : 0;
    if (walks_ && item.walk == walk) flags |= kFollows, ++followers;
    walk = item.walk;
    *out++ = {item.row_lo, item.row_n, item.seg_lo, item.seg_n, item.pos0, item.slot, flags, item.tokens};
  }
  plan[kFieldFollowers] = followers;
}

}  // namespace ttsk
