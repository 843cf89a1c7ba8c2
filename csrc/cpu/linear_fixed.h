// Microkernel of linear for fixed-point weights: integer dot products of groups of 64, exact, scaled and added up as
// float32. Where the CPU has VNNI, int16 goes at twice the rate of float32 multiply-adds and int8 at four times. Included by
// kernels/linear.cpp.
#pragma once

#include "fixed_vector.h"
#include "linear_micro.h"

namespace ttsk::TTSK_ISA {
namespace {

// Rows of x: integers [rows][groups * 64] and, [groups][rows], their scale and what a sum of their products begins with.
struct FixedRows {
  void* values;
  float* scales;
  int32_t* begins;
  int64_t groups, rows;
};

// How a form multiplies: sixteen lanes at a time, each with 4 bytes of weights (kPerLane of them), kStep of which a product
// takes. `part`: which of them.
struct Int16Form {
  using X = int16_t;
  static constexpr bool kBytes = false;
  static constexpr float kMost = kMostRowOfWords;
  static constexpr int kPerLane = 2, kStep = 2;
  static Words LoadWeights(const uint8_t* p, int) { return LoadWords(reinterpret_cast<const int16_t*>(p)); }
  static Words LoadX(const int16_t* p) { return BroadcastWords(p); }
  static Ints Dot(Ints sum, Words w, Words x) { return DotWords(sum, w, x); }
  static int32_t StoreX(int16_t* p, const Vec* v) {
    for (int c = 0; c < kFixedGroup / kLanes; ++c) StoreRounded(p + c * kLanes, v[c]);
    return 0;
  }
};

// Weights are kept plus kByteZero, as unsigned bytes: a sum begins with -kByteZero times the sum of its 64 x.
#if defined(__AVX512VNNI__)
struct Int8Form {
  using X = int8_t;
  static constexpr bool kBytes = true;
  static constexpr float kMost = kMostByte;
  static constexpr int kPerLane = 4, kStep = 4;
  static Quads LoadWeights(const uint8_t* p, int) { return LoadQuads(p); }
  static Quads LoadX(const int8_t* p) { return BroadcastQuads(p); }
  static Ints Dot(Ints sum, Quads w, Quads x) { return DotQuads(sum, w, x); }
  static int32_t StoreX(int8_t* p, const Vec* v) { return -kByteZero * StoreQuads(p, v); }
};
#else
struct Int8Form : Int16Form {
  static constexpr bool kBytes = true;
  static constexpr float kMost = kMostByte;
  static constexpr int kPerLane = 4, kStep = 2;
  static Words LoadWeights(const uint8_t* p, int part) { return part == 0 ? EvenBytes(p) : OddBytes(p); }
  static int32_t StoreX(int16_t* p, const Vec* v) {
    Int16Form::StoreX(p, v);
    int32_t sum = 0;
    for (int i = 0; i < kFixedGroup; ++i) sum += p[i];
    return -kByteZero * sum;
  }
};
#endif

// The Hadamard transform of 64 values, not scaled: it spreads an outlier over its group, which then loses less in int8
// (QuaRot, arXiv:2404.00456). Products of two groups become 64 times as large.
inline void Rotate(Vec v[kFixedGroup / kLanes]) {
  for (int c = 0; c < 4; ++c) v[c] = Butterfly<8>(Butterfly<4>(Butterfly<2>(Butterfly<1>(v[c]))));
  const Vec a = Add(v[0], v[1]), b = Sub(v[0], v[1]), c = Add(v[2], v[3]), d = Sub(v[2], v[3]);
  v[0] = Add(a, c), v[1] = Add(b, d), v[2] = Sub(a, c), v[3] = Sub(b, d);
}

// Row `row` of `out` from k values of x; T is their type.
template <typename Form, typename T>
void FixRow(const T* x, int64_t k, const FixedRows& out, int64_t row) {
  using X = typename Form::X;
  X* values = static_cast<X*>(out.values) + row * out.groups * kFixedGroup;
  for (int64_t first = 0, at = row; first < k; first += kFixedGroup, values += kFixedGroup, at += out.rows) {
    Vec v[kFixedGroup / kLanes];
    for (int c = 0; c < kFixedGroup / kLanes; ++c) {
      const int64_t left = k - first - c * kLanes;
      v[c] = left >= kLanes ? LoadAs(x + first + c * kLanes)
                            : left > 0 ? LoadTail(x + first + c * kLanes, static_cast<int>(left)) : Zero();
    }
    if (Form::kBytes) Rotate(v);
    Ints most = ZeroInts();
    for (const Vec& a : v) most = MaxMagnitude(most, a);
    const FixedScale fixed = ScaleOf(most, Form::kMost);
    out.scales[at] = fixed.scale;
    for (Vec& a : v) a = fixed.up > 0.0f ? Mul(a, Broadcast(fixed.up)) : Zero();
    out.begins[at] = Form::StoreX(values, v);
  }
}

// acc [kRows][64] (+)= one group of kRows rows times kStripVecs columns. Meanwhile Fetched lines a step come in, from
// `ahead` on: all at once they would fill the line buffers, and the core would wait.
template <typename Form, int kRows, bool kFromZero, typename Fetched>
void FixedStrip(const FixedRows& x, int64_t row, int64_t group, const uint8_t* weights, const float* scales,
                const uint8_t* ahead, float* acc) {
  constexpr int kParts = Form::kPerLane / Form::kStep;
  const int64_t stride = x.groups * kFixedGroup, at = group * x.rows + row;
  const typename Form::X* values = static_cast<const typename Form::X*>(x.values) + row * stride + group * kFixedGroup;
  Ints sum[kRows][kStripVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const Ints begin = Form::kBytes ? BroadcastInts(x.begins[at + r]) : ZeroInts();
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = begin;
  }
  for (int s = 0; s < kFixedGroup / Form::kPerLane; ++s) {
    Fetched::Fetch(ahead, s);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      decltype(Form::LoadWeights(weights, 0)) w[kStripVecs];
#pragma GCC unroll 4
      for (int c = 0; c < kStripVecs; ++c) w[c] = Form::LoadWeights(weights + (s * (kPanel / kLanes) + c) * 64, part);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const auto a = Form::LoadX(values + r * stride + s * Form::kPerLane + part * Form::kStep);
#pragma GCC unroll 4
        for (int c = 0; c < kStripVecs; ++c) sum[r][c] = Form::Dot(sum[r][c], w[c], a);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const Vec scale = Broadcast(x.scales[at + r]);
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) {
      float* to = acc + r * kPanel + c * kLanes;
      const Vec product = Mul(ToFloat(sum[r][c]), Load(scales + c * kLanes));
      Store(to, Fma(product, scale, kFromZero ? Zero() : Load(to)));
    }
  }
}

template <typename Form, bool kFromZero, typename Fetched>
void FixedGroupRows(int rows, const FixedRows& x, int64_t row, int64_t group, const uint8_t* w, const float* scales,
                    const uint8_t* ahead, float* acc) {
  for (int c = 0; c < kPanel; c += kStripVecs * kLanes, w += kStripVecs * 64, acc += kStripVecs * kLanes) {
    const float* s = scales + c;
    switch (rows) {
      case 1: FixedStrip<Form, 1, kFromZero, Fetched>(x, row, group, w, s, ahead, acc); break;
      case 2: FixedStrip<Form, 2, kFromZero, Fetched>(x, row, group, w, s, ahead, acc); break;
      case 3: FixedStrip<Form, 3, kFromZero, Fetched>(x, row, group, w, s, ahead, acc); break;
      case 4: FixedStrip<Form, 4, kFromZero, Fetched>(x, row, group, w, s, ahead, acc); break;
      case 5: FixedStrip<Form, 5, kFromZero, Fetched>(x, row, group, w, s, ahead, acc); break;
      default: FixedStrip<Form, 6, kFromZero, Fetched>(x, row, group, w, s, ahead, acc); break;
    }
  }
}

// acc [rows][64] = `rows` rows from `row` on (at most kBlockRows) times a panel.
template <typename Form>
void MultiplyFixed(const FixedRows& x, int64_t row, int rows, const uint8_t* panel, float* acc) {
  constexpr int kSteps = kFixedGroup / Form::kPerLane;
  constexpr int64_t kBlock = FixedBlockBytes(Form::kBytes ? 1 : 2);
  const bool few = rows <= kFewRows;
  for (int64_t g = 0; g < x.groups; ++g, panel += kBlock) {
    const float* scales = reinterpret_cast<const float*>(panel);
    int fetched = 0;
    ForGroups(rows, [&](int first, int size) {
      const uint8_t* ahead = panel + kBlock + fetched * 64;
      WithFetch(g == 0, fetched * 64 < kBlock, rows, [&](auto from_zero, auto lines) {
        FixedGroupRows<Form, decltype(from_zero)::value, decltype(lines)>(
            size, x, row + first, g, panel + kPanel * 4, scales, ahead, acc + first * kPanel);
      });
      fetched += few ? 4 * kSteps : kSteps;
    });
  }
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
