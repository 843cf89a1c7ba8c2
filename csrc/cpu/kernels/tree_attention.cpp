#include "ttskernels/tree_attention.h"

#include <new>

#include "tree_attention_fixed_tile.h"
#include "tree_attention_layout.h"
#include "tree_attention_micro.h"
#include "tree_attention_softmax.h"
#include "tree_attention_tasks.h"
#include "tree_attention_tile.h"
#include "ttskernels/threads.h"

namespace ttsk::TTSK_ISA {
namespace {

// Up to so many q rows a tile is widened in registers as it is read, above it is copied to floats first (GFLOP/s of both
// in bench/LOG.md: in place wins at 7 and 28 rows, the copy at 56 and 112). Bytes are widened to int16, with less to gain.
constexpr int64_t kInPlaceRows = 32, kInPlaceRowsOfBytes = 12;

template <int kN>
struct Rows { static constexpr int kRows = kN; };

// T: element of q and out; P: element of the pages, T or an integer.
template <typename T, typename P>
struct Kernel {
  using InPlace = typename Modes<P>::InPlace;
  using Copied = typename Modes<P>::Copied;
  using E = typename InPlace::Query;
  static constexpr bool kFixed = InPlace::kFixed;
  static_assert(InPlace::kTile == Copied::kTile && (!kFixed || InPlace::kTile == kTileTokens));
  static constexpr int64_t kMostInPlace = sizeof(P) == 1 ? kInPlaceRowsOfBytes : kInPlaceRows;

  const TreeAttentionParams& p;
  const TreeLayout layout;
  const int32_t* plan = p.plan;
  const int32_t* row_pos = PlanSection(plan, kFieldRowPos);
  const int32_t* row_perm = PlanSection(plan, kFieldRowPerm);
  const int64_t group = p.q_heads / p.kv_heads;
  const int32_t tile_tokens = p.head_dim <= 128 ? InPlace::kTile : kTileTokens;  // K of a tile stays in L1
  const float score_scale = p.softcap != 0.0f ? p.scale : p.scale * kLog2e;

  // Records of a kv head lie together, so that threads that have other heads write no cache line of them.
  int64_t Record(int64_t slot, int64_t head) const {
    return (head / group * plan[kFieldNumSlots] + slot) * group + head % group;
  }
  float* RecordMl(int64_t record) const { return layout.slot_ml + record * 2; }
  float* RecordO(int64_t record) const { return layout.slot_o + record * p.v_dim; }

  void Finish(int64_t row, int64_t head, float m, float l, const float* o) const {
    T* out = static_cast<T*>(p.out) + row * p.out_stride + head * p.v_dim;
    float scale = 0.0f, top = m;
    if (m != -kInf) {
      float weight = 1.0f;
      if (p.sinks != nullptr) {
        const float sink = p.sinks[head] * kLog2e;
        top = sink > m ? sink : m;
        weight = __builtin_exp2f(m - top);
        l = l * weight + __builtin_exp2f(sink - top);
      }
      scale = weight / l;
    }
    for (int64_t i = 0; i < p.v_dim; i += kLanes) {
      StoreAs(out + i, m == -kInf ? Zero() : Mul(Load(o + i), Broadcast(scale)));
    }
    if (p.lse == nullptr) return;
    p.lse[row * p.q_heads + head] = m == -kInf ? -kInf : (top + __builtin_log2f(l)) * (1.0f / kLog2e);
  }

  // Scores and softmax of groups of MR rows: `groups` of them from number `group` on, whose first row is `at`. `outlive` has
  // room for the scores of one, as the last weights may be left to `later`.
  template <typename M, int MR, typename AnyTile, typename Element>
  void ScoreGroups(int64_t at, int64_t group, int64_t groups, const AnyTile& tile, Fetching<Element> fetching,
                   const TileView& view, const TreeScratch& s, float* outlive, Deferred<E>* later) const {
    alignas(64) float own[kFixed ? MR * M::kTile : 1];  // here, fixed point takes 5 to 8 % less time (bench/LOG.md)
    float* scores = kFixed ? own : outlive;
    for (const int64_t end = group + groups; group < end; ++group, at += MR) {
      const int hi = s.ranges[group].hi, blocks = (hi + kBlock - 1) / kBlock;
      if (s.ranges[group].lo >= hi) continue;
      fetching.group = group;
      const E* q = static_cast<const E*>(s.q) + at * p.head_dim;
      E* weights = static_cast<E*>(s.weights) + at * M::kTile;
      const RowsOf rows = {static_cast<RowState*>(s.state) + at, s.sums + at * kLanes, s.o + at * p.v_dim, p.v_dim};
      for (int first = 0; first < blocks; first += kPartBlocks) {
        const int last = first + kPartBlocks < blocks ? first + kPartBlocks : blocks, part = first * kBlock;
        bool above;
        if constexpr (kFixed) {
          above = FixedScores<M, MR>(q, p.head_dim, tile, fetching, blocks, s.row_scale + at, rows.state, scores);
        } else {
          above = Scores<M, MR>(q, p.head_dim, tile, fetching, first, last, score_scale, rows.state, *later, scores);
        }
        if (view.masked || p.softcap != 0.0f) {
          MaskScores<M>(scores + part, MR, view.pos + part, last - first, hi - part, p.softcap, rows.state);
          above = true;
        }
        if constexpr (kFixed) {
          if (above) MoveMaxima<M>(scores, MR, first, last, rows, scores);
          TakeWeights<M>(scores, MR, blocks, rows, scores, static_cast<Deferred<float>*>(nullptr));
          FixWeights(scores, MR, blocks, tile.v_scale, tile.finite, MostWeight(p.form), weights, s.weight_scale + at);
        } else {
          if (above) MoveMaxima<M>(scores, MR, first, last, rows, weights);
          TakeWeights<M>(scores + part, MR, last - first, rows, weights + part, later);
        }
      }
    }
  }
  // Adds those groups' share of a few columns of the output, in pass number `pass`; beside the first, what is left to `later`.
  template <typename M, int MR, typename AnyTile, typename Element>
  void WeighGroups(int64_t at, int64_t group, int64_t groups, const AnyTile& tile, Fetching<Element> fetching, int pass,
                   int64_t col, int vectors, const TreeScratch& s, Deferred<E>* later) const {
    for (const int64_t end = group + groups; group < end; ++group, at += MR) {
      const GroupRange range = s.ranges[group];
      if (range.lo >= range.hi) continue;
      fetching.group = group;
      const E* weights = static_cast<const E*>(s.weights) + at * M::kTile;
      float* o = s.o + at * p.v_dim + col;
      const auto weigh = [&](const auto& ahead) {
        if constexpr (kFixed) {
          const float* up = s.weight_scale + at;
          FixedWeigh<M, MR>(weights, tile, ahead, range.lo, range.hi, p.v_dim, col, vectors, up, range.Begins(), o);
        } else {
          later->Beside(static_cast<const RowState*>(s.state) + at, MR, [&](const auto& work) {
            Weigh<M, MR>(weights, tile, ahead, range.lo, range.hi, p.v_dim, col, vectors, range.Begins(), work, o);
          });
        }
      };
      fetching.With(pass, vectors, weigh);
    }
  }

  // Divides `count` rows into groups of at most kMicroRows: f(rows, a constant, first row, first group, groups) for each size.
  template <typename F>
  static void ForGroups(int64_t count, F f) {
    const int64_t groups = (count + kMicroRows - 1) / kMicroRows, size = count / groups, larger = count % groups;
    if (larger > 0) WithRows(static_cast<int>(size + 1), [&](auto n) { f(n, 0, 0, larger); });
    WithRows(static_cast<int>(size), [&](auto n) { f(n, larger * (size + 1), larger, groups - larger); });
  }
  // Calls f with the number of rows as a constant.
  template <typename F>
  static void WithRows(int rows, F f) {
    if (rows == 1) return f(Rows<1>{});
    if (rows == 2) return f(Rows<2>{});
    if (rows == 3) return f(Rows<3>{});
    if constexpr (kMicroRows >= 6) {
      if (rows == 4) return f(Rows<4>{});
      if (rows == 5) return f(Rows<5>{});
      return f(Rows<6>{});
    }
  }

  // What each group of rows reads of a tile of hi tokens.
  static void Ranges(const RowState* state, const TileView& view, int rows, int64_t groups, GroupRange* ranges) {
    for (; groups > 0; --groups, ++ranges, state += rows) {
      int32_t first = state->first, end = state->end;
      for (int r = 1; view.masked && r < rows; ++r) {
        if (state[r].first < first) first = state[r].first;
        if (state[r].end > end) end = state[r].end;
      }
      ranges->lo = first > view.pos ? first - view.pos : 0;
      ranges->hi = end - view.pos < view.hi ? end - view.pos : view.hi;
      ranges->tiles += ranges->lo < ranges->hi;
    }
  }

  // One tile for all rows: K serves every group of rows while it is in L1, then V, a few columns at a time. Meanwhile the tile
  // at `next` is fetched.
  template <typename M, typename Loader>
  void TileRows(const SegCursor& cursor, const TileView& view, const Upcoming& next, int64_t kv_head, int64_t count,
                const TreeScratch& s) const {
    using Element = typename M::Element;
    Loader loader(p, kv_head, static_cast<Element*>(s.tile));
    auto tile = loader.LoadK(cursor, view.lo, view.hi);
    Tile<Element> ahead = tile;
    const int found = Loader(p, next.kv_head, nullptr).Find(next.at, next.tokens, &ahead);
    const Fetching<Element> fetching = {found > 0 ? &ahead : nullptr, 0, (count + kMicroRows - 1) / kMicroRows};
    alignas(64) float scores[kMicroRows * M::kTile];
    Deferred<E> later;
    ForGroups(count, [&](auto n, int64_t at, int64_t group, int64_t groups) {
      Ranges(static_cast<const RowState*>(s.state) + at, view, n.kRows, groups, s.ranges + group);
      ScoreGroups<M, n.kRows>(at, group, groups, tile, fetching, view, s, scores, &later);
    });
    loader.LoadV(&tile);
    for (int b = found; b < kTileBlocks; ++b) ahead.v[b] = tile.v[b];
    int64_t col = 0;
    for (int pass = 0; col < p.v_dim; ++pass) {
      const int vectors = ColumnVectors(static_cast<int>((p.v_dim - col) / kLanes));
      ForGroups(count, [&](auto n, int64_t at, int64_t group, int64_t groups) {
        WeighGroups<M, n.kRows>(at, group, groups, tile, fetching, pass, col, vectors, s, &later);
      });
      col += vectors * kLanes;
    }
  }

  template <typename M, typename... Args>
  void RunTile(const Args&... args) const {
    using Element = typename M::Element;
    if constexpr (kFixed) TileRows<M, FixedLoader<P, Element>>(args...);
    else TileRows<M, TileLoader<T, Element>>(args...);
  }

  // One partial: `tokens` tokens from `cursor` on, the first at position pos0; `then` comes after it.
  void Partial(int64_t kv_head, SegCursor cursor, int32_t pos0, int32_t tokens, int64_t count, const Sight& sight,
               const Upcoming& then, const TreeScratch& s) const {
    for (int64_t r = 0; r < count; ++r) {
      static_cast<RowState*>(s.state)[r].Reset();
      Store(s.sums + r * kLanes, Zero());
    }
    for (int64_t g = 0; g * kMicroRows < count; ++g) s.ranges[g].tiles = 0;
    for (int32_t t = 0; t < tokens; t += tile_tokens) {
      const int32_t n = tokens - t < tile_tokens ? tokens - t : tile_tokens, pos = pos0 + t;
      if (pos >= sight.end) return;
      const TileView view = {
          pos, sight.first > pos ? sight.first - pos : 0, sight.end - pos < n ? sight.end - pos : n,
          sight.last_first > pos || sight.first_end < pos + n || n % kBlock != 0,
      };
      const SegCursor tile = cursor;
      cursor.Skip(n);
      if (view.lo >= view.hi) continue;
      const bool aligned = p.packed && tile.seg->offset + tile.used == 0, ends = t + n >= tokens;
      const Upcoming next = ends ? then : Upcoming{cursor, tokens - t - n, kv_head};
      if (aligned && count <= kMostInPlace) RunTile<InPlace>(tile, view, next, kv_head, count, s);
      else RunTile<Copied>(tile, view, next, kv_head, count, s);
    }
  }

  // After a partial of which some rows see a part only: what they do not see has weight 0, and 0 times infinity is NaN. A row
  // with such an output is computed again by itself, over what it sees.
  void RepeatApart(int64_t kv_head, const SegCursor& cursor, int32_t pos0, int32_t tokens, int64_t row, int64_t end,
                   const TreeScratch& all) const {
    for (int64_t r = row; r < end; ++r) {
      TreeScratch s = From((r - row) * group, all);
      s.o += (r - row) * group * p.v_dim;
      if (!AllFinite(s.o, group * p.v_dim)) Partial(kv_head, cursor, pos0, tokens, group, SightOf(r, 1), {}, s);
    }
  }

  // Where the rows of plan rows [row, row + rows) may look.
  Sight SightOf(int64_t row, int64_t rows) const {
    Sight sight = {INT32_MAX, 0, INT32_MAX, 0};
    for (const int32_t* r = row_perm + row; r < row_perm + row + rows; ++r) {
      const int32_t end = row_pos[*r] + 1, first = First(end);
      if (first < sight.first) sight.first = first;
      if (first > sight.last_first) sight.last_first = first;
      if (end < sight.first_end) sight.first_end = end;
      if (end > sight.end) sight.end = end;
    }
    return sight;
  }
  int32_t First(int32_t end) const { return p.window > 0 && end > p.window ? end - p.window : 0; }

  void LoadQueries(int64_t plan_row, int64_t rows, int64_t kv_head, const TreeScratch& s) const {
    E* q = static_cast<E*>(s.q);
    RowState* state = static_cast<RowState*>(s.state);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = row_perm[plan_row + r];
      const T* from = static_cast<const T*>(p.q) + row * p.q_stride + kv_head * group * p.head_dim;
      if constexpr (kFixed) {
        const float most = MostQuery(p.form, p.head_dim);
        for (int64_t g = 0; g < group; ++g, from += p.head_dim, q += p.head_dim) {
          s.row_scale[r * group + g] = FixVector(from, p.head_dim, most, q) * score_scale;
        }
      } else {
        const int64_t elements = group * p.head_dim;
        if constexpr (sizeof(E) == sizeof(T)) std::memcpy(q, from, sizeof(E) * elements);
        else for (int64_t i = 0; i < elements; i += kLanes) Store(q + i, LoadAs(from + i));
        q += elements;
      }
      const int32_t end = row_pos[row] + 1;
      for (int64_t g = 0; g < group; ++g, ++state) state->first = First(end), state->end = end;
    }
  }

  // The part of a task's scratch that rows from number `row` (row, head) on need; what lives for one partial is used again.
  TreeScratch From(int64_t row, TreeScratch s) const {
    s.q = static_cast<E*>(s.q) + row * p.head_dim;
    s.state = static_cast<RowState*>(s.state) + row;
    s.sums += row * kLanes;
    s.row_scale += row;
    s.fold_ml += 2 * row;
    s.fold_o += row * p.v_dim;
    return s;
  }

  void Run(const Task& task, const Task& then, const TreeScratch& s) const {
    const PlanItem& head = *task.item;
    const int64_t row = task.row, kv_head = task.kv_head, count = task.rows * group;
    if (count == 0) return;
    LoadQueries(row, task.rows, kv_head, s);
    for (int64_t r = 0; r < count; ++r) s.fold_ml[2 * r] = -kInf, s.fold_ml[2 * r + 1] = 0.0f;
    for (const PlanItem* item = &head; item != nullptr;) {
      const PlanItem* following = task.After(item);
      RunItem(task, *item, following == nullptr ? then.Begin() : task.Begin(following), s);
      item = following;
    }
    if ((head.flags & kFold) == 0 && head.slot >= 0) return;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head_of = kv_head * group + r % group;
      const float m = s.fold_ml[2 * r], l = s.fold_ml[2 * r + 1];
      if (head.slot < 0) Finish(row_perm[row + r / group], head_of, m, l, s.fold_o + r * p.v_dim);
      else Write(head.slot + row - head.row_lo + r / group, head_of, m, l, s.fold_o + r * p.v_dim);
    }
  }

  // The partials of an item for those of the task's rows that it has; `then` comes after it.
  void RunItem(const Task& task, const PlanItem& item, const Upcoming& then, const TreeScratch& of_task) const {
    const auto [row, end] = task.RowsOf(item);
    const int64_t kv_head = task.kv_head, count = (end - row) * group;
    const TreeScratch s = From((row - task.row) * group, of_task);
    const Sight sight = SightOf(row, end - row);
    const bool fold = (item.flags & kFold) != 0 || item.slot < 0;
    RowState* state = static_cast<RowState*>(s.state);
    int32_t pos = item.pos0;
    int64_t slot = item.slot;
    const PlanSeg* seg = task.segs + item.seg_lo;
    const PlanSeg* last = seg + item.seg_n;
    while (seg < last) {
      const SegCursor cursor = {seg, 0};
      int32_t tokens = seg->count;
      for (; seg->left > seg->count && seg + 1 < last; ++seg) tokens += seg[1].count;
      ++seg;
      const int32_t rest = item.pos0 + item.tokens - pos - tokens;
      const Upcoming next = seg < last ? task.PartialAt(seg, rest) : then;
      Partial(kv_head, cursor, pos, tokens, count, sight, next, s);
      if (!kFixed && (sight.last_first > pos || sight.first_end < pos + tokens)) {
        RepeatApart(kv_head, cursor, pos, tokens, row, end, s);
      }
      for (int64_t r = 0; r < count; ++r) {
        const float l = ReduceAdd(Load(s.sums + r * kLanes));
        const float m = state[r].Seen() || l != l ? state[r].m : -kInf;  // NaN alone moves no m, but is not nothing
        const float* o = s.o + r * p.v_dim;
        if (fold) {
          MergePartial(m, l, o, p.v_dim, s.fold_ml + 2 * r, s.fold_ml + 2 * r + 1, s.fold_o + r * p.v_dim);
        } else {
          Write(slot + row - item.row_lo + r / group, kv_head * group + r % group, m, l, o);
        }
      }
      pos += tokens;
      slot += item.row_n;
    }
  }

  void Write(int64_t slot, int64_t head, float m, float l, const float* o) const {
    const int64_t record = Record(slot, head);
    float* ml = RecordMl(record);
    ml[0] = m, ml[1] = l;
    if (m != -kInf) std::memcpy(RecordO(record), o, sizeof(float) * p.v_dim);
  }

  void MergeRow(int64_t plan_row, int64_t head) const {
    const int32_t* indptr = PlanSection(plan, kFieldMergeIndptr);
    const int32_t* slots = PlanSection(plan, kFieldMergeSlots);
    const int32_t lo = indptr[plan_row], hi = indptr[plan_row + 1];
    if (lo == hi && layout.direct[plan_row]) return;
    float m = -kInf, l = 0.0f, o[kTreeMaxDim];
    for (int32_t i = lo; i < hi; ++i) {
      const int64_t record = Record(slots[i], head);
      const float* ml = RecordMl(record);
      MergePartial(ml[0], ml[1], RecordO(record), p.v_dim, &m, &l, o);
    }
    Finish(row_perm[plan_row], head, m, l, o);
  }

  void RunAll() const {
    TaskList list(p, layout);
    Together(layout.threads, [&](const Member& me) {
      const TreeScratch scratch = layout.Scratch(me.index);
      TaskQueue queue(&list, me);
      for (Task task = queue.Take(); task.item != nullptr; task = queue.Take()) Run(task, queue.Guess(), scratch);
      me.Barrier();
      const int64_t rows = plan[kFieldNumRows];
      const auto [first, last] = me.Share(rows * p.q_heads);  // in order of records: those of the thread's own heads
      for (int64_t i = first; i < last; ++i) MergeRow(i / group % rows, i / group / rows * group + i % group);
    });
  }
};

template <typename T>
void RunKernel(const TreeAttentionParams& p, void* workspace) {
  const TreeLayout layout(p, workspace);
  if (p.form == KvForm::kFloat) Kernel<T, T>{p, layout}.RunAll();
  else if (p.form == KvForm::kInt16) Kernel<T, int16_t>{p, layout}.RunAll();
  else Kernel<T, int8_t>{p, layout}.RunAll();
}

}  // namespace

void TreeAttention(const TreeAttentionParams& p) {
  if (p.rows == 0) return;
  void* workspace = p.workspace;
  const std::align_val_t align{64};
  if (workspace == nullptr) workspace = ::operator new(static_cast<size_t>(TreeAttentionWorkspaceBytes(p)), align);
  if (p.dtype == DType::kFloat32) RunKernel<float>(p, workspace);
  else if (p.dtype == DType::kFloat16) RunKernel<Fp16>(p, workspace);
  else RunKernel<Bf16>(p, workspace);
  if (p.workspace == nullptr) ::operator delete(workspace, align);
}

}  // namespace ttsk::TTSK_ISA
