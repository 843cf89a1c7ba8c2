#include "tree_attention_layout.h"

#include <cstring>

#include "ttskernels/plan.h"
#include "ttskernels/threads.h"

namespace ttsk {
namespace {

// q rows (row, head) a task: enough to pay for loading a tile, few enough that q and o stay in a 1 MB L2 cache.
constexpr int64_t kTaskRows = 256, kStateBytes = 16, kSumsBytes = 64;

int64_t Align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

TreeLayout::TreeLayout(const TreeAttentionParams& p, void* workspace)
    : head_dim(p.head_dim), v_dim(p.v_dim), threads(NumThreads()) {
  const int32_t* plan = p.plan;
  const int64_t group = p.q_heads / p.kv_heads, items = plan[kFieldNumItems], slots = plan[kFieldNumSlots];
  const int64_t cap = kTaskRows * 128 / (p.head_dim > 128 ? p.head_dim : 128);
  const int64_t block_rows = group < cap ? cap / group : 1;
  q_rows = block_rows * group;
  scratch_bytes = Align(q_rows * head_dim * 4) + Align(TileElements() * 4) + Align(q_rows * kStateBytes) + q_rows * kSumsBytes +
                  Align(q_rows * kTileTokens * 4) + 2 * Align(q_rows * 4) + Align(q_rows * int64_t{sizeof(GroupRange)}) +
                  2 * Align(q_rows * v_dim * 4) + Align(q_rows * 8);
  char* at = static_cast<char*>(workspace);
  int64_t used = 0;
  const auto take = [&](int64_t size) {
    char* result = at + used;
    used += Align(size);
    return result;
  };
  block_indptr = reinterpret_cast<int32_t*>(take((items + 1) * 4));
  direct = reinterpret_cast<int8_t*>(take(plan[kFieldNumRows]));
  slot_ml = reinterpret_cast<float*>(take(slots * p.q_heads * 8));
  slot_o = reinterpret_cast<float*>(take(slots * p.q_heads * v_dim * 4));
  scratch = take(threads * scratch_bytes);
  bytes = used;
  if (workspace == nullptr) return;

  const PlanItem* item = reinterpret_cast<const PlanItem*>(PlanSection(plan, kFieldItems));
  std::memset(direct, 0, static_cast<size_t>(plan[kFieldNumRows]));
  int64_t blocks = 0;
  for (int64_t i = 0; i < items; ++i, ++item) {
    block_indptr[i] = static_cast<int32_t>(blocks);
    if ((item->flags & kFollows) != 0) continue;
    blocks += (item->row_n + block_rows - 1) / block_rows;
    if (item->slot < 0) std::memset(direct + item->row_lo, 1, static_cast<size_t>(item->row_n));
  }
  block_indptr[items] = static_cast<int32_t>(blocks);
}

TreeScratch TreeLayout::Scratch(int thread) const {
  char* at = scratch + thread * scratch_bytes;
  const auto take = [&](int64_t size) {
    char* result = at;
    at += Align(size);
    return result;
  };
  TreeScratch s;
  s.q = take(q_rows * head_dim * 4);
  s.tile = take(TileElements() * 4);
  s.state = take(q_rows * kStateBytes);
  s.sums = reinterpret_cast<float*>(take(q_rows * kSumsBytes));
  s.weights = take(q_rows * kTileTokens * 4);
  s.row_scale = reinterpret_cast<float*>(take(q_rows * 4));
  s.weight_scale = reinterpret_cast<float*>(take(q_rows * 4));
  s.ranges = reinterpret_cast<GroupRange*>(take(q_rows * int64_t{sizeof(GroupRange)}));
  s.o = reinterpret_cast<float*>(take(q_rows * v_dim * 4));
  s.fold_ml = reinterpret_cast<float*>(take(q_rows * 8));
  s.fold_o = reinterpret_cast<float*>(take(q_rows * v_dim * 4));
  return s;
}

int64_t TreeAttentionWorkspaceBytes(const TreeAttentionParams& p) { return TreeLayout(p, nullptr).bytes; }

}  // namespace ttsk
