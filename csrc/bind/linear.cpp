#include "ttskernels/linear.h"

#include <cstring>
#include <vector>

#include "rounded.h"
#include "tensor.h"

namespace ttsk {
namespace {

LinearForm FormOf(int64_t form) {
  STD_TORCH_CHECK(form >= 0 && form <= 2, "form must be 0 (float), 1 (int16) or 2 (int8), got ", form);
  return static_cast<LinearForm>(form);
}

Tensor LinearPackOp(const Tensor& weight, int64_t form, const std::optional<Tensor>& scales) {
  STD_TORCH_CHECK(HasRows(weight), "weight must be [n, k] with contiguous rows");
  STD_TORCH_CHECK(!scales || FormOf(form) == LinearForm::kInt8, "only int8 weights have scales");
  const DType dtype = scales ? DType::kFloat32 : DTypeOf(weight);
  const int64_t n = weight.size(0), k = weight.size(1), bytes = LinearPackedBytes(n, k, dtype, FormOf(form));
  Tensor packed = torch::stable::new_empty(weight, {bytes}, ScalarType::Byte);
  std::memset(packed.mutable_data_ptr(), 0, bytes);
  const PackColumns columns{0, n > 0 ? n : 1, 0};
  if (scales) {
    const RoundedPointers rounded = CheckRounded(weight, *scales, n, k);
    LinearPackRounded(rounded.values, rounded.scales, n, k, columns, packed.mutable_data_ptr());
  } else {
    LinearPack(weight.data_ptr(), n, k, weight.stride(0), dtype, columns, packed.mutable_data_ptr(), FormOf(form));
  }
  return packed;
}

Tensor LinearOp(const Tensor& x, const Tensor& packed, int64_t out_features, const std::optional<Tensor>& bias,
                int64_t form) {
  STD_TORCH_CHECK(HasRows(x), "x must be [rows, k] with contiguous rows");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(), "packed must come from linear_pack");
  const DType dtype = DTypeOf(x);
  const int64_t rows = x.size(0), k = x.size(1), bytes = LinearPackedBytes(out_features, k, dtype, FormOf(form));
  STD_TORCH_CHECK(packed.numel() == bytes, "packed must have ", bytes, " bytes for out_features ", out_features,
                  " and x's k ", k, " and dtype, got ", packed.numel());
  if (bias) {
    STD_TORCH_CHECK(bias->numel() == out_features && bias->is_contiguous() && bias->scalar_type() == ScalarType::Float,
                    "bias must be contiguous float32 [", out_features, "]");
  }
  Tensor y = torch::stable::new_empty(x, {rows, out_features});
  std::vector<float> workspace(LinearWorkspaceBytes(rows, k) / 4);
  TTSK_SELECT(Linear)({x.data_ptr(), packed.data_ptr(), bias ? static_cast<const float*>(bias->data_ptr()) : nullptr,
                       y.mutable_data_ptr(), workspace.data(), rows, out_features, k, x.stride(0), out_features, dtype,
                       dtype, dtype, LinearEpilogue::kStore, FormOf(form)});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) {
  m.impl("linear_pack", TORCH_BOX(&LinearPackOp));
  m.impl("linear", TORCH_BOX(&LinearOp));
}

}  // namespace ttsk
