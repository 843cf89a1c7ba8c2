// One row's part of PlanAdvance (plan.h), for the CPU loop and the CUDA kernel alike. Torch-free; compiles as C++ and CUDA.
#pragma once

#include "ttskernels/plan.h"

#ifdef __CUDACC__
#define TTSK_HOST_DEVICE __host__ __device__
#else
#define TTSK_HOST_DEVICE
#endif

namespace ttsk {

// Whether row r (caller's order) has a reserved slot for one token more.
TTSK_HOST_DEVICE inline bool RowHasRoom(const int32_t* plan, int32_t r) {
  const int32_t* leaf = plan + plan[kFieldRowLeaf] + 4 * static_cast<int64_t>(r);
  const int32_t* segs = plan + plan[kFieldSegs];
  return leaf[0] >= 0 && (leaf[1] + 1 < segs[4 * static_cast<int64_t>(leaf[0]) + 2] || leaf[0] + 1 < leaf[2]);
}

// Moves row r, which has room: row_pos, row_slot and row_leaf. Rows touch nothing of each other.
TTSK_HOST_DEVICE inline void AdvanceRow(int32_t* plan, int32_t r) {
  int32_t* leaf = plan + plan[kFieldRowLeaf] + 4 * static_cast<int64_t>(r);
  const int32_t* segs = plan + plan[kFieldSegs];
  if (++leaf[1] >= segs[4 * static_cast<int64_t>(leaf[0]) + 2]) {
    ++leaf[0];
    leaf[1] = 0;
  }
  const int32_t* seg = segs + 4 * static_cast<int64_t>(leaf[0]);  // {page, offset, count, begin}
  ++plan[plan[kFieldRowPos] + r];
  plan[plan[kFieldRowSlot] + r] = seg[0] * plan[kFieldPageSize] + seg[1] + leaf[1];
}

}  // namespace ttsk
