// AVX-512 form of Vec. See vec.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace ttsk::TTSK_ISA {

struct Vec { __m512 v; };
struct Lanes { float v[16]; };

inline Vec Load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void Store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline Vec Broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec Zero() { return {_mm512_setzero_ps()}; }
inline Vec Add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec Sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec Mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec Div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec Max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec Fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline Vec RoundNearest(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^floor(n), 0 where x < least.
inline Vec ScaleUnlessLess(Vec x, Vec least, Vec a, Vec n) {
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, least.v, _CMP_NLT_UQ), a.v, n.v)};
}
inline float ReduceMax(Vec a) {  // gcc 12 warns about _mm512_reduce_max_ps
  a.v = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0x4e));
  a.v = _mm512_max_ps(a.v, _mm512_shuffle_f32x4(a.v, a.v, 0xb1));
  const __m128 x = _mm512_castps512_ps128(a.v), y = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
}
inline float First(Vec a) { return _mm512_cvtss_f32(a.v); }
inline float ReduceAdd(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline bool AnyGreater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ) != 0; }
// Lanes 0..n-1 of a, the rest of b.
inline Vec SelectFirst(int n, Vec a, Vec b) {
  return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u), a.v)};
}
// Per lane, a < b ? x : y.
inline Vec SelectLess(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_mov_ps(y.v, _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), x.v)};
}

inline Vec LoadBf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vec LoadFp16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
#if defined(__AVX512BF16__)
// To nearest even; denormals become 0.
inline void StoreBf16(uint16_t* p, Vec a) {
  __m512 bits;
  asm("vcvtneps2bf16 %1, %t0" : "=v"(bits) : "v"(a.v));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(_mm512_castps_si512(bits)));
}
#else
inline void StoreBf16(uint16_t* p, Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i out = _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(out));
}
#endif
inline void StoreFp16(uint16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

// Sixteen bf16 pairs {even, odd}, 64 bytes: the unit of the packed K, V and weight layouts.
struct Pairs { __m512i v; };
// A load that is made once: gcc 12 repeats those of the intrinsic for every use when it would else spill, and a loop of 24
// products then loads 15 times instead of 4.
inline __m512i LoadOnce(const void* p) {
  __m512i v;
  asm("vmovdqu64 %1, %0" : "=v"(v) : "m"(*static_cast<const char(*)[64]>(p)));
  return v;
}
inline Pairs LoadPairs(const void* p) { return {LoadOnce(p)}; }
inline Vec Even(Pairs a) { return {_mm512_castsi512_ps(_mm512_slli_epi32(a.v, 16))}; }
inline Vec Odd(Pairs a) { return {_mm512_castsi512_ps(_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff0000)))}; }
#if defined(__AVX512BF16__)
#define TTSK_DOT_PAIRS
// acc + even * even + odd * odd in one instruction (denormals flushed). Twice the rate of two FMAs on AMD Zen 4.
inline Vec DotPairs(Vec acc, Pairs a, Pairs b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));  // gcc 12 loads a again for every use of the intrinsic
  return acc;
}
inline Pairs BroadcastPair(uint32_t pair) { return {_mm512_set1_epi32(static_cast<int>(pair))}; }
// 2^(i / 32).
alignas(64) constexpr float kExp2Steps[32] = {
    1.0f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f, 1.18920708f,
    1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f, 1.41421354f,
    1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f, 1.68179286f,
    1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f};
// 2^r for r in [0, 1/32), 1 at 0 and what the next step begins with at its end; what moves multiples of 1/32 to the last bits.
constexpr float kExp2Terms[] = {0.24284f, 0.693120007f, 1.0f, 393216.0f};
// e = 2^(s - m), relative error < 2e-7; sum += e, `to` = bf16 of e, 0 below 2^-126. A table and a short polynomial, because
// multiply-adds share two units with products of pairs while others idle (on Zen 4 comparisons share them too); in assembly
// because it stands in loops of such products, which leave it few registers, so that all constants come from memory.
inline void Exp2Bf16(const float* s, const float* m, void* to, Vec* sum) {
  __m512 x, r, p, step;
  asm("vmovups %[s], %[x]\n\t"
      "vsubps %[m]%{1to16%}, %[x], %[x]\n\t"
      "vbroadcastss %[shift], %[step]\n\t"
      "vaddps %{rd-sae%}, %[x], %[step], %[step]\n\t"  // floor(32 x), of which the permutation takes 5 bits
      "vmovaps %[steps], %[p]\n\t"
      "vpermi2ps %[more], %[p], %[step]\n\t"
      "vreduceps $0x59, %[x], %[r]\n\t"  // x - floor(32 x) / 32
      "vbroadcastss %[c2], %[p]\n\t"
      "vfmadd213ps %[c1]%{1to16%}, %[r], %[p]\n\t"
      "vfmadd213ps %[c0]%{1to16%}, %[r], %[p]\n\t"
      "vmulps %[step], %[p], %[p]\n\t"
      "vscalefps %[x], %[p], %[p]\n\t"
      "vcvtneps2bf16 %[p], %t[r]\n\t"
      "vmovups %t[r], %[to]\n\t"
      "vaddps %[p], %[sum], %[sum]"
      : [x] "=&v"(x), [r] "=&v"(r), [p] "=&v"(p), [step] "=&v"(step), [sum] "+v"(sum->v),
        [to] "=m"(*static_cast<char(*)[32]>(to))
      : [s] "m"(*reinterpret_cast<const char(*)[64]>(s)), [m] "m"(*m), [steps] "m"(kExp2Steps), [more] "m"(kExp2Steps[16]),
        [shift] "m"(kExp2Terms[3]), [c2] "m"(kExp2Terms[0]), [c1] "m"(kExp2Terms[1]), [c0] "m"(kExp2Terms[2]));
}
#endif

// Sixteen int32 lanes, and sixteen pairs of int16: the unit of fixed-point weights and rows.
struct Ints { __m512i v; };
struct Words { __m512i v; };
inline Ints ZeroInts() { return {_mm512_setzero_si512()}; }
inline Ints BroadcastInts(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline Vec ToFloat(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Words LoadWords(const int16_t* p) { return {LoadOnce(p)}; }
inline Words BroadcastWords(const int16_t* pair) { return {_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(pair))}; }
// acc + even * even + odd * odd, exact as long as it fits.
inline Ints DotWords(Ints acc, Words a, Words b) {
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));  // gcc 12 copies the sums around the intrinsic
  return acc;
#else
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
#if defined(__AVX512VNNI__)
#define TTSK_DOT_QUADS
// Sixteen times four bytes. acc + the four products of an unsigned and a signed byte each, exact as long as it fits.
struct Quads { __m512i v; };
inline Quads LoadQuads(const uint8_t* p) { return {LoadOnce(p)}; }
inline Quads BroadcastQuads(const int8_t* four) { return {_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(four))}; }
inline Ints DotQuads(Ints acc, Quads a, Quads b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
}
// 64 values, rounded to nearest even, to int8, of every four the second and third in turned order (see PackGroup). Returns
// their sum.
inline int32_t StoreQuads(int8_t* p, const Vec* v) {
  const auto pack = [&](int i) { return _mm512_packs_epi32(_mm512_cvtps_epi32(v[i].v), _mm512_cvtps_epi32(v[i + 1].v)); };
  const __m512i bytes = _mm512_packs_epi16(pack(0), pack(2));  // each 128 bits: four of every vector
  const __m512i turned = _mm512_shuffle_epi8(bytes, _mm512_set4_epi32(0x0f0d0e0c, 0x0b090a08, 0x07050604, 0x03010200));
  const __m512i place = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(place, turned));
  return _mm512_reduce_add_epi32(DotQuads(ZeroInts(), {_mm512_set1_epi8(1)}, {bytes}).v);
}
#else
// Of 64 unsigned bytes those at even and at odd places, as pairs of int16.
inline Words EvenBytes(const uint8_t* p) { return {_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi16(255))}; }
inline Words OddBytes(const uint8_t* p) { return {_mm512_srli_epi16(_mm512_loadu_si512(p), 8)}; }
#endif
// Sixteen values below 2^15 to int16, to nearest even.
inline void StoreRounded(int16_t* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
inline Words LoadBytes(const int8_t* p) {
  return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
// Thirty-two int8 to int16.
inline void WidenBytes(const int8_t* from, int16_t* to) {
  _mm512_storeu_si512(to, LoadBytes(from).v);
}
// Bits of the larger magnitude: what is not finite is larger than all that is.
inline Ints MaxMagnitude(Ints most, Vec a) { return {_mm512_max_epi32(most.v, _mm512_castps_si512(_mm512_abs_ps(a.v)))}; }
inline int32_t ReduceMax(Ints a) { return _mm512_reduce_max_epi32(a.v); }
// Lane i to a[i] + a[i + kStep] where i has no bit kStep, else to a[i - kStep] - a[i].
template <int kStep>
inline Vec Butterfly(Vec a) {
  __m512 other;
  if constexpr (kStep == 1) other = _mm512_permute_ps(a.v, 0xb1);
  else if constexpr (kStep == 2) other = _mm512_permute_ps(a.v, 0x4e);
  else if constexpr (kStep == 4) other = _mm512_shuffle_f32x4(a.v, a.v, 0xb1);
  else other = _mm512_shuffle_f32x4(a.v, a.v, 0x4e);
  alignas(64) static constexpr auto kSigns = [] {
    Lanes signs{};
    for (int i = 0; i < 16; ++i) signs.v[i] = i & kStep ? -1.0f : 1.0f;
    return signs;
  }();
  return {_mm512_fmadd_ps(a.v, _mm512_load_ps(kSigns.v), other)};
}

}  // namespace ttsk::TTSK_ISA
