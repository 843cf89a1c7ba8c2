// Microkernel of linear for fixed-point weights: integer dot products of groups, exact, scaled and added up as
// float32. Where the CPU has VNNI, int16 goes at twice the rate of float32 multiply-adds and int8 at four times. Included by
// kernels/linear.cpp.
#pragma once

#include "fixed_vector.h"
#include "linear_micro.h"

namespace ttsk::TTSK_ISA {
namespace {

// Rows of x: integers [rows][groups' sizes] and, [groups][rows], their scale and what a sum of their products begins with.
struct FixedRows {
  void* values;
  float* scales;
  int32_t* begins;
  FixedGroups groups;
  int64_t rows;

  int64_t stride() const { return groups.count * groups.size(); }
};
constexpr int kUnitVecs = kFixedUnit / kLanes;

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
    for (int c = 0; c < kUnitVecs; ++c) StoreRounded(p + c * kLanes, v[c]);
    return 0;
  }
};

// StoreX: a unit of values; returns its share of what a sum begins with.
// Weights are kept plus kByteZero, as unsigned bytes: a sum begins with -kByteZero times the sum of its x.
#if defined(TTSK_DOT_QUADS)
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
    for (int i = 0; i < kFixedUnit; ++i) sum += p[i];
    return -kByteZero * sum;
  }
};
#endif

// The Hadamard transform of 64 values, not scaled: it spreads an outlier over its group, which then loses less in int8
// (QuaRot, arXiv:2404.00456). Products of two become 64 times as large.
inline void Rotate(Vec* v) {
  for (int c = 0; c < 4; ++c) v[c] = Butterfly<8>(Butterfly<4>(Butterfly<2>(Butterfly<1>(v[c]))));
  const Vec a = Add(v[0], v[1]), b = Sub(v[0], v[1]), c = Add(v[2], v[3]), d = Sub(v[2], v[3]);
  v[0] = Add(a, c), v[1] = Add(b, d), v[2] = Sub(a, c), v[3] = Sub(b, d);
}

// Turns a group: every 64 by itself, then two 64s into sum and difference (products become twice as large again), or of three,
// two thirds of their sum from each (a reflection, so products stay).
template <int kUnits>
inline void TurnUnits(Vec* v) {
  for (int u = 0; u < kUnits; ++u) Rotate(v + u * kUnitVecs);
  for (int c = 0; c < kUnitVecs && kUnits > 1; ++c) {
    Vec &a = v[c], &b = v[c + kUnitVecs], &last = v[c + (kUnits - 1) * kUnitVecs];
    if (kUnits == 2) {
      const Vec sum = Add(a, b);
      b = Sub(a, b), a = sum;
    } else {
      const Vec most = Mul(Add(Add(a, b), last), Broadcast(kTwoThirds));
      a = Sub(a, most), b = Sub(b, most), last = Sub(last, most);
    }
  }
}

template <typename Form, int kUnits, typename T>
void FixGroups(const T* x, int64_t k, const FixedRows& out, int64_t row) {
  constexpr int kSize = kUnits * kFixedUnit;
  typename Form::X* values = static_cast<typename Form::X*>(out.values) + row * out.stride();
  for (int64_t first = 0, at = row; first < k; first += kSize, at += out.rows) {
    Vec v[kUnits * kUnitVecs];
    for (int c = 0; c < kUnits * kUnitVecs; ++c) {
      const int64_t left = k - first - c * kLanes;
      v[c] = left >= kLanes ? LoadAs(x + first + c * kLanes)
                            : left > 0 ? LoadTail(x + first + c * kLanes, static_cast<int>(left)) : Zero();
    }
    if (Form::kBytes) TurnUnits<kUnits>(v);
    Ints most = ZeroInts();
    for (const Vec& a : v) most = MaxMagnitude(most, a);
    const FixedScale fixed = ScaleOf(most, Form::kMost);
    out.scales[at] = fixed.scale;
    for (Vec& a : v) a = fixed.up > 0.0f ? Mul(a, Broadcast(fixed.up)) : Zero();
    int32_t begin = 0;
    for (int u = 0; u < kUnits; ++u, values += kFixedUnit) begin += Form::StoreX(values, v + u * kUnitVecs);
    out.begins[at] = begin;
  }
}

// Row `row` of `out` from k values of x; T is their type.
template <typename Form, typename T>
void FixRow(const T* x, int64_t k, const FixedRows& out, int64_t row) {
  if constexpr (Form::kBytes) {
    if (out.groups.units == 3) return FixGroups<Form, 3>(x, k, out, row);
    if (out.groups.units == 2) return FixGroups<Form, 2>(x, k, out, row);
  }
  FixGroups<Form, 1>(x, k, out, row);
}

// acc [kRows][64] (+)= one group of kRows rows times kStripVecs columns. Meanwhile Fetched lines a step come in, from
// `ahead` on: all at once they would fill the line buffers, and the core would wait.
template <typename Form, int kRows, bool kFromZero, typename Fetched>
void FixedStrip(const FixedRows& x, int64_t row, int64_t group, const uint8_t* weights, const float* scales,
                const uint8_t* ahead, float* acc) {
  constexpr int kParts = Form::kPerLane / Form::kStep;
  const int64_t stride = x.stride(), at = group * x.rows + row, steps = x.groups.size() / Form::kPerLane;
  const typename Form::X* values = static_cast<const typename Form::X*>(x.values) + row * stride + group * x.groups.size();
  Ints sum[kRows][kStripVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const Ints begin = Form::kBytes ? BroadcastInts(x.begins[at + r]) : ZeroInts();
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = begin;
  }
  for (int64_t s = 0; s < steps; ++s) {
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
  const int64_t steps = x.groups.size() / Form::kPerLane, block = x.groups.block_bytes(Form::kBytes ? 1 : 2);
  const int lines = LinesAStep(rows, false);
  for (int64_t g = 0; g < x.groups.count; ++g, panel += block) {
    const float* scales = reinterpret_cast<const float*>(panel);
    int64_t fetched = 0;
    ForGroups(rows, [&](int first, int size) {
      const uint8_t* ahead = panel + block + fetched * 64;
      WithFetch(g == 0, fetched * 64 < block ? lines : 0, rows, [&](auto from_zero, auto ahead_of_step) {
        FixedGroupRows<Form, decltype(from_zero)::value, decltype(ahead_of_step)>(
            size, x, row + first, g, panel + kPanel * 4, scales, ahead, acc + first * kPanel);
      });
      fetched += lines * steps;
    });
  }
}

}  // namespace
}  // namespace ttsk::TTSK_ISA
