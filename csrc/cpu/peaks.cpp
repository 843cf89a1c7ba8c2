#include "ttskernels/peaks.h"

extern "C" {

__attribute__((visibility("default"))) double ttsk_peak_fma_gflops() { return TTSK_SELECT(PeakFmaGflops)(); }

__attribute__((visibility("default"))) double ttsk_peak_dot_gflops() { return TTSK_SELECT(PeakDotGflops)(); }

__attribute__((visibility("default"))) double ttsk_peak_words_gflops() { return TTSK_SELECT(PeakWordsGflops)(); }

__attribute__((visibility("default"))) double ttsk_peak_bytes_gflops() { return TTSK_SELECT(PeakBytesGflops)(); }

__attribute__((visibility("default"))) double ttsk_read_gb_per_second(const float* data, int64_t count) {
  return TTSK_SELECT(ReadGbPerSecond)(data, count);
}
}
