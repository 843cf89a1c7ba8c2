#include "ttskernels/rms_norm.h"

#include "tensor.h"

namespace ttsk {
namespace {

Tensor RmsNormOp(const Tensor& x, const Tensor& weight, double eps) {
  STD_TORCH_CHECK(HasRows(x), "x must be [rows, dim] with contiguous rows");
  STD_TORCH_CHECK(weight.numel() == x.size(1) && weight.is_contiguous() && weight.scalar_type() == x.scalar_type(),
                  "weight must be contiguous [", x.size(1), "] of x's dtype");
  Tensor y = torch::stable::empty_like(x);
  TTSK_SELECT(RmsNorm)({x.data_ptr(), weight.data_ptr(), y.data_ptr(), x.size(0), x.size(1), x.stride(0), y.stride(0),
                        static_cast<float>(eps), DTypeOf(x), DTypeOf(x)});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("rms_norm", TORCH_BOX(&RmsNormOp)); }

}  // namespace ttsk
