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

// acc [kRows][64] (+)= one group of kRows rows times kStripVecs columns.
template <int kRows, bool kFromZero>
void FixedStrip(const FixedRows& x, int64_t row, int64_t group, const int16_t* words, const float* scales, float* acc) {
  Ints sum[kRows][kStripVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = ZeroInts();
  }
  const int64_t stride = x.groups * kFixedGroup;
  const int16_t* values = x.values + row * stride + group * kFixedGroup;
  for (int s = 0; s < kFixedGroup; s += 2) {
    Words w[kStripVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) w[c] = LoadWords(words + s * kPanel + c * 2 * kLanes);
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

inline void FixedGroupRows(int rows, const FixedRows& x, int64_t row, int64_t group, const int16_t* words,
                           const float* scales, float* acc) {
  const bool zero = group == 0;
  for (int c = 0; c < kPanel; c += kStripVecs * kLanes, words += kStripVecs * 2 * kLanes, acc += kStripVecs * kLanes) {
    const float* s = scales + c;
    switch (rows) {
      case 1: (zero ? FixedStrip<1, true> : FixedStrip<1, false>)(x, row, group, words, s, acc); break;
      case 2: (zero ? FixedStrip<2, true> : FixedStrip<2, false>)(x, row, group, words, s, acc); break;
      case 3: (zero ? FixedStrip<3, true> : FixedStrip<3, false>)(x, row, group, words, s, acc); break;
      case 4: (zero ? FixedStrip<4, true> : FixedStrip<4, false>)(x, row, group, words, s, acc); break;
      case 5: (zero ? FixedStrip<5, true> : FixedStrip<5, false>)(x, row, group, words, s, acc); break;
      default: (zero ? FixedStrip<6, true> : FixedStrip<6, false>)(x, row, group, words, s, acc); break;
    }
  }
}

// acc [rows][64] = `rows` rows from `row` on (at most kBlockRows) times a panel of T.
template <typename T>
void MultiplyFixed(const FixedRows& x, int64_t row, int rows, const uint8_t* panel, float* acc) {
  alignas(64) int16_t wide[kFixedGroup * kPanel];
  const int64_t block = FixedBlockBytes(sizeof(T));
  for (int64_t g = 0; g < x.groups; ++g, panel += block) {
    const float* scales = reinterpret_cast<const float*>(panel);
    const uint8_t* packed = panel + kPanel * 4;
    for (int64_t line = 0; line < block; line += 64) __builtin_prefetch(panel + block + line);
    const int16_t* words = reinterpret_cast<const int16_t*>(packed);
    if constexpr (sizeof(T) == 1) {
      for (int i = 0; i < kFixedGroup * kPanel; i += 2 * kLanes) {
        WidenBytes(reinterpret_cast<const int8_t*>(packed) + i, wide + i);
      }
      words = wide;
    }
    ForGroups(rows, [&](int first, int size) {
      FixedGroupRows(size, x, row + first, g, words, scales, acc + first * kPanel);
    });
  }
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
