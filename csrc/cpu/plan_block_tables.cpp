// The packed tree (plan_build.h) of sequences that share leading pages; twin of tree_reference in
// ttskernels/kv/block_tables.py.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "ttskernels/plan_build.h"

namespace ttsk {

int64_t TreeFromBlockTables(const int32_t* table, const int32_t* lens, const int32_t* queries, int32_t count,
                            int32_t width, int32_t page_size, int32_t* packed) {
  const auto row = [&](int32_t b) { return table + static_cast<int64_t>(b) * width; };
  const auto num_pages = [&](int32_t b) { return (lens[b] + page_size - 1) / page_size; };
  std::vector<int32_t> order(count), shared(count, 0), end_node(count, -1);
  std::iota(order.begin(), order.end(), 0);
  const auto common = [&](int32_t a, int32_t b) {
    const int32_t n = std::min(num_pages(a), num_pages(b));
    return static_cast<int32_t>(std::mismatch(row(a), row(a) + n, row(b)).first - row(a));
  };
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int32_t n = common(a, b);
    if (n == num_pages(a) || n == num_pages(b)) return num_pages(a) < num_pages(b);
    return row(a)[n] < row(b)[n];
  });
  for (int32_t i = 1; i < count; ++i) shared[i] = common(order[i - 1], order[i]);

  struct Range { int32_t lo, hi, depth, above; };
  std::vector<Range> stack, groups;
  std::vector<int32_t> parent, length, indptr{0}, pages, pos0;
  if (count > 0) stack.push_back({0, count, 0, -1});
  while (!stack.empty()) {
    const Range at = stack.back();
    stack.pop_back();
    const int32_t first = order[at.lo];
    const int32_t end = at.hi - at.lo == 1 ? num_pages(first)
                                           : *std::min_element(shared.begin() + at.lo + 1, shared.begin() + at.hi);
    int32_t node = at.above;
    if (end > at.depth) {
      node = static_cast<int32_t>(parent.size());
      int32_t longest = 0;
      for (int32_t i = at.lo; i < at.hi; ++i) longest = std::max(longest, lens[order[i]]);
      parent.push_back(at.above);
      pos0.push_back(at.depth * page_size);
      length.push_back(std::min(end * page_size, longest) - at.depth * page_size);
      pages.insert(pages.end(), row(first) + at.depth, row(first) + end);
      indptr.push_back(static_cast<int32_t>(pages.size()));
    }
    groups.clear();
    for (int32_t i = at.lo; i < at.hi; ++i) {
      if (num_pages(order[i]) == end) {
        end_node[order[i]] = node;
      } else if (!groups.empty() && shared[i] > end) {
        groups.back().hi = i + 1;
      } else {
        groups.push_back({i, i + 1, end, node});
      }
    }
    stack.insert(stack.end(), groups.rbegin(), groups.rend());
  }

  std::vector<int32_t> row_node, row_pos;
  for (int32_t b = 0; b < count; ++b) {
    for (int32_t pos = lens[b] - queries[b]; pos < lens[b]; ++pos) {
      int32_t v = end_node[b];
      while (pos < pos0[v]) v = parent[v];
      row_node.push_back(v);
      row_pos.push_back(pos);
    }
  }
  const std::vector<int32_t> sizes{static_cast<int32_t>(parent.size()), static_cast<int32_t>(row_node.size()),
                                   static_cast<int32_t>(pages.size()), page_size};
  const std::vector<int32_t> zeros(parent.size(), 0);
  const std::vector<int32_t>* const parts[] = {&sizes,  &parent, &length, &length,   &length,
                                               &zeros, &indptr, &pages,  &row_node, &row_pos};
  int32_t* out = packed;
  for (const auto* part : parts) {
    if (!part->empty()) std::memcpy(out, part->data(), part->size() * sizeof(int32_t));
    out += part->size();
  }
  return out - packed;
}

}  // namespace ttsk
