#include "ttskernels/token_logprob.h"

#include <math.h>

#include <atomic>

#include "linear_micro.h"
#include "norm_row.h"
#include "ttskernels/threads.h"

namespace ttsk::TTSK_ISA {
namespace {

constexpr int64_t kParallelWork = 1 << 19;  // multiply-adds, some 20 us: less is not worth waking a team
constexpr int64_t kChunkRows = 384;
constexpr float kLowest = -87.0f;  // exp of less is denormal, 1.4 times slower in all, and lost in a sum of at least 1

struct Running {
  float top = -INFINITY, sum = 0.0f;  // of exp(logit - top)
};

// Takes in the first `columns` logits of a panel. NaN in, NaN in the sum.
inline void Absorb(const float* logits, int columns, Running* state) {
  Vec v[kPanel / kLanes], top = Broadcast(state->top);
  for (int c = 0; c < kPanel / kLanes; ++c) {
    const int n = columns - c * kLanes;
    v[c] = Load(logits + c * kLanes);
    if (n < kLanes) v[c] = SelectFirst(n > 0 ? n : 0, v[c], Broadcast(-INFINITY));
    top = Max(top, v[c]);
  }
  const float now = ReduceMax(top);
  Vec sum = Zero();
  for (int c = 0; c < kPanel / kLanes; ++c) {
    sum = Add(sum, Exp(Max(Broadcast(kLowest), Sub(v[c], Broadcast(now)))));  // this order lets NaN through
  }
  state->sum = state->sum * expf(state->top - now) + ReduceAdd(sum);
  state->top = now;
}

struct Layout {
  int64_t x_stride, panels, slices, slice_panels, panel_bytes;
  uint8_t* own_panels;  // [threads] of panel_bytes, for a plain lm_head
  float* x;             // [num_rows][x_stride]
  Running* partial;     // [num_rows][kLogprobSlices]
};

Layout MakeLayout(const TokenLogprobParams& p) {
  Layout l{};
  l.x_stride = (p.dim + 1) / 2 * 2;
  l.panels = (p.vocab + kPanel - 1) / kPanel;
  l.slice_panels = (l.panels + kLogprobSlices - 1) / kLogprobSlices;
  l.slices = (l.panels + l.slice_panels - 1) / l.slice_panels;
  l.panel_bytes = LinearPackedBytes(kPanel, p.dim, p.weight_dtype);
  l.own_panels = static_cast<uint8_t*>(p.scratch);
  l.x = reinterpret_cast<float*>(l.own_panels + (p.packed ? 0 : NumThreads() * l.panel_bytes));
  l.partial = reinterpret_cast<Running*>(l.x + p.num_rows * l.x_stride);
  return l;
}

template <typename T>
void NormRows(const TokenLogprobParams& p, const Layout& l, int64_t first, int64_t last) {
  for (int64_t r = first; r < last; ++r) {
    float* const x = l.x + r * l.x_stride;
    // A row that is not finite goes on: its logits are infinite or NaN, so its sum becomes NaN.
    NormRow(static_cast<const T*>(p.hidden) + p.rows[r] * p.hidden_stride, p.norm_weight, p.eps, p.dim, x);
    for (int64_t i = p.dim; i < l.x_stride; ++i) x[i] = 0.0f;
  }
}

const uint8_t* PanelOf(const TokenLogprobParams& p, const Layout& l, int64_t panel, int thread) {
  if (p.packed) return static_cast<const uint8_t*>(p.lm_head) + panel * l.panel_bytes;
  uint8_t* const own = l.own_panels + thread * l.panel_bytes;
  const int64_t first = panel * kPanel, rows = p.vocab - first < kPanel ? p.vocab - first : kPanel;
  const char* from = static_cast<const char*>(p.lm_head) + first * p.weight_stride * SizeOf(p.weight_dtype);
  LinearPack(from, rows, p.dim, p.weight_stride, p.weight_dtype, {0, rows, 0}, own);
  return own;
}

// Rows [lo, hi), at most kChunkRows, over one slice of the vocabulary.
void RunSlice(const TokenLogprobParams& p, const Layout& l, int64_t lo, int64_t hi, int64_t slice, int thread) {
  alignas(64) float logits[kBlockRows * kPanel];
  Running state[kChunkRows];
  const int64_t f = PackFactor(p.weight_dtype), steps = (p.dim + f - 1) / f, first = slice * l.slice_panels;
  const int64_t end = first + l.slice_panels < l.panels ? first + l.slice_panels : l.panels;
  for (int64_t panel = first; panel < end; ++panel) {
    const uint8_t* const w = PanelOf(p, l, panel, thread);
    const int64_t left = p.vocab - panel * kPanel;
    const int columns = static_cast<int>(left < kPanel ? left : kPanel);
    for (int64_t r0 = lo; r0 < hi; r0 += kBlockRows) {
      const int rows = static_cast<int>(hi - r0 < kBlockRows ? hi - r0 : kBlockRows);
      MultiplyPanel(p.weight_dtype, false, l.x + r0 * l.x_stride, l.x_stride, w, rows, steps, logits);
      for (int r = 0; r < rows; ++r) {
        Absorb(logits + r * kPanel, columns, &state[r0 - lo + r]);
        const int64_t column = p.ids[r0 + r] - panel * kPanel;
        if (column >= 0 && column < kPanel) p.logprobs[r0 + r] = logits[r * kPanel + column];
      }
    }
  }
  for (int64_t r = lo; r < hi; ++r) l.partial[r * kLogprobSlices + slice] = state[r - lo];
}

// The logit in `chosen` less the log of the sum of all exponentials.
float Finish(float chosen, const Running* parts, int64_t slices) {
  float top = -INFINITY;
  for (int64_t s = 0; s < slices; ++s) top = parts[s].top > top ? parts[s].top : top;
  double sum = 0.0;
  for (int64_t s = 0; s < slices; ++s) sum += parts[s].sum * exp(static_cast<double>(parts[s].top) - top);
  const float logprob = static_cast<float>(static_cast<double>(chosen) - top - log(sum));
  return isfinite(logprob) ? logprob : NAN;
}

}  // namespace

void TokenLogprob(const TokenLogprobParams& p) {
  if (p.num_rows == 0) return;
  const Layout l = MakeLayout(p);
  const int64_t chunks = (p.num_rows + kChunkRows - 1) / kChunkRows;
  std::atomic<int64_t> next{0};
  Together(p.num_rows * p.dim * p.vocab > kParallelWork ? NumThreads() : 1, [&](const Member& me) {
    const auto [first, last] = me.Share(p.num_rows);
    if (!p.packed) std::memset(l.own_panels + me.index * l.panel_bytes, 0, l.panel_bytes);
    if (p.hidden_dtype == DType::kFloat32) NormRows<float>(p, l, first, last);
    else if (p.hidden_dtype == DType::kFloat16) NormRows<Fp16>(p, l, first, last);
    else NormRows<Bf16>(p, l, first, last);
    me.Barrier();
    for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < chunks * l.slices;) {
      const int64_t lo = t / l.slices * kChunkRows, hi = lo + kChunkRows < p.num_rows ? lo + kChunkRows : p.num_rows;
      RunSlice(p, l, lo, hi, t % l.slices, me.index);
    }
    me.Barrier();
    for (int64_t r = first; r < last; ++r) {
      p.logprobs[r] = Finish(p.logprobs[r], l.partial + r * kLogprobSlices, l.slices);
    }
  });
}

}  // namespace ttsk::TTSK_ISA
