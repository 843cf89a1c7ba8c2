// The planner's plans of walks, where a CPU's threads have enough rows each: no partial record, nothing to merge.
#include <algorithm>
#include <numeric>

#include "ttskernels/plan_build.h"

namespace ttsk {

// An item per node and block of its tree's rows, in nodes' order, so that every row's items come root to leaf; those of a
// block are its walk. Takes them if the model has it that they are faster than items with records.
bool Planner::MakeWalks(const TreeSpec& spec) {
  items_.clear();
  if (costs_.walks == 0 || rows() == 0) return false;
  const int64_t workers = static_cast<int64_t>(costs_.workers), heads = static_cast<int64_t>(costs_.kv_heads);
  const int64_t wanted = (workers + heads - 1) / heads, share = (rows() + wanted - 1) / wanted;
  const int64_t most = std::min(static_cast<int64_t>(costs_.block_rows), share);
  int32_t walks = 0;
  double total = 0.0, divided = 0.0;  // of the items, and of the same with their rows in two parts
  for (int32_t v = 0; v < spec.nodes; ++v) {
    Node& node = nodes_[v];
    if (node.pos0 == 0) {  // nothing above has tokens
      const int64_t blocks = std::max<int64_t>(1, (node.total + most - 1) / most);
      node.walk_lo = node.row_lo;
      node.walk_rows = std::max<int32_t>(1, static_cast<int32_t>((node.total + blocks - 1) / blocks));
      node.walk = walks;
      if (node.seen > 0) walks += (node.total + node.walk_rows - 1) / node.walk_rows;
    } else {
      const Node& up = nodes_[node.parent];
      node.walk_lo = up.walk_lo, node.walk_rows = up.walk_rows, node.walk = up.walk;
    }
    if (node.seen == 0 || node.total == 0) continue;
    const int32_t end = node.row_lo + node.total;
    for (int32_t lo = node.row_lo; lo < end;) {
      const int32_t block = (lo - node.walk_lo) / node.walk_rows;
      const int32_t hi = std::min(end, node.walk_lo + (block + 1) * node.walk_rows);
      const int32_t seen = std::min(node.pos0 + node.extent, pos_[hi - 1] + 1) - node.pos0;
      const double cost = (node.pos0 == 0 ? costs_.item_us : 0.0) + static_cast<double>(seen) * BlockRate(hi - lo);
      items_.push_back({lo, hi - lo, v, 0, node.pos0, node.extent, -1, node.walk + block, cost, node.growing});
      total += cost;
      divided += cost + static_cast<double>(seen) * (2.0 * BlockRate((hi - lo + 1) / 2) - BlockRate(hi - lo));
      lo = hi;
    }
  }
  // The kernel divides one walk of a head that two threads share, if it has the rows.
  const int64_t common = std::gcd(workers, heads), shared = walks == 1 && wanted == 1 && rows() > 1 ? workers - common : 0;
  total += (divided - total) * static_cast<double>(shared) / static_cast<double>(heads);
  const int64_t even = std::min<int64_t>(rows(), std::max<int64_t>(walks, workers / common));
  const int64_t tasks = even * heads, turns = (tasks + workers - 1) / workers;
  total = total * static_cast<double>(turns * workers) / static_cast<double>(tasks) / costs_.workers;
  if (total >= modelled_us_) return false;
  modelled_us_ = total;

  segs_.clear();
  cost_.assign(walks, 0.0);
  for (Item& item : items_) {
    const Node& node = nodes_[item.seg_lo];
    if (node.seg_lo < 0) AppendSegs(spec, item.seg_lo);
    const int32_t last = pos_[item.row_lo + item.row_n - 1];
    item.seg_lo = node.seg_lo;
    item.seg_n = node.seg_n;
    TrimItem(&item, last);
    cost_[item.walk] += item.cost;
  }
  for (Item& item : items_) item.cost = cost_[item.walk];
  return true;
}

}  // namespace ttsk
