#include "ttskernels/sample.h"

#include <tuple>

#include "tensor.h"

namespace ttsk {
namespace {

bool IsVector(const Tensor& t, ScalarType type, int64_t size) {
  return t.dim() == 1 && t.size(0) == size && t.is_contiguous() && t.scalar_type() == type;
}

std::tuple<Tensor, Tensor> SampleOp(const Tensor& logits, const Tensor& rows, const Tensor& keys,
                                    const Tensor& positions, const Tensor& params) {
  STD_TORCH_CHECK(HasRows(logits) && logits.scalar_type() == ScalarType::Float &&
                      logits.size(1) > 0,
                  "logits must be float32 [*, vocab] with contiguous rows");
  const int64_t count = rows.numel();
  STD_TORCH_CHECK(IsVector(rows, ScalarType::Int, count), "rows must be contiguous int32 [S]");
  STD_TORCH_CHECK(IsVector(keys, ScalarType::Long, count), "keys must be contiguous int64 [", count, "]");
  STD_TORCH_CHECK(IsVector(positions, ScalarType::Int, count), "positions must be contiguous int32 [", count, "]");
  STD_TORCH_CHECK(params.dim() == 2 && params.size(0) == count && params.size(1) == 4 && params.is_contiguous() &&
                      params.scalar_type() == ScalarType::Float,
                  "params must be contiguous float32 [", count, ", 4]");
  const int32_t* row = Data<int32_t>(rows);
  const SampleOptions* options = static_cast<const SampleOptions*>(params.data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(row[i] >= 0 && row[i] < logits.size(0), "rows[", i, "] = ", row[i], " is not a row of logits [",
                    logits.size(0), ", ", logits.size(1), "]");
    STD_TORCH_CHECK(ValidOptions(options[i]), "params[", i, "] is not a valid {temperature, top_k, top_p, min_p}");
  }
  Tensor tokens = torch::stable::new_empty(rows, {count});
  Tensor logprobs = torch::stable::new_empty(logits, {count});
  Sample({static_cast<const float*>(logits.data_ptr()), row, Data<int64_t>(keys), Data<int32_t>(positions), options,
          Data<int32_t>(tokens), Data<float>(logprobs), count, logits.size(1), logits.stride(0), 0});
  return {tokens, logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("sample", TORCH_BOX(&SampleOp)); }

}  // namespace ttsk
