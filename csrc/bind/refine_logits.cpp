#include "ttskernels/refine_logits.h"

#include "tensor.h"

namespace ttsk {
namespace {

void RefineLogitsOp(Tensor logits, const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float &&
                      logits.size(1) > 0,
                  "logits must be contiguous float32 [rows, vocab]");
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(0) == logits.size(1),
                  "weight must be contiguous [", logits.size(1), ", dim], got ", weight.size(0), " rows");
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.size(0) == logits.size(0) &&
                      x.size(1) == weight.size(1),
                  "x must be contiguous float32 [", logits.size(0), ", ", weight.size(1), "]");
  TTSK_SELECT(RefineLogits)({Data<float>(logits), Data<float>(x), weight.data_ptr(), logits.size(0), logits.size(1),
                             weight.size(1), DTypeOf(weight)});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("refine_logits", TORCH_BOX(&RefineLogitsOp)); }

}  // namespace ttsk
