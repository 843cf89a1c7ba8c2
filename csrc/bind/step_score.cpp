#include "ttskernels/step_score.h"

#include <optional>
#include <string>

#include "tensor.h"

namespace ttsk {
namespace {

Squash SquashOf(const std::string& name) {
  if (name == "none") return Squash::kNone;
  if (name == "sigmoid") return Squash::kSigmoid;
  STD_TORCH_CHECK(name == "softmax", "squash must be none, sigmoid or softmax, got ", name);
  return Squash::kSoftmax;
}

Tensor StepScoreOp(const Tensor& hidden, const Tensor& rows, const std::optional<Tensor>& norm_weight, double eps,
                   const std::optional<Tensor>& inner_weight, const std::optional<Tensor>& inner_bias,
                   const Tensor& weight, const std::optional<Tensor>& bias, std::string squash,
                   const std::optional<Tensor>& mix) {
  STD_TORCH_CHECK(HasRows(hidden), "hidden must be [tokens, dim] with contiguous rows");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Int && rows.is_contiguous(),
                  "rows must be contiguous int32 [n]");
  const int64_t dim = hidden.size(1), inner = inner_weight.has_value() ? inner_weight->size(0) : 0;
  const int64_t width = inner > 0 ? inner : dim;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == width && weight.is_contiguous(),
                  "weight must be contiguous [labels, ", width, "]");
  STD_TORCH_CHECK(!inner_weight.has_value() ||
                      (inner_weight->dim() == 2 && inner_weight->size(1) == dim && inner_weight->is_contiguous() &&
                       inner_weight->scalar_type() == weight.scalar_type()),
                  "inner_weight must be contiguous [inner, ", dim, "] of weight's dtype");
  const int64_t n = rows.size(0), labels = weight.size(0);
  Tensor scores = torch::stable::new_empty(hidden, {n}, ScalarType::Float);
  Tensor scratch = torch::stable::new_empty(hidden, {n * (dim + inner)}, ScalarType::Float);
  TTSK_SELECT(StepScore)({hidden.data_ptr(), static_cast<const int32_t*>(rows.data_ptr()),
                          VectorOf(norm_weight, dim, "norm_weight"), inner > 0 ? inner_weight->data_ptr() : nullptr,
                          VectorOf(inner_bias, inner, "inner_bias"), weight.data_ptr(),
                          VectorOf(bias, labels, "bias"), VectorOf(mix, labels, "mix"), Data<float>(scores),
                          Data<float>(scratch), n, dim, hidden.stride(0), inner, labels, static_cast<float>(eps),
                          SquashOf(squash), DTypeOf(hidden), DTypeOf(weight)});
  return scores;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("step_score", TORCH_BOX(&StepScoreOp)); }

}  // namespace ttsk
