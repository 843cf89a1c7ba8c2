#include <map>

#include "trees.h"
#include "ttskernels/plan.h"

namespace ttsk::testing {
namespace {

// Every row reads every token of its path once, where it is; partials have slots of their own, merged root to leaf.
void CheckCoverage(Checks& check, const Tree& tree, const std::vector<int32_t>& plan) {
  const int32_t* p = plan.data();
  const int32_t rows = p[kFieldNumRows];
  const auto* items = reinterpret_cast<const PlanItem*>(PlanSection(p, kFieldItems));
  const auto* segs = reinterpret_cast<const PlanSeg*>(PlanSection(p, kFieldSegs));
  const int32_t* perm = PlanSection(p, kFieldRowPerm);
  std::vector<std::map<int32_t, Place>> seen(rows);        // of each caller row: position -> place
  std::vector<std::map<int32_t, int32_t>> partials(rows);  // plan row: first position -> slot
  std::vector<int> direct(rows, 0), slot_used(p[kFieldNumSlots], 0), walked(rows, 0);  // walked: to this position
  const PlanItem* walk = nullptr;
  int32_t followers = 0;
  check.True(rows == static_cast<int32_t>(tree.row_node.size()), "another number of rows");
  for (int32_t i = 0; i < p[kFieldNumItems]; ++i) {
    const PlanItem& item = items[i];
    const bool follows = (item.flags & kFollows) != 0;
    if (!follows) walk = &item;
    followers += follows;
    check.True(item.row_lo >= walk->row_lo && item.row_lo + item.row_n <= walk->row_lo + walk->row_n, "rows of no walk");
    check.True(!follows || (item.flags & kFold) != 0, "a walk folds");
    for (int32_t r = item.row_lo; r < item.row_lo + item.row_n; ++r) {
      check.True(!follows || (item.slot == -1 && walked[r] == item.pos0), "a walk goes from root to leaf");
      walked[r] = item.pos0 + item.tokens;
      int32_t pos = item.pos0, partial = -1, total = 0;
      for (const PlanSeg* seg = segs + item.seg_lo; seg < segs + item.seg_lo + item.seg_n; ++seg) {
        total += seg->count;
        if (item.slot >= 0 && (partial < 0 || ((item.flags & kFold) == 0 && seg[-1].left == seg[-1].count))) {
          ++partial;
          const int32_t slot = item.slot + partial * item.row_n + r - item.row_lo;
          check.True(slot < p[kFieldNumSlots] && !slot_used[slot]++, "a slot is shared or out of range");
          partials[r][pos] = slot;
        }
        for (int32_t t = 0; t < seg->count; ++t, ++pos) {
          if (pos > tree.row_pos[perm[r]]) continue;
          check.True(seen[perm[r]].emplace(pos, Place{seg->page, seg->offset + t}).second, "a token is read twice");
        }
      }
      check.True(total == item.tokens, "an item's tokens are not its segments'");
      direct[r] += item.slot < 0 && !follows;
    }
  }
  check.True(followers == p[kFieldFollowers], "another number of followers");
  const int32_t* indptr = PlanSection(p, kFieldMergeIndptr);
  const int32_t* slots = PlanSection(p, kFieldMergeSlots);
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t row = perm[r], node = tree.row_node[row];
    check.True(p[p[kFieldRowPos] + row] == tree.row_pos[row], "row_pos");
    check.True(static_cast<int32_t>(seen[row].size()) == tree.row_pos[row] + 1, "not every token of the path is read");
    for (const auto& [pos, place] : seen[row]) check.True(place == tree.Of(node, pos), "a token is read in another place");
    const Place own = tree.Of(node, tree.row_pos[row]);
    const bool written = tree.row_pos[row] - tree.Pos0(node) >= tree.cached[node];
    check.True(p[p[kFieldRowSlot] + row] == (written ? own.page * tree.page_size + own.slot : -1), "row_slot");
    const int32_t merges = indptr[r + 1] - indptr[r];
    check.True(direct[r] == 1 ? merges == 0 && partials[r].empty() : direct[r] == 0 && merges > 0, "direct or merged, not both");
    std::vector<int32_t> in_order;
    for (const auto& [pos, slot] : partials[r]) in_order.push_back(slot);
    check.True(std::equal(in_order.begin(), in_order.end(), slots + indptr[r], slots + indptr[r + 1]), "merges root to leaf");
  }
}

}  // namespace

TTSK_TEST(planner) {
  for (int i = 0; i < 60; ++i) {
    Tree tree = RandomTree(random, random.Pick({16, 16, 1, 5}), i % 6 == 0);
    check.what = Text("tree %d: %d nodes, %d rows, page %d", i, static_cast<int>(tree.parent.size()),
                      static_cast<int>(tree.row_node.size()), tree.page_size);
    std::vector<int32_t> plan = BuildPlan(tree.Packed(), RandomCosts(random, random.Pick({1, 3, 7})));
    CheckCoverage(check, tree, plan);
    // Rows alone at the end of a leaf move on while the leaf has slots, all or none.
    std::map<int32_t, int> rows_of;
    for (const int32_t node : tree.row_node) ++rows_of[node];
    for (int step = 0; step < 3; ++step) {
      bool movable = true;
      for (size_t r = 0; r < tree.row_node.size(); ++r) {
        const int32_t v = tree.row_node[r];
        movable &= rows_of[v] == 1 && tree.row_pos[r] - tree.Pos0(v) + 1 < tree.capacity[v];
      }
      const std::vector<int32_t> before = plan;
      const int32_t stuck = PlanAdvance(plan.data());
      if (rows_of.size() == tree.row_node.size()) check.True((stuck == 0) == movable, "advance where slots are left, and only there");
      if (stuck != 0) {
        check.True(plan == before, "an advance that cannot be changes nothing");
        break;
      }
      for (size_t r = 0; r < tree.row_node.size(); ++r) {
        const int32_t v = tree.row_node[r], position = ++tree.row_pos[r];
        ++tree.length[v];
        const Place own = tree.Of(v, position);
        check.True(plan[plan[kFieldRowPos] + r] == position, "advanced position");
        check.True(plan[plan[kFieldRowSlot] + r] == own.page * tree.page_size + own.slot, "advanced slot");
      }
    }
  }
}

// Sequences that share leading pages, given as block tables.
TTSK_TEST(block_tables) {
  for (int i = 0; i < 30; ++i) {
    const int32_t count = static_cast<int32_t>(random.Between(1, 9)), page_size = random.Pick({1, 4, 16}), width = 12;
    std::vector<int32_t> table(count * width), lens(count), queries(count);
    int32_t next = 0;
    for (int32_t b = 0; b < count; ++b) {
      const int32_t like = b > 0 ? static_cast<int32_t>(random.Below(b)) : 0;
      const int32_t pages = static_cast<int32_t>(random.Between(1, width));
      int32_t shared = b > 0 ? static_cast<int32_t>(random.Below(std::min(pages, lens[like] / page_size) + 1)) : 0;
      shared = std::min(shared, pages - 1);  // the last page is its own
      for (int32_t j = 0; j < pages; ++j) table[b * width + j] = j < shared ? table[like * width + j] : next++;
      lens[b] = pages * page_size - static_cast<int32_t>(random.Below(page_size));
      queries[b] = static_cast<int32_t>(random.Between(1, std::min(lens[b], 20)));
    }
    check.what = Text("%d sequences, page %d", count, page_size);
    int32_t rows = 0;
    for (const int32_t q : queries) rows += q;
    std::vector<int32_t> packed(5 + 12 * count + count * width + 2 * rows);
    packed.resize(TreeFromBlockTables(table.data(), lens.data(), queries.data(), count, width, page_size, packed.data()));
    const TreeSpec spec(packed.data());
    for (int32_t r = 0; r < rows; ++r) {
      int32_t begin = 0;
      for (int32_t v = spec.parent[spec.row_node[r]]; v >= 0; v = spec.parent[v]) begin += spec.length[v];
      const int32_t within = spec.row_pos[r] - begin;
      check.True(within >= 0 && within < spec.length[spec.row_node[r]], "a row outside of its node");
    }
    const std::vector<int32_t> plan = BuildPlan(packed, RandomCosts(random, 2));
    const auto* items = reinterpret_cast<const PlanItem*>(PlanSection(plan.data(), kFieldItems));
    const auto* segs = reinterpret_cast<const PlanSeg*>(PlanSection(plan.data(), kFieldSegs));
    std::vector<std::map<int32_t, Place>> seen(rows);
    for (int32_t n = 0; n < plan[kFieldNumItems]; ++n) {
      for (int32_t r = items[n].row_lo; r < items[n].row_lo + items[n].row_n; ++r) {
        const int32_t row = plan[plan[kFieldRowPerm] + r];
        int32_t pos = items[n].pos0;
        for (int32_t s = items[n].seg_lo; s < items[n].seg_lo + items[n].seg_n; ++s) {
          for (int32_t t = 0; t < segs[s].count; ++t, ++pos) {
            if (pos > plan[plan[kFieldRowPos] + row]) continue;
            check.True(seen[row].emplace(pos, Place{segs[s].page, segs[s].offset + t}).second, "a token is read twice");
          }
        }
      }
    }
    for (int32_t b = 0, row = 0; b < count; ++b) {
      for (int32_t pos = lens[b] - queries[b]; pos < lens[b]; ++pos, ++row) {
        check.True(static_cast<int32_t>(seen[row].size()) == pos + 1, "not every token is read");
        for (const auto& [at, place] : seen[row]) {
          check.True(place == Place{table[b * width + at / page_size], at % page_size}, "a token is read in another place");
        }
      }
    }
  }
}

}  // namespace ttsk::testing
