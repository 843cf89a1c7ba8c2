#include "ttskernels/peaks.h"

#include <chrono>

#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr int kRuns = 5;
constexpr int64_t kSteps = 24'000'000;  // of all chains
// Independent chains that fit the registers, enough for the latency of every unit (measured: Zen 5 does 9 % more
// vdpbf16ps with 24 than with 12).
#if defined(__AVX512F__)
constexpr int kChains = 24;
#else
constexpr int kChains = 6;  // a vector is two registers of 16 (AVX2), or four of 32 (NEON)
#endif

// Keeps a value in a register and its computation in the program.
template <typename Operand>
inline void Keep(Operand& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v.v));
#elif defined(__AVX2__)
  asm volatile("" : "+x"(v.lo), "+x"(v.hi));
#elif defined(TTSK_NEON)
  asm volatile("" : "+w"(v.q[0]), "+w"(v.q[1]), "+w"(v.q[2]), "+w"(v.q[3]));
#else
  asm volatile("" : "+m"(v));
#endif
}

// Best rate of `kRuns` in GFLOP/s. Chains are kept apart, or they would be merged into one.
template <typename Sum, typename Operand, typename F>
double Peak(double flops_a_step, Sum zero, Operand one, F step) {
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = Clock::now();
    Together(NumThreads(), [&](const Member&) {
      Operand b = one;
      Keep(b);
      Sum sums[kChains];
#pragma GCC unroll 24
      for (int c = 0; c < kChains; ++c) {
        sums[c] = zero;
        Keep(sums[c]);
      }
      for (int64_t i = 0; i < kSteps / kChains; ++i) {
#pragma GCC unroll 24
        for (int c = 0; c < kChains; ++c) {
          Keep(b);  // or a product of it would be computed once
          sums[c] = step(sums[c], b);
        }
      }
#pragma GCC unroll 24
      for (int c = 0; c < kChains; ++c) Keep(sums[c]);
    });
    const double rate = flops_a_step * static_cast<double>(kSteps / kChains * kChains) * NumThreads() / Since(start) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

double PeakFmaGflops() {
  return Peak(2.0 * kLanes, Broadcast(1.0f), Broadcast(1.0f), [](Vec a, Vec b) { return Fma(a, b, Zero()); });
}

#if defined(TTSK_DOT_PAIRS)
double PeakDotGflops() {
  return Peak(4.0 * kLanes, Zero(), BroadcastPair(0), [](Vec a, Pairs b) { return DotPairs(a, b, b); });
}
#else
double PeakDotGflops() { return PeakFmaGflops(); }
#endif

double PeakWordsGflops() {
  const int16_t pair[2] = {1, 1};
  return Peak(4.0 * kLanes, ZeroInts(), BroadcastWords(pair), [](Ints a, Words b) { return DotWords(a, b, b); });
}

#if defined(TTSK_DOT_QUADS)
double PeakBytesGflops() {
  const int8_t four[4] = {1, 1, 1, 1};
  return Peak(8.0 * kLanes, ZeroInts(), BroadcastQuads(four), [](Ints a, Quads b) { return DotQuads(a, b, b); });
}
#else
double PeakBytesGflops() { return PeakWordsGflops(); }
#endif

double ReadGbPerSecond(const float* data, int64_t count) {
  constexpr int64_t kStep = 8 * kLanes;
  const int64_t steps = count / kStep;
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = Clock::now();
    Together(NumThreads(), [&](const Member& me) {
      Vec sum[8];
      for (Vec& s : sum) s = Zero();
      const auto [first, last] = me.Share(steps);
      for (int64_t i = first; i < last; ++i) {
        for (int j = 0; j < 8; ++j) sum[j] = Add(sum[j], Load(data + i * kStep + j * kLanes));
      }
      for (Vec& s : sum) Keep(s);
    });
    const double rate = static_cast<double>(steps * kStep * 4) / Since(start) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace ttsk::TTSK_ISA
