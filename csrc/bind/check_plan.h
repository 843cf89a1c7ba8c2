// Checks of a plan buffer that arrives as a tensor.
#pragma once

#include "tensor.h"
#include "ttskernels/plan.h"

namespace ttsk {

// The buffer is a plan of these rows whose pages exist in the pool: nothing is read out of bounds.
inline void CheckPlan(const Tensor& plan, int64_t rows, int64_t page_size, int64_t pages) {
  STD_TORCH_CHECK(plan.scalar_type() == ScalarType::Int && plan.dim() == 1 && plan.is_contiguous() &&
                      plan.numel() >= kPlanHeaderInts,
                  "plan must be a contiguous one-dimensional int32 buffer made by build_plan");
  const int32_t* p = Data<const int32_t>(plan);
  STD_TORCH_CHECK(p[kFieldMagic] == kPlanMagic && p[kFieldVersion] == kPlanVersion && p[kFieldTotalInts] <= plan.numel(),
                  "plan has magic ", p[kFieldMagic], " and version ", p[kFieldVersion], ", need ", kPlanMagic, " and ",
                  kPlanVersion, "; pass the buffer that build_plan returned");
  STD_TORCH_CHECK(p[kFieldNumRows] == rows, "plan has ", p[kFieldNumRows], " rows, the call has ", rows);
  STD_TORCH_CHECK(p[kFieldPageSize] == page_size, "plan was built for pages of ", p[kFieldPageSize],
                  " tokens, the pool has pages of ", page_size);
  const PlanSeg* segs = reinterpret_cast<const PlanSeg*>(PlanSection(p, kFieldSegs));
  for (int32_t i = 0; i < p[kFieldNumSegs]; ++i) {
    const PlanSeg& s = segs[i];
    STD_TORCH_CHECK(s.page >= 0 && s.page < pages && s.offset >= 0 && s.count >= 0 && s.offset + s.count <= page_size,
                    "plan segment ", i, " reads tokens [", s.offset, ", ", s.offset + s.count, ") of page ", s.page,
                    "; the pool has ", pages, " pages of ", page_size);
  }
}

}  // namespace ttsk
