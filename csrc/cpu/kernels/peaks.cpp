#include "ttskernels/peaks.h"

#include <chrono>

#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

using Clock = std::chrono::steady_clock;

double Since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

constexpr int kRuns = 5;
constexpr int64_t kFmaLoops = 2'000'000;

// Keeps a value in a register and its computation in the program.
template <typename Operand>
inline void Keep(Operand& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v.v));
#else
  asm volatile("" : "+m"(v));
#endif
}

// Best rate of `kRuns` in GFLOP/s: twelve chains of one step each cover latency 4 x 2 issues; values stay 1. They are
// kept apart, or they would be merged into one.
template <typename Operand, typename F>
double Peak(double flops_a_step, Operand one, F step) {
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = Clock::now();
    Together(NumThreads(), [&](const Member&) {
      Vec a[12];
      for (Vec& v : a) {
        v = Broadcast(1.0f);
        Keep(v);
      }
      Operand b = one;
      Keep(b);
      Vec a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], a4 = a[4], a5 = a[5], a6 = a[6], a7 = a[7], a8 = a[8], a9 = a[9];
      Vec a10 = a[10], a11 = a[11];
      for (int64_t i = 0; i < kFmaLoops; ++i) {
        a0 = step(a0, b), a1 = step(a1, b), a2 = step(a2, b), a3 = step(a3, b), a4 = step(a4, b), a5 = step(a5, b);
        a6 = step(a6, b), a7 = step(a7, b), a8 = step(a8, b), a9 = step(a9, b), a10 = step(a10, b), a11 = step(a11, b);
      }
      a0 = Add(Add(Add(a0, a1), Add(a2, a3)), Add(Add(a4, a5), Add(a6, a7)));
      a0 = Add(a0, Add(Add(a8, a9), Add(a10, a11)));
      Keep(a0);
    });
    const double seconds = Since(start);
    const double rate = 12.0 * flops_a_step * static_cast<double>(kFmaLoops) * NumThreads() / seconds / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace

double PeakFmaGflops() {
  return Peak(2.0 * kLanes, Broadcast(1.0f), [](Vec a, Vec b) { return Fma(a, b, Zero()); });
}

#if defined(__AVX512BF16__)
double PeakDotGflops() {
  return Peak(4.0 * kLanes, BroadcastPair(0), [](Vec a, Pairs b) { return DotPairs(a, b, b); });
}
#else
double PeakDotGflops() { return PeakFmaGflops(); }
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
