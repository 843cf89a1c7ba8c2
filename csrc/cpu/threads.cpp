#include "ttskernels/threads.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>

namespace ttsk {
namespace {

std::atomic<int>& Threads() {
  static std::atomic<int> threads{[] {
    const char* wanted = std::getenv("TTSK_NUM_THREADS");
    const int n = wanted != nullptr ? std::atoi(wanted) : 0;
    return n > 0 ? n : omp_get_max_threads();
  }()};
  return threads;
}

}  // namespace

int NumThreads() { return Threads().load(std::memory_order_relaxed); }
void SetNumThreads(int threads) { Threads().store(threads < 1 ? 1 : threads, std::memory_order_relaxed); }

}  // namespace ttsk

extern "C" {
__attribute__((visibility("default"))) int ttsk_num_threads() { return ttsk::NumThreads(); }
__attribute__((visibility("default"))) void ttsk_set_num_threads(int threads) { ttsk::SetNumThreads(threads); }
}
