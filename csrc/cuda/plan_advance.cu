// PlanAdvance on the device, one block: all rows move or none. stuck[0] becomes the number of rows without room.
// Reads 24 bytes a row and writes 16; nothing is asked of the host.
#include <cuda_runtime.h>

#include "ttskernels/plan_step.h"

namespace ttsk {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) PlanAdvanceKernel(int32_t* plan, int32_t* stuck) {
  const int32_t rows = plan[kFieldNumRows];
  int32_t without = 0;
  for (int32_t base = 0; base < rows; base += kThreads) {  // every thread meets every barrier
    const int32_t r = base + threadIdx.x;
    without += __syncthreads_count(r < rows && !RowHasRoom(plan, r));
  }
  if (threadIdx.x == 0) *stuck = without;
  if (without > 0) return;
  for (int32_t r = threadIdx.x; r < rows; r += kThreads) AdvanceRow(plan, r);
}

}  // namespace
}  // namespace ttsk

// All pointers are on the device. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int ttsk_cuda_plan_advance(int32_t* plan, int32_t* stuck, void* stream) {
  ttsk::PlanAdvanceKernel<<<1, ttsk::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(plan, stuck);
  return static_cast<int>(cudaGetLastError());
}
