// NEON form of Vec (AArch64): four registers. See vec.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace ttsk::TTSK_ISA {

struct Vec { float32x4_t q[4]; };

// One expression for each of the four registers.
#define TTSK_QUADS(expr)                                                                        \
  const auto quad = [&](int i) __attribute__((always_inline)) { return expr; };                 \
  return {{quad(0), quad(1), quad(2), quad(3)}};

inline Vec Load(const float* p) { TTSK_QUADS(vld1q_f32(p + 4 * i)) }
inline void Store(float* p, Vec a) {
  vst1q_f32(p, a.q[0]), vst1q_f32(p + 4, a.q[1]), vst1q_f32(p + 8, a.q[2]), vst1q_f32(p + 12, a.q[3]);
}
inline Vec Broadcast(float x) { TTSK_QUADS((void(i), vdupq_n_f32(x))) }
inline Vec Zero() { return Broadcast(0.0f); }
inline Vec Add(Vec a, Vec b) { TTSK_QUADS(vaddq_f32(a.q[i], b.q[i])) }
inline Vec Sub(Vec a, Vec b) { TTSK_QUADS(vsubq_f32(a.q[i], b.q[i])) }
inline Vec Mul(Vec a, Vec b) { TTSK_QUADS(vmulq_f32(a.q[i], b.q[i])) }
inline Vec Div(Vec a, Vec b) { TTSK_QUADS(vdivq_f32(a.q[i], b.q[i])) }
// a > b ? a : b as on x86; fmax would keep a NaN of either side.
inline float32x4_t MaxQuad(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
inline Vec Max(Vec a, Vec b) { TTSK_QUADS(MaxQuad(a.q[i], b.q[i])) }
inline Vec Fma(Vec a, Vec b, Vec c) { TTSK_QUADS(vfmaq_f32(c.q[i], a.q[i], b.q[i])) }
inline Vec RoundNearest(Vec a) { TTSK_QUADS(vrndnq_f32(a.q[i])) }
// In two factors, so that results down to the smallest denormal and up to FLT_MAX come out right.
inline float32x4_t ScaleQuad(float32x4_t a, float32x4_t n) {
  const int32x4_t k = vcvtnq_s32_f32(vminq_f32(vmaxq_f32(n, vdupq_n_f32(-250.0f)), vdupq_n_f32(250.0f)));
  const int32x4_t k1 = vshrq_n_s32(k, 1), k2 = vsubq_s32(k, k1), bias = vdupq_n_s32(127);
  const float32x4_t s1 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k1, bias), 23));
  const float32x4_t s2 = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(k2, bias), 23));
  return vmulq_f32(vmulq_f32(a, s1), s2);
}
inline Vec ScaleByPow2(Vec a, Vec n) { TTSK_QUADS(ScaleQuad(a.q[i], n.q[i])) }
inline float ReduceMax(Vec a) {
  const float32x4_t m = MaxQuad(MaxQuad(a.q[0], a.q[2]), MaxQuad(a.q[1], a.q[3]));
  const float32x4_t x = MaxQuad(m, vextq_f32(m, m, 2));
  return vgetq_lane_f32(MaxQuad(x, vextq_f32(x, x, 1)), 0);
}
inline float First(Vec a) { return vgetq_lane_f32(a.q[0], 0); }
inline float ReduceAdd(Vec a) {
  const float32x4_t m = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x4_t x = vaddq_f32(m, vextq_f32(m, m, 2));
  return vgetq_lane_f32(x, 0) + vgetq_lane_f32(x, 1);
}
inline Vec SelectFirst(int n, Vec a, Vec b) {
  const int32x4_t lane = {0, 1, 2, 3};
  TTSK_QUADS(vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n - 4 * i)), a.q[i], b.q[i]))
}
inline bool AnyGreater(Vec a, Vec b) {
  uint32x4_t greater = vcgtq_f32(a.q[0], b.q[0]);
  for (int i = 1; i < 4; ++i) greater = vorrq_u32(greater, vcgtq_f32(a.q[i], b.q[i]));
  return vmaxvq_u32(greater) != 0;
}
inline Vec SelectLess(Vec a, Vec b, Vec x, Vec y) { TTSK_QUADS(vbslq_f32(vcltq_f32(a.q[i], b.q[i]), x.q[i], y.q[i])) }

inline Vec LoadBf16(const uint16_t* p) { TTSK_QUADS(vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))) }
inline Vec LoadFp16(const uint16_t* p) { TTSK_QUADS(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)))) }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
inline void StoreBf16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_bf16(vcvt_bf16_f32(a.q[i])));
}
#else
inline void StoreBf16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.q[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p + 4 * i, vshrn_n_u32(vbslq_u32(vceqq_f32(a.q[i], a.q[i]), rounded, quiet), 16));
  }
}
#endif
inline void StoreFp16(uint16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.q[i])));
}

struct Pairs { uint32x4_t q[4]; };
inline Pairs LoadPairs(const void* p) { TTSK_QUADS(vld1q_u32(static_cast<const uint32_t*>(p) + 4 * i)) }
inline Vec Even(Pairs a) { TTSK_QUADS(vreinterpretq_f32_u32(vshlq_n_u32(a.q[i], 16))) }
inline Vec Odd(Pairs a) { TTSK_QUADS(vreinterpretq_f32_u32(vandq_u32(a.q[i], vdupq_n_u32(0xffff0000u)))) }
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define TTSK_DOT_PAIRS
inline bfloat16x8_t PairQuad(uint32x4_t a) { return vreinterpretq_bf16_u32(a); }
inline Vec DotPairs(Vec acc, Pairs a, Pairs b) { TTSK_QUADS(vbfdotq_f32(acc.q[i], PairQuad(a.q[i]), PairQuad(b.q[i]))) }
inline Pairs BroadcastPair(uint32_t pair) { TTSK_QUADS((void(i), vdupq_n_u32(pair))) }
#endif

struct Ints { int32x4_t q[4]; };
struct Words { int16x8_t q[4]; };
inline Ints ZeroInts() { TTSK_QUADS((void(i), vdupq_n_s32(0))) }
inline Ints BroadcastInts(int32_t x) { TTSK_QUADS((void(i), vdupq_n_s32(x))) }
inline Vec ToFloat(Ints a) { TTSK_QUADS(vcvtq_f32_s32(a.q[i])) }
inline Words LoadWords(const int16_t* p) { TTSK_QUADS(vld1q_s16(p + 8 * i)) }
inline Words BroadcastWords(const int16_t* pair) {
  TTSK_QUADS((void(i), vreinterpretq_s16_s32(vdupq_n_s32(*reinterpret_cast<const int32_t*>(pair)))))
}
inline int32x4_t DotQuad(int16x8_t a, int16x8_t b) {
  return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
}
inline Ints DotWords(Ints acc, Words a, Words b) { TTSK_QUADS(vaddq_s32(acc.q[i], DotQuad(a.q[i], b.q[i]))) }
inline void StoreRounded(int16_t* p, Vec a) {
  for (int i = 0; i < 4; ++i) vst1_s16(p + 4 * i, vmovn_s32(vcvtnq_s32_f32(a.q[i])));
}
inline Words LoadBytes(const int8_t* p) { TTSK_QUADS(vmovl_s8(vld1_s8(p + 8 * i))) }
inline void WidenBytes(const int8_t* from, int16_t* to) {
  for (int i = 0; i < 4; ++i) vst1q_s16(to + 8 * i, vmovl_s8(vld1_s8(from + 8 * i)));
}
inline Ints MaxMagnitude(Ints most, Vec a) {
  TTSK_QUADS(vmaxq_s32(most.q[i], vreinterpretq_s32_f32(vabsq_f32(a.q[i]))))
}
inline int32_t ReduceMax(Ints a) {
  return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q[0], a.q[1]), vmaxq_s32(a.q[2], a.q[3])));
}
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define TTSK_DOT_QUADS
struct Quads { uint32x4_t q[4]; };
inline Quads LoadQuads(const uint8_t* p) { TTSK_QUADS(vreinterpretq_u32_u8(vld1q_u8(p + 16 * i))) }
inline Quads BroadcastQuads(const int8_t* four) {
  TTSK_QUADS((void(i), vdupq_n_u32(*reinterpret_cast<const uint32_t*>(four))))
}
inline Ints DotQuads(Ints acc, Quads a, Quads b) {
  TTSK_QUADS(vusdotq_s32(acc.q[i], vreinterpretq_u8_u32(a.q[i]), vreinterpretq_s8_u32(b.q[i])))
}
inline int32_t StoreQuads(int8_t* p, const Vec* v) {
  const auto words = [](float32x4_t a) __attribute__((always_inline)) { return vmovn_s32(vcvtnq_s32_f32(a)); };
  constexpr uint8_t kTurned[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  int32_t sum = 0;
  for (int i = 0; i < 4; ++i) {
    const int16x8_t low = vcombine_s16(words(v[i].q[0]), words(v[i].q[1]));
    const int16x8_t high = vcombine_s16(words(v[i].q[2]), words(v[i].q[3]));
    const int8x16_t bytes = vcombine_s8(vmovn_s16(low), vmovn_s16(high));
    vst1q_s8(p + 16 * i, vqtbl1q_s8(bytes, vld1q_u8(kTurned)));
    sum += vaddlvq_s8(bytes);
  }
  return sum;
}
#endif
inline int16x8_t SixteenBytes(const uint8_t* p) { return vreinterpretq_s16_u8(vld1q_u8(p)); }
inline Words EvenBytes(const uint8_t* p) { TTSK_QUADS(vandq_s16(SixteenBytes(p + 16 * i), vdupq_n_s16(255))) }
inline Words OddBytes(const uint8_t* p) {
  TTSK_QUADS(vreinterpretq_s16_u16(vshrq_n_u16(vreinterpretq_u16_s16(SixteenBytes(p + 16 * i)), 8)))
}
// Within four lanes: signs of a, and the lanes at a distance of kStep.
template <int kStep>
inline float32x4_t QuadButterfly(float32x4_t a) {
  constexpr float kSigns[4] = {1.0f, kStep == 1 ? -1.0f : 1.0f, kStep == 2 ? -1.0f : 1.0f, -1.0f};
  return vfmaq_f32(kStep == 1 ? vrev64q_f32(a) : vextq_f32(a, a, 2), a, vld1q_f32(kSigns));
}
template <int kStep>
inline Vec Butterfly(Vec a) {
  if constexpr (kStep < 4) {
    TTSK_QUADS(QuadButterfly<kStep>(a.q[i]))
  } else {
    TTSK_QUADS(i & kStep / 4 ? vsubq_f32(a.q[i - kStep / 4], a.q[i]) : vaddq_f32(a.q[i], a.q[i + kStep / 4]))
  }
}
#undef TTSK_QUADS

}  // namespace ttsk::TTSK_ISA
