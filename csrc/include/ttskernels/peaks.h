// What this machine can do at most, for benchmarks to compare with. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/isa.h"

namespace ttsk {

// Independent fused multiply-adds in registers on every thread; returns GFLOP/s (a multiply-add is 2), best of 5 runs.
TTSK_DECLARE_PER_ISA(double PeakFmaGflops();)

// The same of what a level multiplies bf16 with: vdpbf16ps (a pair of multiply-adds is 4) where it has it, else FMA.
TTSK_DECLARE_PER_ISA(double PeakDotGflops();)

// The same of what int16 weights and fixed-point pages are multiplied with: sums of pairs of int16 products (vpdpwssd with
// VNNI).
TTSK_DECLARE_PER_ISA(double PeakWordsGflops();)

// The same of what int8 weights are multiplied with: sums of four products of bytes (vpdpbusd with VNNI, else of int16).
TTSK_DECLARE_PER_ISA(double PeakBytesGflops();)

// Sums `count` floats with every thread; returns GB/s, best of 5 runs. Larger than the last cache: memory's rate.
TTSK_DECLARE_PER_ISA(double ReadGbPerSecond(const float* data, int64_t count);)

}  // namespace ttsk
