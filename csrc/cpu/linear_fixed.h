// Microkernel of linear for fixed-point weights: integer dot products of groups of 64, exact, scaled and added up as
// float32. Twice the rate of float32 multiply-adds where the CPU has VNNI. Included by kernels/linear.cpp.
#pragma once

#include "fixed_vector.h"
#include "linear_micro.h"

namespace ttsk::TTSK_ISA {
namespace {

// Rows of x: [rows][groups * 64] int16 and, behind them, [rows][groups] scales.
struct FixedRows {
  const int16_t* values;
  const float* scales;
  int64_t groups;
};

// A row of x to int16, a scale for each group of 64; T is its type.
template <typename T>
void FixRow(const T* x, int64_t k, float most_value, int16_t* values, float* scales) {
  for (int64_t first = 0; first < k; first += kFixedGroup, values += kFixedGroup, ++scales) {
    Vec v[kFixedGroup / kLanes], most = Zero();
    for (int c = 0; c < kFixedGroup / kLanes; ++c) {
      const int64_t left = k - first - c * kLanes;
      v[c] = left >= kLanes ? LoadAs(x + first + c * kLanes)
                            : left > 0 ? LoadTail(x + first + c * kLanes, static_cast<int>(left)) : Zero();
      most = Max(Abs(v[c]), most);
    }
    Vec zero = Zero();
    for (const Vec& a : v) zero = Add(zero, Sub(a, a));
    const FixedScale fixed = ScaleOf(most, zero, most_value);
    *scales = fixed.scale;
    const Vec up = Broadcast(fixed.up);
    for (int c = 0; c < kFixedGroup / kLanes; ++c) {
      StoreRounded(values + c * kLanes, fixed.up > 0.0f ? Mul(v[c], up) : Zero());
    }
  }
}

inline Words WideWords(const int16_t* p) { return LoadWords(p); }
inline Words WideWords(const int8_t* p) { return LoadBytes(p); }

// acc [kRows][64] (+)= one group of kRows rows times kStripVecs columns. Meanwhile kLines cache lines a step are fetched
// from `ahead` on: all at once they would fill the line buffers, and the core would wait.
template <int kRows, bool kFromZero, int kLines, typename T>
void FixedStrip(const FixedRows& x, int64_t row, int64_t group, const T* words, const float* scales,
                const uint8_t* ahead, float* acc) {
  Ints sum[kRows][kStripVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = ZeroInts();
  }
  const int64_t stride = x.groups * kFixedGroup;
  const int16_t* values = x.values + row * stride + group * kFixedGroup;
  for (int s = 0; s < kFixedGroup; s += 2) {
    for (int l = 0; l < kLines; ++l) __builtin_prefetch(ahead + (s / 2 * kLines + l) * 64);
    Words w[kStripVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) w[c] = WideWords(words + s * kPanel + c * 2 * kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Words a = BroadcastWords(values + r * stride + s);
#pragma GCC unroll 4
      for (int c = 0; c < kStripVecs; ++c) sum[r][c] = DotWords(sum[r][c], w[c], a);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const Vec scale = Broadcast(x.scales[(row + r) * x.groups + group]);
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) {
      float* to = acc + r * kPanel + c * kLanes;
      const Vec product = Mul(ToFloat(sum[r][c]), Load(scales + c * kLanes));
      Store(to, Fma(product, scale, kFromZero ? Zero() : Load(to)));
    }
  }
}

template <bool kFromZero, int kLines, typename T>
void FixedGroupRows(int rows, const FixedRows& x, int64_t row, int64_t group, const T* words,
                    const float* scales, const uint8_t* ahead, float* acc) {
  for (int c = 0; c < kPanel; c += kStripVecs * kLanes, words += kStripVecs * 2 * kLanes, acc += kStripVecs * kLanes) {
    const float* s = scales + c;
    switch (rows) {
      case 1: FixedStrip<1, kFromZero, kLines>(x, row, group, words, s, ahead, acc); break;
      case 2: FixedStrip<2, kFromZero, kLines>(x, row, group, words, s, ahead, acc); break;
      case 3: FixedStrip<3, kFromZero, kLines>(x, row, group, words, s, ahead, acc); break;
      case 4: FixedStrip<4, kFromZero, kLines>(x, row, group, words, s, ahead, acc); break;
      case 5: FixedStrip<5, kFromZero, kLines>(x, row, group, words, s, ahead, acc); break;
      default: FixedStrip<6, kFromZero, kLines>(x, row, group, words, s, ahead, acc); break;
    }
  }
}

// acc [rows][64] = `rows` rows from `row` on (at most kBlockRows) times a panel of T. Bytes are widened in registers for one
// group of rows, once for several.
template <typename T>
void MultiplyFixed(const FixedRows& x, int64_t row, int rows, const uint8_t* panel, float* acc) {
  constexpr int kSteps = kFixedGroup / 2;
  const int64_t block = FixedBlockBytes(sizeof(T));
  const bool few = rows <= kFewRows;
  for (int64_t g = 0; g < x.groups; ++g, panel += block) {
    const float* scales = reinterpret_cast<const float*>(panel);
    const T* packed = reinterpret_cast<const T*>(panel + kPanel * 4);
    const auto multiply = [&](const auto* words) {
      int fetched = 0;
      ForGroups(rows, [&](int first, int size) {
        const uint8_t* ahead = panel + block + fetched * 64;
        WithFetch(g == 0, fetched * 64 < block, few, [&](auto from_zero, auto lines) {
          FixedGroupRows<decltype(from_zero)::value, decltype(lines)::value>(size, x, row + first, g, words, scales, ahead,
                                                                             acc + first * kPanel);
        });
        fetched += few ? 4 * kSteps : kSteps;
      });
    };
    if constexpr (sizeof(T) == 1) {
      if (rows > kGroupRows) {
        alignas(64) int16_t wide[kFixedGroup * kPanel];
        for (int i = 0; i < kFixedGroup * kPanel; i += 2 * kLanes) WidenBytes(packed + i, wide + i);
        multiply(static_cast<const int16_t*>(wide));
        continue;
      }
    }
    multiply(packed);
  }
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
