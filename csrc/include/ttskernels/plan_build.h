// The planner: a tree of nodes and query rows in, a plan (plan.h) out. Torch-free, single-threaded.
// Its definition in Python, with the reasons, is ttskernels/kv/plan_reference.py: both give equal buffers.
#pragma once

#include <cstdint>
#include <vector>

#include "ttskernels/plan.h"

namespace ttsk {

// Microseconds of one worker; the twin of Costs in ttskernels/kv/plan_layout.py, same order, all double.
struct PlanCosts {
  double item_us, byte_us, flop_us, partial_us, min_piece_us;
  double group, tile_rows, block_rows, kv_heads, workers, tasks, queues, fold, walks;
};

// One int32 array: {nodes, rows, pages, page_size}, then parent, length, capacity, cached, first_offset [nodes],
// page_indptr [nodes + 1], pages, row_node, row_pos [rows]. Parents come before their children; the caller has checked.
struct TreeSpec {
  explicit TreeSpec(const int32_t* packed);
  int32_t nodes, rows, num_pages, page_size;
  const int32_t *parent, *length, *capacity, *cached, *first_offset, *page_indptr, *pages, *row_node, *row_pos;
};

// Build() computes a plan into scratch that is reused by the next call; Write() copies it to a buffer whose header
// already holds capacities and section offsets. O(rows * depth of the plan + segments).
class Planner {
 public:
  void Build(const TreeSpec& spec, const PlanCosts& costs);
  void Write(int32_t* plan) const;
  int32_t rows() const { return static_cast<int32_t>(perm_.size()); }
  int32_t items() const { return static_cast<int32_t>(order_.size()); }
  int32_t segs() const { return static_cast<int32_t>(segs_.size()); }
  int32_t merges() const { return static_cast<int32_t>(merge_slots_.size()); }
  int32_t slots() const { return num_slots_; }
  int64_t unique_tokens() const { return unique_tokens_; }
  int64_t flat_tokens() const { return flat_tokens_; }
  double modelled_us() const { return modelled_us_; }
  double flat_us() const { return flat_us_; }

 private:
  struct Node {
    int32_t parent, length, pos0, own, reach, total, row_lo, cursor, seen, extent;
    int32_t seg_lo, seg_n;  // its segments in the first chain that has them; seg_lo -1: none yet
    bool leaf, growing, pushed, flat_tree;
    int32_t walk_lo, walk_rows, walk;  // of its tree's walks: first row, rows of each, number of the first
    // Of the items that would take in a node above (see choose() in plan_reference.py).
    int64_t empty, records, open_rows;
    double front_cost, rate, flat_rate, done, flat;
  };
  struct Item {
    int32_t row_lo, row_n, seg_lo, seg_n, pos0, tokens, slot;
    int32_t walk;  // its number, -1: it is one by itself
    double cost;   // of the whole walk
    bool growing;
  };

  bool Folds() const { return costs_.fold != 0; }
  int32_t PartialTokens() const { return Folds() ? 1 << 30 : kPartialTokens; }
  bool Starts(int32_t s) const { return s == 0 || segs_[s - 1].left == segs_[s - 1].count; }
  double BlockRate(int64_t rows) const;
  double RowRate(int64_t rows) const;
  int64_t Blocks(int64_t rows) const;
  void Measure(const TreeSpec& spec);
  void SortRows(const TreeSpec& spec);
  void Choose();
  void AppendSegs(const TreeSpec& spec, int32_t v);
  bool MakeWalks(const TreeSpec& spec);
  void MakeItems(const TreeSpec& spec);
  void TrimItem(Item* item, int32_t last) const;
  void SplitItems();
  void CutIntoRuns();
  void AssignSlots();
  void AssignQueues();
  void SetRowTargets(const TreeSpec& spec);

  PlanCosts costs_{};
  int32_t page_size_ = 0, num_slots_ = 0, large_items_ = 0;
  bool walks_ = false;
  int64_t unique_tokens_ = 0, flat_tokens_ = 0;
  double modelled_us_ = 0, flat_us_ = 0;
  std::vector<Node> nodes_;
  std::vector<Item> items_, split_;
  std::vector<PlanSeg> segs_;
  std::vector<int32_t> perm_, pos_, input_pos_, row_slot_, row_leaf_, parts_, chain_, cuts_;
  std::vector<double> cost_;
  std::vector<int32_t> order_, merge_indptr_, merge_cursor_, merge_slots_, queue_, worker_indptr_;
};

// The packed tree of `count` sequences over block tables [count, width], rows the last `queries[b]` tokens of each; every
// token is cached. `packed` holds 5 + 12 * count + pages + 2 * rows int32; returns how many are used. The caller checks.
int64_t TreeFromBlockTables(const int32_t* table, const int32_t* lens, const int32_t* queries, int32_t count,
                            int32_t width, int32_t page_size, int32_t* packed);

}  // namespace ttsk
