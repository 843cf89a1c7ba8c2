// AVX2 form of Vec: two registers. See vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ttsk::TTSK_ISA {

struct Vec { __m256 lo, hi; };

inline Vec Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void Store(float* p, Vec a) { _mm256_storeu_ps(p, a.lo), _mm256_storeu_ps(p + 8, a.hi); }
inline Vec Broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Vec Add(Vec a, Vec b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Vec Sub(Vec a, Vec b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline Vec Mul(Vec a, Vec b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Vec Div(Vec a, Vec b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline Vec Max(Vec a, Vec b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline Vec Fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline Vec RoundNearest(Vec a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, mode), _mm256_round_ps(a.hi, mode)};
}
// In two factors, so that results down to the smallest denormal and up to FLT_MAX come out right.
inline __m256 ScaleHalf(__m256 a, __m256 n) {
  n = _mm256_min_ps(_mm256_max_ps(n, _mm256_set1_ps(-250.0f)), _mm256_set1_ps(250.0f));
  const __m256i k = _mm256_cvtps_epi32(n);
  const __m256i k1 = _mm256_srai_epi32(k, 1), k2 = _mm256_sub_epi32(k, k1), bias = _mm256_set1_epi32(127);
  const __m256 s1 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k1, bias), 23));
  const __m256 s2 = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(k2, bias), 23));
  return _mm256_mul_ps(_mm256_mul_ps(a, s1), s2);
}
inline Vec ScaleByPow2(Vec a, Vec n) { return {ScaleHalf(a.lo, n.lo), ScaleHalf(a.hi, n.hi)}; }
inline float ReduceMax(Vec a) {
  const __m256 m = _mm256_max_ps(a.lo, a.hi);
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float First(Vec a) { return _mm256_cvtss_f32(a.lo); }
inline float ReduceAdd(Vec a) {
  const __m256 m = _mm256_add_ps(a.lo, a.hi);
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline Vec SelectFirst(int n, Vec a, Vec b) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256 lo = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane));
  const __m256 hi = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane));
  return {_mm256_blendv_ps(b.lo, a.lo, lo), _mm256_blendv_ps(b.hi, a.hi, hi)};
}
inline bool AnyGreater(Vec a, Vec b) {
  const __m256 greater = _mm256_or_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ));
  return _mm256_movemask_ps(greater) != 0;
}
inline Vec SelectLess(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}

inline __m256 Bf16Half(const uint16_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Vec LoadBf16(const uint16_t* p) { return {Bf16Half(p), Bf16Half(p + 8)}; }
inline Vec LoadFp16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline void StoreBf16Half(uint16_t* p, __m256 a) {
  const __m256i bits = _mm256_castps_si256(a);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256 nan = _mm256_cmp_ps(a, a, _CMP_UNORD_Q);
  const __m256 quiet = _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_set1_epi32(0x400000)));
  const __m256i out = _mm256_srli_epi32(
      _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet, nan)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(out, out), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void StoreBf16(uint16_t* p, Vec a) { StoreBf16Half(p, a.lo), StoreBf16Half(p + 8, a.hi); }
inline void StoreFp16(uint16_t* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}

struct Pairs { __m256i lo, hi; };
inline Pairs LoadPairs(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Vec Even(Pairs a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(a.lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(a.hi, 16))};
}
inline Vec Odd(Pairs a) {
  const __m256i mask = _mm256_set1_epi32(0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(a.lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(a.hi, mask))};
}

struct Ints { __m256i lo, hi; };
struct Words { __m256i lo, hi; };
inline Ints ZeroInts() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints BroadcastInts(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Vec ToFloat(Ints a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline Words LoadWords(const int16_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
inline Words BroadcastWords(const int16_t* pair) {
  const __m256i a = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(pair));
  return {a, a};
}
inline Ints DotWords(Ints acc, Words a, Words b) {
  return {_mm256_add_epi32(acc.lo, _mm256_madd_epi16(a.lo, b.lo)),
          _mm256_add_epi32(acc.hi, _mm256_madd_epi16(a.hi, b.hi))};
}
inline void StoreRounded(int16_t* p, Vec a) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(words, 0xd8));
}
inline Words LoadBytes(const int8_t* from) {
  const __m128i* p = reinterpret_cast<const __m128i*>(from);
  return {_mm256_cvtepi8_epi16(_mm_loadu_si128(p)), _mm256_cvtepi8_epi16(_mm_loadu_si128(p + 1))};
}
inline void WidenBytes(const int8_t* from, int16_t* to) {
  const Words wide = LoadBytes(from);
  __m256i* out = reinterpret_cast<__m256i*>(to);
  _mm256_storeu_si256(out, wide.lo);
  _mm256_storeu_si256(out + 1, wide.hi);
}
inline Ints MaxMagnitude(Ints most, Vec a) {
  const __m256i bits = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_max_epi32(most.lo, _mm256_and_si256(_mm256_castps_si256(a.lo), bits)),
          _mm256_max_epi32(most.hi, _mm256_and_si256(_mm256_castps_si256(a.hi), bits))};
}
inline int32_t ReduceMax(Ints a) {
  const __m256i x = _mm256_max_epi32(a.lo, a.hi);
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1)));
}
inline Words EvenBytes(const uint8_t* from) {
  const __m256i low = _mm256_set1_epi16(255), *p = reinterpret_cast<const __m256i*>(from);
  return {_mm256_and_si256(_mm256_loadu_si256(p), low), _mm256_and_si256(_mm256_loadu_si256(p + 1), low)};
}
inline Words OddBytes(const uint8_t* from) {
  const __m256i* p = reinterpret_cast<const __m256i*>(from);
  return {_mm256_srli_epi16(_mm256_loadu_si256(p), 8), _mm256_srli_epi16(_mm256_loadu_si256(p + 1), 8)};
}
template <int kStep>
inline __m256 HalfButterfly(__m256 a) {
  __m256 other;
  if constexpr (kStep == 1) other = _mm256_permute_ps(a, 0xb1);
  else if constexpr (kStep == 2) other = _mm256_permute_ps(a, 0x4e);
  else other = _mm256_permute2f128_ps(a, a, 1);
  constexpr int kUpper = kStep == 1 ? 0xaa : kStep == 2 ? 0xcc : 0xf0;
  return _mm256_blend_ps(_mm256_add_ps(a, other), _mm256_sub_ps(other, a), kUpper);
}
template <int kStep>
inline Vec Butterfly(Vec a) {
  if constexpr (kStep == 8) return {_mm256_add_ps(a.lo, a.hi), _mm256_sub_ps(a.lo, a.hi)};
  else return {HalfButterfly<kStep>(a.lo), HalfButterfly<kStep>(a.hi)};
}

}  // namespace ttsk::TTSK_ISA
