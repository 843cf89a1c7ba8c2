#include "ttskernels/plan_build.h"

#include <algorithm>
#include <cmath>

namespace ttsk {
namespace {

constexpr double kEvenPiece = 10.0;  // min_piece_us of a piece of work that is shared out evenly as it is

}  // namespace

TreeSpec::TreeSpec(const int32_t* packed)
    : nodes(packed[0]), rows(packed[1]), num_pages(packed[2]), page_size(packed[3]) {
  parent = packed + 4;
  length = parent + nodes;
  capacity = length + nodes;
  cached = capacity + nodes;
  first_offset = cached + nodes;
  page_indptr = first_offset + nodes;
  pages = page_indptr + nodes + 1;
  row_node = pages + num_pages;
  row_pos = row_node + rows;
}

int64_t Planner::Blocks(int64_t rows) const {
  const int64_t most = static_cast<int64_t>(costs_.block_rows);
  return (rows + most - 1) / most;
}

double Planner::BlockRate(int64_t rows) const {
  const int64_t tile = static_cast<int64_t>(costs_.tile_rows);
  const int64_t padded = (rows * static_cast<int64_t>(costs_.group) + tile - 1) / tile * tile;
  return std::max(costs_.byte_us, costs_.flop_us * static_cast<double>(padded));
}

double Planner::RowRate(int64_t rows) const {
  const int64_t blocks = Blocks(rows), size = (rows + blocks - 1) / blocks;
  return static_cast<double>(blocks - 1) * BlockRate(size) + BlockRate(rows - (blocks - 1) * size);
}

void Planner::Build(const TreeSpec& spec, const PlanCosts& costs) {
  costs_ = costs;
  page_size_ = spec.page_size;
  Measure(spec);
  SortRows(spec);
  Choose();
  walks_ = MakeWalks(spec);
  if (!walks_) {
    MakeItems(spec);
    SplitItems();
  }
  if (Folds()) CutIntoRuns();
  AssignSlots();
  AssignQueues();
  SetRowTargets(spec);
}

// Positions, rows at and below every node, and how much of it is read.
void Planner::Measure(const TreeSpec& spec) {
  const int32_t n = spec.nodes;
  nodes_.assign(n, Node{});
  for (int32_t v = 0; v < n; ++v) {
    Node& node = nodes_[v];
    node.parent = spec.parent[v];
    node.length = spec.length[v];
    node.pos0 = node.parent < 0 ? 0 : nodes_[node.parent].pos0 + nodes_[node.parent].length;
    node.leaf = node.pushed = true;
    node.seg_lo = -1;
  }
  for (int32_t r = 0; r < spec.rows; ++r) {
    Node& node = nodes_[spec.row_node[r]];
    ++node.own;
    node.reach = std::max(node.reach, spec.row_pos[r] - node.pos0 + 1);
  }
  for (int32_t v = n - 1; v >= 0; --v) {
    Node& node = nodes_[v];
    node.total += node.own;
    if (node.parent >= 0 && node.total > 0) {
      nodes_[node.parent].total += node.total;
      nodes_[node.parent].leaf = false;
    }
  }
  int32_t root_cursor = 0;
  unique_tokens_ = 0;
  for (int32_t v = 0; v < n; ++v) {
    Node& node = nodes_[v];
    int32_t& cursor = node.parent < 0 ? root_cursor : nodes_[node.parent].cursor;
    node.row_lo = cursor;
    cursor += node.total;
    node.cursor = node.row_lo + node.own;
    node.seen = node.leaf ? node.reach : node.length;
    node.growing = node.leaf && node.own == 1 && node.reach == node.length;
    node.extent = node.growing ? std::max(spec.capacity[v], node.reach) : node.seen;
    if (node.total > 0) unique_tokens_ += node.seen;
  }
}

// perm_: plan row -> caller row. Own rows of a node by position, then in the caller's order.
void Planner::SortRows(const TreeSpec& spec) {
  perm_.resize(spec.rows);
  pos_.resize(spec.rows);
  input_pos_.assign(spec.row_pos, spec.row_pos + spec.rows);
  for (Node& node : nodes_) node.cursor = node.row_lo;
  bool sorted = true;
  for (int32_t r = 0; r < spec.rows; ++r) {
    Node& node = nodes_[spec.row_node[r]];
    const int32_t at = node.cursor++;
    perm_[at] = r;
    sorted = sorted && (at == node.row_lo || spec.row_pos[perm_[at - 1]] <= spec.row_pos[r]);
  }
  if (!sorted) {
    for (const Node& node : nodes_) {
      std::stable_sort(perm_.begin() + node.row_lo, perm_.begin() + node.row_lo + node.own,
                       [&](int32_t a, int32_t b) { return spec.row_pos[a] < spec.row_pos[b]; });
    }
  }
  flat_tokens_ = 0;
  for (int32_t i = 0; i < spec.rows; ++i) {
    pos_[i] = spec.row_pos[perm_[i]];
    flat_tokens_ += pos_[i] + 1;
  }
}

void Planner::Choose() {
  const int32_t n = static_cast<int32_t>(nodes_.size());
  for (int32_t v = n - 1; v >= 0; --v) {
    Node& node = nodes_[v];
    if (node.total == 0) continue;
    if (node.own > 0) {
      const double own_rate = RowRate(node.own);
      const int64_t blocks = Blocks(node.own);
      node.rate += own_rate;
      node.flat_rate += own_rate;
      node.flat += static_cast<double>(blocks) * costs_.item_us;
      node.empty += blocks;
    }
    if (node.seen > 0) {
      const double tokens = node.seen;
      const int64_t rows = node.total, groups = (node.seen + PartialTokens() - 1) / PartialTokens();
      node.flat += tokens * node.flat_rate;
      const double push = tokens * node.rate + static_cast<double>(node.empty) * costs_.item_us;
      const double once_rate = RowRate(rows);
      const double once = static_cast<double>(Blocks(rows)) * costs_.item_us + tokens * once_rate;
      double extra = 0.0;
      if (node.pos0 == 0) extra = static_cast<double>(rows + node.records - node.open_rows) * costs_.partial_us;
      if (once + extra < push) {
        node.pushed = false;
        node.done += node.front_cost + static_cast<double>(node.records) * costs_.partial_us;
        node.front_cost = once;
        node.rate = once_rate;
        node.empty = 0;
        node.records = rows * groups;
        node.open_rows = rows;
      } else {
        node.front_cost += push;
        node.empty = 0;
        node.records += rows * groups;
      }
    }
    if (node.parent < 0) continue;
    Node& up = nodes_[node.parent];
    up.front_cost += node.front_cost;
    up.rate += node.rate;
    up.empty += node.empty;
    up.records += node.records;
    up.open_rows += node.open_rows;
    up.flat_rate += node.flat_rate;
    up.done += node.done;
    up.flat += node.flat;
  }
  double modelled = 0.0, flat = 0.0;
  bool any_flat = false;
  for (int32_t v = n - 1; v >= 0; --v) {
    Node& node = nodes_[v];
    if (node.parent >= 0 || node.total == 0) continue;
    double cost = node.done + node.front_cost + static_cast<double>(node.open_rows) * costs_.partial_us;
    if (cost > node.flat) {
      node.flat_tree = any_flat = true;
      cost = node.flat;
    }
    modelled += cost;
    flat += node.flat;
  }
  if (any_flat) {
    for (Node& node : nodes_) {
      if (node.parent >= 0 && nodes_[node.parent].flat_tree) node.flat_tree = true;
      if (node.flat_tree) node.pushed = true;
    }
  }
  modelled_us_ = modelled / costs_.workers;
  flat_us_ = flat / costs_.workers;
}

void Planner::AppendSegs(const TreeSpec& spec, int32_t v) {
  Node& node = nodes_[v];
  if (node.seg_lo >= 0) {  // in an earlier chain already
    for (int32_t i = 0; i < node.seg_n; ++i) {
      const PlanSeg seg = segs_[node.seg_lo + i];
      segs_.push_back(seg);
    }
    return;
  }
  node.seg_lo = static_cast<int32_t>(segs_.size());
  const int32_t* pages = spec.pages + spec.page_indptr[v];
  int32_t offset = spec.first_offset[v], left = 0;
  for (int32_t token = 0; token < node.extent;) {
    if (left == 0) left = std::min(PartialTokens(), node.extent - token);
    const int32_t count = std::min(page_size_ - offset, left);
    segs_.push_back({*pages, offset, count, left});
    token += count;
    left -= count;
    offset += count;
    if (offset == page_size_) {
      offset = 0;
      ++pages;
    }
  }
  node.seg_n = static_cast<int32_t>(segs_.size()) - node.seg_lo;
}

// Leaves out segments behind position `last`, up to which the item's last row sees, but of a row that moves on.
void Planner::TrimItem(Item* item, int32_t last) const {
  int32_t end = item->pos0 + item->tokens;
  while (!item->growing && item->seg_n > 1 && end - segs_[item->seg_lo + item->seg_n - 1].count > last) {
    end -= segs_[item->seg_lo + --item->seg_n].count;
  }
  item->tokens = end - item->pos0;
}

// One item per chain and block of rows.
void Planner::MakeItems(const TreeSpec& spec) {
  items_.clear();
  segs_.clear();
  for (int32_t v = 0; v < spec.nodes; ++v) {
    const Node& node = nodes_[v];
    const int32_t rows = node.pushed ? node.own : node.total;
    if (rows == 0) continue;
    chain_.assign(1, v);
    for (int32_t up = node.parent; up >= 0 && nodes_[up].pushed; up = nodes_[up].parent) chain_.push_back(up);
    const int32_t pos0 = nodes_[chain_.back()].pos0, seg_lo = static_cast<int32_t>(segs_.size());
    for (size_t i = chain_.size(); i-- > 0;) AppendSegs(spec, chain_[i]);
    const int32_t seg_n = static_cast<int32_t>(segs_.size()) - seg_lo, row_end = node.row_lo + rows;
    const int32_t blocks = static_cast<int32_t>(Blocks(rows)), size = (rows + blocks - 1) / blocks;
    for (int32_t lo = node.row_lo; lo < row_end; lo += size) {
      const int32_t hi = std::min(lo + size, row_end), last = pos_[hi - 1];
      items_.push_back({lo, hi - lo, seg_lo, seg_n, pos0, node.pos0 + node.extent - pos0, -1, -1, 0.0, node.growing});
      Item& item = items_.back();
      TrimItem(&item, last);
      const double seen = std::min(pos0 + item.tokens, last + 1) - pos0;
      item.cost = costs_.item_us + seen * BlockRate(hi - lo);
    }
  }
}

// Cuts long items while there are too few (item, kv head) tasks for the workers: at partial starts or, where items fold,
// at any segment behind whole tiles of one. A lone item whose heads share out evenly gains nothing by it but that a worker may
// be late, so only long pieces are cut off it.
void Planner::SplitItems() {
  double total = 0.0;
  for (const Item& item : items_) total += item.cost;
  const double target = total / costs_.tasks * costs_.kv_heads;
  const bool even = items_.size() == 1 && !Folds() && std::fmod(costs_.kv_heads, costs_.workers) == 0.0;
  const double least = costs_.min_piece_us * (even ? kEvenPiece : 1.0);
  split_.clear();
  for (const Item& item : items_) {
    const double wanted = Folds() ? std::floor(item.cost / target + 0.5) : std::ceil(item.cost / target);
    const int64_t pieces = static_cast<int64_t>(std::min(wanted, std::floor(item.cost / least)));
    if (pieces <= 1 || item.tokens <= (Folds() ? kTileTokens : kPartialTokens)) {
      split_.push_back(item);
      continue;
    }
    int32_t lo = item.seg_lo, start = 0, token = 0, tiles_from = 0;
    int64_t made = 1;
    const int32_t end = item.seg_lo + item.seg_n;
    for (int32_t s = lo; s <= end; ++s) {
      const bool starts = s > item.seg_lo && s < end && Starts(s);
      if (starts) tiles_from = token;
      const bool may = starts || (Folds() && (token - tiles_from) % kTileTokens == 0);
      const bool cut = s == end || (s > item.seg_lo && may && token * pieces >= item.tokens * made);
      if (cut) {
        Item piece = item;
        piece.seg_lo = lo;
        piece.seg_n = s - lo;
        piece.pos0 = item.pos0 + start;
        piece.tokens = token - start;
        if (!item.growing) {  // leading rows that see nothing of this piece
          while (pos_[piece.row_lo] < piece.pos0) ++piece.row_lo, --piece.row_n;
        }
        const int32_t seen = std::min(piece.tokens, pos_[piece.row_lo + piece.row_n - 1] + 1 - piece.pos0);
        piece.cost = costs_.item_us + static_cast<double>(std::max(0, seen)) * BlockRate(piece.row_n);
        split_.push_back(piece);
        lo = s;
        start = tiles_from = token;
        ++made;
      }
      if (s < end) token += segs_[s].count;
    }
  }
  items_.swap(split_);
}

// Ends partials at page breaks where these are rare enough for boxes.
void Planner::CutIntoRuns() {
  int64_t breaks = 0, tokens = 0;
  for (int32_t s = 0; s < segs(); ++s) {
    tokens += segs_[s].count;
    breaks += !Starts(s) && segs_[s].page != segs_[s - 1].page + 1;
  }
  if (breaks * kRunTokens > tokens) return;
  for (int32_t s = segs() - 2; s >= 0; --s) {
    PlanSeg& seg = segs_[s];
    if (seg.left > seg.count) seg.left = seg.count + (segs_[s + 1].page == seg.page + 1 ? segs_[s + 1].left : 0);
  }
}

}  // namespace ttsk
