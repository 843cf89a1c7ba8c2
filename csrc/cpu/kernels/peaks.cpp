#include "ttskernels/peaks.h"

#include <omp.h>

#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

constexpr int kRuns = 5;
constexpr int64_t kFmaLoops = 2'000'000;

// Keeps a value in a register and its computation in the program.
inline void Keep(Vec& v) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(v.v));
#else
  asm volatile("" : "+m"(v));
#endif
}

}  // namespace

double PeakFmaGflops() {
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(NumThreads())
    {
      // Twelve chains cover latency 4 x 2 issues; values stay 1. Kept apart, or they would be merged into one.
      Vec a[12], one = Broadcast(1.0f), zero = Zero();
      Keep(one);
      Keep(zero);
      for (Vec& v : a) {
        v = one;
        Keep(v);
      }
      Vec a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3], a4 = a[4], a5 = a[5], a6 = a[6], a7 = a[7], a8 = a[8], a9 = a[9];
      Vec a10 = a[10], a11 = a[11];
      for (int64_t i = 0; i < kFmaLoops; ++i) {
        a0 = Fma(a0, one, zero), a1 = Fma(a1, one, zero), a2 = Fma(a2, one, zero), a3 = Fma(a3, one, zero);
        a4 = Fma(a4, one, zero), a5 = Fma(a5, one, zero), a6 = Fma(a6, one, zero), a7 = Fma(a7, one, zero);
        a8 = Fma(a8, one, zero), a9 = Fma(a9, one, zero), a10 = Fma(a10, one, zero), a11 = Fma(a11, one, zero);
      }
      a0 = Add(Add(Add(a0, a1), Add(a2, a3)), Add(Add(a4, a5), Add(a6, a7)));
      a0 = Add(a0, Add(Add(a8, a9), Add(a10, a11)));
      Keep(a0);
    }
    const double seconds = omp_get_wtime() - start;
    const double rate = 12.0 * kLanes * 2.0 * static_cast<double>(kFmaLoops) * NumThreads() / seconds / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

double ReadGbPerSecond(const float* data, int64_t count) {
  constexpr int64_t kStep = 8 * kLanes;
  const int64_t steps = count / kStep;
  double best = 0.0;
  for (int run = 0; run < kRuns; ++run) {
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(NumThreads())
    {
      Vec sum[8];
      for (Vec& s : sum) s = Zero();
#pragma omp for schedule(static)
      for (int64_t i = 0; i < steps; ++i) {
        for (int j = 0; j < 8; ++j) sum[j] = Add(sum[j], Load(data + i * kStep + j * kLanes));
      }
      for (Vec& s : sum) Keep(s);
    }
    const double rate = static_cast<double>(steps * kStep * 4) / (omp_get_wtime() - start) / 1e9;
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace ttsk::TTSK_ISA
