#include "ttskernels/plan.h"

namespace ttsk {

int32_t PlanAdvance(int32_t* plan) {
  const int32_t rows = plan[kFieldNumRows], page_size = plan[kFieldPageSize];
  const auto* segs = reinterpret_cast<const PlanSeg*>(PlanSection(plan, kFieldSegs));
  int32_t* leaf = PlanSection(plan, kFieldRowLeaf);
  int32_t stuck = 0;
  for (int32_t r = 0; r < rows; ++r) {
    const int32_t* at = leaf + 4 * r;
    stuck += at[0] < 0 || (at[1] + 1 >= segs[at[0]].count && at[0] + 1 >= at[2]);
  }
  if (stuck > 0) return stuck;
  int32_t* pos = PlanSection(plan, kFieldRowPos);
  int32_t* slot = PlanSection(plan, kFieldRowSlot);
  for (int32_t r = 0; r < rows; ++r) {
    int32_t* at = leaf + 4 * r;
    if (++at[1] >= segs[at[0]].count) {
      ++at[0];
      at[1] = 0;
    }
    const PlanSeg& seg = segs[at[0]];
    ++pos[r];
    slot[r] = seg.page * page_size + seg.offset + at[1];
  }
  return 0;
}

}  // namespace ttsk
