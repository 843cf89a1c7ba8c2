#include "ttskernels/path_aggregate.h"

#include "tensor.h"

namespace ttsk {
namespace {

Tensor PathAggregateOp(const Tensor& state, const Tensor& scores, const Tensor& indptr) {
  STD_TORCH_CHECK(state.dim() == 2 && state.size(1) == kPathStateSize && state.is_contiguous() &&
                      state.scalar_type() == ScalarType::Float,
                  "state must be contiguous float32 [paths, 5]");
  STD_TORCH_CHECK(scores.dim() == 1 && scores.is_contiguous() && scores.scalar_type() == ScalarType::Float,
                  "scores must be contiguous float32 [n]");
  STD_TORCH_CHECK(indptr.dim() == 1 && indptr.size(0) == state.size(0) + 1 && indptr.is_contiguous() &&
                      indptr.scalar_type() == ScalarType::Int,
                  "indptr must be contiguous int32 [paths + 1]");
  Tensor out = torch::stable::empty_like(state);
  PathAggregate(Data<float>(state), Data<float>(scores), Data<int32_t>(indptr), state.size(0), Data<float>(out));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("path_aggregate", TORCH_BOX(&PathAggregateOp)); }

}  // namespace ttsk
