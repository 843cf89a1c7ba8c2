// Microkernels of linear: rows of x times one packed panel of 64 output columns. Every output is one chain over k from
// zero, so its bits do not depend on which rows it is computed with. Included by kernels/linear.cpp and
// kernels/token_logprob.cpp.
#pragma once

#include "ttskernels/isa.h"
#include "ttskernels/linear.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

// Few rows: the panel streams by once per group of up to kGroupRows rows, expanded to float32 on the fly. Many rows:
// kBlockK rows of the panel are expanded once into L1 and serve all groups of the block, the accumulators waiting in
// memory between K blocks (exact, so the chain is the same).
constexpr int kGroupRows = 6;
constexpr int kBlockRows = 96;
constexpr int kBlockK = 128;  // float32 panel block: 32 KiB
constexpr int kDirectGroups = 4;  // measured: at 16 rows expanding first is 15 % slower, at 48 rows 5 % faster
constexpr int kFewRows = 3 * kGroupRows;  // the next block of a panel must come within a few groups of rows
constexpr int kPrefetchSteps = 8;  // k-steps ahead: 2 KiB, within reach of the memory latency
// Steps of bf16 pairs, 256 bytes each: as far ahead a single group reads; a block that stays in the first-level cache while the
// next one arrives; a longer one, whose sums are put aside less often, from the second-level cache, where the first is too
// small for both (Zen 4). Results are the same.
constexpr int64_t kDotAhead = 16, kDotSteps = 64, kDotStepsOfL2 = 288, kL1OfTwoBlocks = 48 << 10;
#if defined(__AVX512F__)
constexpr int kStripVecs = 4;  // 6 x 4 accumulators of 32 registers
#else
constexpr int kStripVecs = 1;  // 6 x 2 accumulators of 16 registers (AVX2)
#endif
constexpr int kPanel = static_cast<int>(kPanelColumns);

// Weight loads: a k-step holds kStep reduced elements.
struct Float32Panel {
  static constexpr int kStep = 1, kStepBytes = kPanel * 4;
  static Vec Load(const uint8_t* p, int) { return LoadAs(reinterpret_cast<const float*>(p)); }
  static constexpr int kVecBytes = 64;
};
struct ExpandedPanel : Float32Panel {};  // a block in L1: nothing to prefetch
struct Fp16Panel {
  static constexpr int kStep = 1, kStepBytes = kPanel * 2;
  static Vec Load(const uint8_t* p, int) { return LoadAs(reinterpret_cast<const Fp16*>(p)); }
  static constexpr int kVecBytes = 32;
};
struct Bf16Panel {
  static constexpr int kStep = 2, kStepBytes = kPanel * 4;
  static Vec Load(const uint8_t* p, int j) { return j == 0 ? Even(LoadPairs(p)) : Odd(LoadPairs(p)); }
  static constexpr int kVecBytes = 64;
};

// Cache lines to fetch a step, and whether from afar. What one group of rows reads follows soon, and memory gives it in time;
// what several read in turn comes while they do.
template <int kCount, bool kFar>
struct LinesAhead {
  static void Fetch(const uint8_t* ahead, int64_t step) {
    for (int l = 0; l < kCount; ++l) {
      const uint8_t* line = ahead + (step * kCount + l) * 64;
      if (kFar) FetchFar(line);
      else __builtin_prefetch(line);
    }
  }
};

template <typename Panel>
constexpr bool IsExpanded(Panel) { return false; }
constexpr bool IsExpanded(ExpandedPanel) { return true; }

// acc [kRows][64] (+)= x rows * kStripVecs columns of the panel, over `steps` k-steps.
template <typename Panel, int kRows, bool kFromZero>
void Strip(const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  Vec sum[kRows][kStripVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = kFromZero ? Zero() : Load(acc + r * kPanel + c * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (!IsExpanded(Panel{})) {
      for (int line = 0; line < Panel::kStepBytes; line += 64) {
        __builtin_prefetch(panel + kPrefetchSteps * Panel::kStepBytes + line);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < Panel::kStep; ++j) {
      Vec w[kStripVecs];
#pragma GCC unroll 4
      for (int c = 0; c < kStripVecs; ++c) w[c] = Panel::Load(panel + c * Panel::kVecBytes, j);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Vec a = Broadcast(x[r * x_stride + j]);
#pragma GCC unroll 4
        for (int c = 0; c < kStripVecs; ++c) sum[r][c] = Fma(a, w[c], sum[r][c]);
      }
    }
    x += Panel::kStep;
    panel += Panel::kStepBytes;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kStripVecs; ++c) Store(acc + r * kPanel + c * kLanes, sum[r][c]);
  }
}

#if defined(TTSK_DOT_PAIRS)
// The same with x as bf16 pairs (stored in the float workspace, one pair per 4 bytes). Meanwhile Fetched lines a step come in,
// from `ahead` on.
template <int kRows, bool kFromZero, typename Fetched>
void DotStrip(const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, const uint8_t* ahead, float* acc) {
  Vec sum[kRows][kStripVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = kFromZero ? Zero() : Load(acc + r * kPanel + c * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    Fetched::Fetch(ahead, s);
    Pairs w[kStripVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) w[c] = LoadPairs(panel + c * 64);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Pairs a = BroadcastPair(FloatToBits(x[r * x_stride + s]));
#pragma GCC unroll 4
      for (int c = 0; c < kStripVecs; ++c) sum[r][c] = DotPairs(sum[r][c], w[c], a);
    }
    panel += kPanel * 4;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) Store(acc + r * kPanel + c * kLanes, sum[r][c]);
  }
}
#endif
template <int kRows, bool kFromZero, typename Panel>
void RunStrip(Panel, const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  Strip<Panel, kRows, kFromZero>(x, x_stride, panel, steps, acc);
}

// One group of 1..6 rows, all 64 columns.
template <typename Panel, bool kFromZero>
void Group(int rows, const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  for (int c = 0; c < kPanel / kLanes; c += kStripVecs) {
    const uint8_t* w = panel + c * Panel::kVecBytes;
    float* out = acc + c * kLanes;
    switch (rows) {
      case 1: RunStrip<1, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 2: RunStrip<2, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 3: RunStrip<3, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 4: RunStrip<4, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 5: RunStrip<5, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      default: RunStrip<6, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
    }
  }
}

// Groups of nearly equal size: 16 rows are 6 + 5 + 5.
template <typename F>
inline void ForGroups(int rows, F f) {
  const int groups = (rows + kGroupRows - 1) / kGroupRows, small = rows / groups, large = rows % groups;
  for (int g = 0, first = 0; g < groups; ++g) {
    const int size = small + (g < large ? 1 : 0);
    f(first, size);
    first += size;
  }
}

template <typename Panel>
void Multiply(const float* x, int64_t x_stride, const uint8_t* panel, int rows, int64_t steps, float* acc) {
  ForGroups(rows, [&](int first, int size) {
    Group<Panel, true>(size, x + first * x_stride, x_stride, panel, steps, acc + first * kPanel);
  });
}

// Few rows: the first groups fetch a whole step each, or half of one where a block is so long that it comes early enough.
constexpr int LinesAStep(int rows, bool long_blocks) {
  return rows <= kGroupRows ? 4 : rows > kFewRows ? 1 : long_blocks ? 2 : 4;
}

template <bool kValue>
struct Constant { static constexpr bool value = kValue; };

// Calls f(whether sums begin at zero, what to fetch): `lines` a step, 0 or as many as LinesAStep says.
template <typename F>
inline void WithFetch(bool from_zero, int lines, int rows, F f) {
  const auto with_lines = [&](auto zero) {
    if (lines == 0) f(zero, LinesAhead<0, false>{});
    else if (lines == 1) f(zero, LinesAhead<1, true>{});
    else if (lines == 2) f(zero, LinesAhead<2, true>{});
    else if (rows > kGroupRows) f(zero, LinesAhead<4, true>{});
    else f(zero, LinesAhead<4, false>{});
  };
  if (from_zero) with_lines(Constant<true>{});
  else with_lines(Constant<false>{});
}

#if defined(TTSK_DOT_PAIRS)
template <bool kFromZero, typename Fetched>
void DotGroup(int rows, const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, const uint8_t* ahead,
              float* acc) {
  for (int c = 0; c < kPanel; c += kStripVecs * kLanes, panel += kStripVecs * 64, acc += kStripVecs * kLanes) {
    switch (rows) {
      case 1: DotStrip<1, kFromZero, Fetched>(x, x_stride, panel, steps, ahead, acc); break;
      case 2: DotStrip<2, kFromZero, Fetched>(x, x_stride, panel, steps, ahead, acc); break;
      case 3: DotStrip<3, kFromZero, Fetched>(x, x_stride, panel, steps, ahead, acc); break;
      case 4: DotStrip<4, kFromZero, Fetched>(x, x_stride, panel, steps, ahead, acc); break;
      case 5: DotStrip<5, kFromZero, Fetched>(x, x_stride, panel, steps, ahead, acc); break;
      default: DotStrip<6, kFromZero, Fetched>(x, x_stride, panel, steps, ahead, acc); break;
    }
  }
}

// One group: the panel streams by. More: blocks of it in turn, each while the next one arrives, the accumulators waiting in
// memory in between (exact).
inline void MultiplyDot(const float* x, int64_t x_stride, const uint8_t* panel, int rows, int64_t steps, float* acc) {
  constexpr int64_t kStepBytes = kPanel * 4;
  if (rows <= kGroupRows) {
    return DotGroup<true, LinesAhead<4, false>>(rows, x, x_stride, panel, steps, panel + kDotAhead * kStepBytes, acc);
  }
  const int64_t l1 = L1CacheBytes();
  const bool long_blocks = l1 > 0 && l1 < kL1OfTwoBlocks;
  const int64_t block = long_blocks ? kDotStepsOfL2 : kDotSteps;
  const int lines = LinesAStep(rows, long_blocks);
  for (int64_t s = 0; s < steps; s += block, panel += block * kStepBytes) {
    const int64_t count = steps - s < block ? steps - s : block;
    int64_t fetched = 0;
    ForGroups(rows, [&](int first, int size) {
      const uint8_t* ahead = panel + count * kStepBytes + fetched;
      WithFetch(s == 0, fetched < block * kStepBytes ? lines : 0, rows, [&](auto from_zero, auto ahead_of_step) {
        DotGroup<decltype(from_zero)::value, decltype(ahead_of_step)>(size, x + first * x_stride + s, x_stride, panel,
                                                                      count, ahead, acc + first * kPanel);
      });
      fetched += lines * count * 64;
    });
  }
}
#endif

template <typename Panel>
void MultiplyExpanded(const float* x, int64_t x_stride, const uint8_t* panel, int rows, int64_t steps, float* acc) {
  alignas(64) float wide[kBlockK * kPanel];
  const int64_t block_steps = kBlockK / Panel::kStep;
  for (int64_t s0 = 0; s0 < steps; s0 += block_steps) {
    const int64_t count = steps - s0 < block_steps ? steps - s0 : block_steps;
    for (int64_t s = 0; s < count; ++s) {
      const uint8_t* from = panel + (s0 + s) * Panel::kStepBytes;
      for (int line = 0; line < Panel::kStepBytes; line += 64) {
        __builtin_prefetch(from + block_steps * Panel::kStepBytes + line);  // the next block arrives during this one
      }
      for (int c = 0; c < kPanel / kLanes; ++c) {
        for (int j = 0; j < Panel::kStep; ++j) {
          Store(wide + (s * Panel::kStep + j) * kPanel + c * kLanes, Panel::Load(from + c * Panel::kVecBytes, j));
        }
      }
    }
    const float* x0 = x + s0 * Panel::kStep;
    const uint8_t* w = reinterpret_cast<const uint8_t*>(wide);
    const int64_t k = count * Panel::kStep;
    ForGroups(rows, [&](int first, int size) {
      const float* xg = x0 + first * x_stride;
      float* out = acc + first * kPanel;
      if (s0 == 0) {
        Group<ExpandedPanel, true>(size, xg, x_stride, w, k, out);
      } else {
        Group<ExpandedPanel, false>(size, xg, x_stride, w, k, out);
      }
    });
  }
}

// acc [rows][64] = x rows (at most kBlockRows; float32, or bf16 pairs for `dot`) times a panel of `dtype`.
inline void MultiplyPanel(DType dtype, bool dot, const float* x, int64_t x_stride, const uint8_t* panel, int rows,
                          int64_t steps, float* acc) {
  const bool direct = rows <= kDirectGroups * kGroupRows;
  if (dtype == DType::kFloat32) {
    Multiply<Float32Panel>(x, x_stride, panel, rows, steps, acc);
#if defined(TTSK_DOT_PAIRS)
  } else if (dot) {
    MultiplyDot(x, x_stride, panel, rows, steps, acc);
#endif
  } else if (dtype == DType::kFloat16) {
    (direct ? Multiply<Fp16Panel> : MultiplyExpanded<Fp16Panel>)(x, x_stride, panel, rows, steps, acc);
  } else {
    (direct ? Multiply<Bf16Panel> : MultiplyExpanded<Bf16Panel>)(x, x_stride, panel, rows, steps, acc);
  }
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
