// The kernel of csrc/cuda/page_copy.cu on the host: the same index arithmetic, threads one after the other.
#include <cstring>

#include "ttskernels/page_copy.h"

extern "C" void copy(const ttsk::PagePoolView* table, int32_t pools, const int32_t* pairs, int32_t n) {
  for (int32_t p = 0; p < pools; ++p) {
    const ttsk::PagePoolView& pool = table[p];
    for (int32_t i = 0; i < n; ++i) {
      char* base = reinterpret_cast<char*>(pool.base);
      char *from = base + pairs[3 * i] * pool.page_stride, *to = base + pairs[3 * i + 1] * pool.page_stride;
      const int64_t units = pairs[3 * i + 2] * ttsk::UnitsOfToken(pool);
      for (int64_t unit = 0; unit < units; ++unit) {
        const int64_t at = ttsk::UnitOffset(pool, unit);
        std::memcpy(to + at, from + at, pool.unit_bytes);
      }
    }
  }
}
