// Every pair of pages, in every pool of a table, in one launch: block (pair, pool, part). Reads and writes each byte once.
#include <cuda_runtime.h>

#include "ttskernels/page_copy.h"

namespace ttsk {
namespace {

constexpr int kThreads = 256, kParts = 2;

template <typename Unit>
__device__ void CopyUnits(const PagePoolView& pool, int32_t from, int32_t to, int32_t tokens) {
  const char* source = reinterpret_cast<const char*>(pool.base) + from * pool.page_stride;
  char* target = reinterpret_cast<char*>(pool.base) + to * pool.page_stride;
  const int64_t units = tokens * UnitsOfToken(pool);
  for (int64_t i = blockIdx.z * kThreads + threadIdx.x; i < units; i += kThreads * kParts) {
    const int64_t at = UnitOffset(pool, i);
    *reinterpret_cast<Unit*>(target + at) = *reinterpret_cast<const Unit*>(source + at);
  }
}

// pairs [n, 3]: from page, to page, tokens.
__global__ void __launch_bounds__(kThreads) PageCopyKernel(const PagePoolView* table, const int32_t* pairs) {
  const PagePoolView pool = table[blockIdx.y];
  const int32_t *pair = pairs + 3 * static_cast<int64_t>(blockIdx.x), from = pair[0], to = pair[1], tokens = pair[2];
  switch (pool.unit_bytes) {
    case 16: return CopyUnits<uint4>(pool, from, to, tokens);
    case 8: return CopyUnits<uint2>(pool, from, to, tokens);
    case 4: return CopyUnits<uint32_t>(pool, from, to, tokens);
    case 2: return CopyUnits<uint16_t>(pool, from, to, tokens);
    default: return CopyUnits<uint8_t>(pool, from, to, tokens);
  }
}

}  // namespace
}  // namespace ttsk

// All pointers are on the device; no page is a target twice, or both a target and a source. Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int ttsk_cuda_page_copy(const void* table, int32_t pools,
                                                                          const int32_t* pairs, int32_t n, void* stream) {
  if (pools > 0 && n > 0) {
    const dim3 grid(n, pools, ttsk::kParts);
    ttsk::PageCopyKernel<<<grid, ttsk::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const ttsk::PagePoolView*>(table), pairs);
  }
  return static_cast<int>(cudaGetLastError());
}
