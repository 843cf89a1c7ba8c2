// Random trees of KV nodes, and plans over them.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "ttskernels/plan_build.h"

namespace ttsk::testing {

struct Place {
  int32_t page, slot;
  bool operator==(const Place& other) const { return page == other.page && slot == other.slot; }
};

// Nodes with their pages, and query rows. A node below a split begins inside its parent's last page.
struct Tree {
  int32_t page_size, num_pages = 0;
  std::vector<int32_t> parent, length, capacity, cached, first_offset, indptr{0}, pages, row_node, row_pos;

  int32_t Pos0(int32_t v) const { return parent[v] < 0 ? 0 : Pos0(parent[v]) + length[parent[v]]; }
  // Where the token at an absolute position of the path to `v` is.
  Place Of(int32_t v, int32_t position) const {
    while (position < Pos0(v)) v = parent[v];
    const int32_t at = first_offset[v] + position - Pos0(v);
    return {pages[indptr[v] + at / page_size], at % page_size};
  }
  std::vector<int32_t> Packed() const {
    std::vector<int32_t> out{static_cast<int32_t>(parent.size()), static_cast<int32_t>(row_node.size()),
                             static_cast<int32_t>(pages.size()), page_size};
    for (const auto* part : {&parent, &length, &capacity, &cached, &first_offset, &indptr, &pages, &row_node, &row_pos}) {
      out.insert(out.end(), part->begin(), part->end());
    }
    return out;
  }
};

// A forest of one or two trees whose leaves have a row at their last token, or several; lengths around the edges of pages,
// tiles and, with `deep`, partials.
inline Tree RandomTree(Random& random, int32_t page_size, bool deep) {
  Tree t;
  t.page_size = page_size;
  std::vector<bool> leaf, tail_taken;
  std::vector<int32_t> free;
  const int32_t nodes = static_cast<int32_t>(random.Between(1, 12)), most = 4096;
  for (int32_t i = 0; i < most; ++i) free.push_back(i);
  for (int32_t i = 0; i < 600; ++i) std::swap(free[i], free[i + random.Below(most - i)]);
  for (int32_t v = 0; v < nodes; ++v) {
    const int32_t parent = v == 0 || random.Chance(0.05) ? -1 : static_cast<int32_t>(random.Below(v));
    t.parent.push_back(parent);
    int32_t length = static_cast<int32_t>(random.Pick<int64_t>({1, 2, 15, 16, 17, 40, 64, 70}));
    if (deep && parent < 0) length = static_cast<int32_t>(random.Pick<int64_t>({511, 512, 513, 600, 1100}));
    t.length.push_back(length);
    leaf.push_back(true), tail_taken.push_back(false);
    if (parent >= 0) leaf[parent] = false;
  }
  size_t next = 0;
  for (int32_t v = 0; v < nodes; ++v) {
    const int32_t p = t.parent[v];
    int32_t offset = 0;
    if (p >= 0 && !tail_taken[p] && random.Chance(0.3)) offset = (t.first_offset[p] + t.length[p]) % page_size;
    if (offset != 0) {  // the lower half of a split
      tail_taken[p] = true;
      t.pages.push_back(t.pages[t.indptr[p] + (t.first_offset[p] + t.length[p] - 1) / page_size]);
    }
    const int32_t slack = leaf[v] ? static_cast<int32_t>(random.Below(2 * page_size + 2)) : 0;
    const int32_t need = (offset + t.length[v] + slack + page_size - 1) / page_size - (offset != 0);
    for (int32_t i = 0; i < need; ++i) t.pages.push_back(free[next++]);
    t.first_offset.push_back(offset), t.indptr.push_back(static_cast<int32_t>(t.pages.size()));
    t.capacity.push_back(leaf[v] ? t.length[v] + slack : t.length[v]);
    t.cached.push_back(t.length[v]);
  }
  t.num_pages = most;
  for (int32_t v = 0; v < nodes; ++v) {
    if (!leaf[v]) continue;
    const int32_t count = random.Chance(0.7) ? 1 : static_cast<int32_t>(random.Between(1, t.length[v]));
    t.cached[v] = t.length[v] - count;  // their K, V are written by this very plan
    for (int32_t i = t.length[v] - count; i < t.length[v]; ++i) {
      t.row_node.push_back(v), t.row_pos.push_back(t.Pos0(v) + i);
    }
  }
  for (size_t i = t.row_node.size(); i > 1; --i) {  // any caller's order
    const size_t j = random.Below(static_cast<int64_t>(i));
    std::swap(t.row_node[i - 1], t.row_node[j]), std::swap(t.row_pos[i - 1], t.row_pos[j]);
  }
  return t;
}

inline PlanCosts RandomCosts(Random& random, int64_t group) {
  const double workers = random.Pick({1.0, 2.0, 5.0}), queues = random.Chance(0.5) ? 1.0 : workers;
  return {random.Pick({0.1, 2.0, 50.0}), random.Pick({0.001, 0.1}), random.Pick({0.0001, 0.01}), random.Pick({0.001, 0.5}),
          random.Pick({0.5, 20.0}), static_cast<double>(group), 6, std::max(1.0, std::floor(192.0 / group)), 2, workers,
          4 * workers, queues, 0, queues == 1.0 && random.Chance(0.7) ? 1.0 : 0.0};
}

// A plan buffer as ttskernels/kv/plan_layout.py lays it out.
inline std::vector<int32_t> BuildPlan(const std::vector<int32_t>& packed, const PlanCosts& costs) {
  Planner planner;
  planner.Build(TreeSpec(packed.data()), costs);
  const auto cap = [](int32_t n) {
    int32_t c = 16;
    while (c < n) c *= 2;
    return c;
  };
  const int32_t rows = cap(planner.rows()), items = cap(planner.items()), segs = cap(planner.segs()), merges = cap(planner.merges());
  const int32_t queues = static_cast<int32_t>(costs.queues);
  const int32_t sizes[] = {rows, rows, rows, 4 * rows, 8 * items, 4 * segs, rows + 1, merges, queues + 1};
  std::vector<int32_t> plan(kPlanHeaderInts, 0);
  int32_t at = kPlanHeaderInts, field = kFieldRowPos;
  for (const int32_t size : sizes) plan[field++] = at, at += (size + 15) / 16 * 16;
  plan[kFieldMagic] = kPlanMagic, plan[kFieldVersion] = kPlanVersion, plan[kFieldTotalInts] = at;
  plan[kFieldNumWorkers] = queues;
  plan[kFieldCapRows] = rows, plan[kFieldCapItems] = items, plan[kFieldCapSegs] = segs, plan[kFieldCapMerges] = merges;
  plan.resize(at, -7);
  planner.Write(plan.data());
  return plan;
}

}  // namespace ttsk::testing
