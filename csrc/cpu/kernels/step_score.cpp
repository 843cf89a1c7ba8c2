#include "ttskernels/step_score.h"

#include <math.h>

#include "norm_row.h"
#include "ttskernels/threads.h"

namespace ttsk::TTSK_ISA {
namespace {

constexpr int64_t kParallelWork = 1 << 19;  // multiply-adds, some 20 us: less is not worth waking a team

// Dot products of R rows (x, `stride` apart) with U weight rows. Each has an accumulator and an order of its own, the
// same for every R and U, so neither shows in the result.
template <int R, int U, typename W>
void Dots(const float* x, int64_t stride, const W* const* w, int64_t dim, float out[U][R]) {
  const int64_t body = dim / kLanes * kLanes;
  const int tail = static_cast<int>(dim - body);
  Vec acc[U][R];
  for (int u = 0; u < U; ++u)
    for (int r = 0; r < R; ++r) acc[u][r] = Zero();
  for (int64_t i = 0; i < body; i += kLanes) {
    Vec v[R];
    for (int r = 0; r < R; ++r) v[r] = Load(x + r * stride + i);
    for (int u = 0; u < U; ++u) {
      const Vec a = LoadAs(w[u] + i);
      for (int r = 0; r < R; ++r) acc[u][r] = Fma(v[r], a, acc[u][r]);
    }
  }
  if (tail > 0) {
    for (int u = 0; u < U; ++u) {
      const Vec a = LoadTail(w[u] + body, tail);
      for (int r = 0; r < R; ++r) acc[u][r] = Fma(LoadTail(x + r * stride + body, tail), a, acc[u][r]);
    }
  }
  for (int u = 0; u < U; ++u)
    for (int r = 0; r < R; ++r) out[u][r] = ReduceAdd(acc[u][r]);
}

#if defined(__AVX512F__)
constexpr int kUnits = 4;  // 16 accumulators of 32 registers
#else
constexpr int kUnits = 2;
#endif
constexpr int kUnitBlock = 16;  // weight rows that stay in L2 while all rows pass; four rows of x stay in L1

// relu(x . w + bias) of R rows and units [first, first + kUnits) (fewer at `end`); NaN stays NaN.
template <int R, typename W>
void InnerTile(const StepScoreParams& p, const float* x, int64_t first, int64_t end, float* y) {
  const W* w[kUnits];
  for (int u = 0; u < kUnits; ++u) {
    w[u] = static_cast<const W*>(p.inner_weight) + (first + u < end ? first + u : first) * p.dim;
  }
  float out[kUnits][R];
  Dots<R, kUnits>(x, p.dim, w, p.dim, out);
  for (int u = 0; u < kUnits && first + u < end; ++u) {
    const float b = p.inner_bias != nullptr ? p.inner_bias[first + u] : 0.0f;
    for (int r = 0; r < R; ++r) {
      const float z = out[u][r] + b;
      y[r * p.inner + first + u] = z < 0.0f ? 0.0f : z;
    }
  }
}

template <typename W>
void InnerLayer(const StepScoreParams& p, const float* x, float* y) {
  ForEach((p.inner + kUnitBlock - 1) / kUnitBlock, p.num_rows * p.inner * p.dim > kParallelWork, [&](int64_t block) {
    const int64_t lo = block * kUnitBlock;
    const int64_t hi = lo + kUnitBlock < p.inner ? lo + kUnitBlock : p.inner;
    for (int64_t r = 0; r < p.num_rows; r += 4) {
      for (int64_t unit = lo; unit < hi; unit += kUnits) {
        const float* from = x + r * p.dim;
        float* to = y + r * p.inner;
        switch (p.num_rows - r) {
          case 1: InnerTile<1, W>(p, from, unit, hi, to); break;
          case 2: InnerTile<2, W>(p, from, unit, hi, to); break;
          case 3: InnerTile<3, W>(p, from, unit, hi, to); break;
          default: InnerTile<4, W>(p, from, unit, hi, to);
        }
      }
    }
  });
}

template <typename W>
float Logit(const StepScoreParams& p, const float* x, int64_t dim, int64_t label) {
  const W* w = static_cast<const W*>(p.weight) + label * dim;
  float out[1][1];
  Dots<1, 1>(x, dim, &w, dim, out);
  return out[0][0] + (p.bias != nullptr ? p.bias[label] : 0.0f);
}

// The mixed score in one sweep over the labels; softmax is online: sum and mixed are scaled by exp(-top).
template <typename W>
float ScoreRow(const StepScoreParams& p, const float* x, int64_t dim) {
  float top = -INFINITY, sum = 0.0f, mixed = 0.0f;
  for (int64_t c = 0; c < p.labels; ++c) {
    const float z = Logit<W>(p, x, dim, c);
    if (!isfinite(z)) return NAN;
    float value = z;
    if (p.squash == Squash::kSigmoid) value = 1.0f / (1.0f + expf(-z));
    if (p.squash == Squash::kSoftmax) {
      if (z > top) {
        const float shrink = expf(top - z);
        sum *= shrink;
        mixed *= shrink;
        top = z;
      }
      value = expf(z - top);
      sum += value;
    }
    mixed += p.mix != nullptr ? p.mix[c] * value : value;
  }
  return p.squash == Squash::kSoftmax ? mixed / sum : mixed;
}

template <typename T, typename W>
void Run(const StepScoreParams& p) {
  float* const x = p.scratch;
  float* const y = p.scratch + p.num_rows * p.dim;
  if (p.inner == 0) {
    ForEach(p.num_rows, p.num_rows * p.dim * p.labels > kParallelWork, [&](int64_t r) {
      float* const row = x + r * p.dim;
      const bool finite =
          NormRow(static_cast<const T*>(p.hidden) + p.rows[r] * p.hidden_stride, p.norm_weight, p.eps, p.dim, row);
      p.scores[r] = finite ? ScoreRow<W>(p, row, p.dim) : NAN;
    });
    return;
  }
  for (int64_t r = 0; r < p.num_rows; ++r) {
    const bool finite =
        NormRow(static_cast<const T*>(p.hidden) + p.rows[r] * p.hidden_stride, p.norm_weight, p.eps, p.dim, x + r * p.dim);
    p.scores[r] = finite ? 0.0f : NAN;
  }
  InnerLayer<W>(p, x, y);
  for (int64_t r = 0; r < p.num_rows; ++r) {
    if (!isnan(p.scores[r])) p.scores[r] = ScoreRow<W>(p, y + r * p.inner, p.inner);
  }
}

template <typename T>
void RunWeights(const StepScoreParams& p) {
  if (p.weight_dtype == DType::kFloat32) return Run<T, float>(p);
  if (p.weight_dtype == DType::kFloat16) return Run<T, Fp16>(p);
  Run<T, Bf16>(p);
}

}  // namespace

void StepScore(const StepScoreParams& p) {
  if (p.hidden_dtype == DType::kFloat32) return RunWeights<float>(p);
  if (p.hidden_dtype == DType::kFloat16) return RunWeights<Fp16>(p);
  RunWeights<Bf16>(p);
}

}  // namespace ttsk::TTSK_ISA
