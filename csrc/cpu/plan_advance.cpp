#include "ttskernels/plan.h"
#include "ttskernels/plan_step.h"

namespace ttsk {

int32_t PlanAdvance(int32_t* plan) {
  const int32_t rows = plan[kFieldNumRows];
  int32_t stuck = 0;
  for (int32_t r = 0; r < rows; ++r) stuck += !RowHasRoom(plan, r);
  if (stuck > 0) return stuck;
  for (int32_t r = 0; r < rows; ++r) AdvanceRow(plan, r);
  return 0;
}

}  // namespace ttsk
