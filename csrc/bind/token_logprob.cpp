#include "ttskernels/token_logprob.h"

#include <optional>

#include "tensor.h"
#include "ttskernels/linear.h"

namespace ttsk {
namespace {

// lm_head: [vocab, dim], or what linear_pack made of it (uint8) with the dtype it had.
Tensor TokenLogprobOp(const Tensor& hidden, const Tensor& rows, const std::optional<Tensor>& norm_weight, double eps,
                      const Tensor& lm_head, int64_t vocab, ScalarType dtype, const Tensor& ids) {
  STD_TORCH_CHECK(HasRows(hidden), "hidden must be [tokens, dim] with contiguous rows");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.scalar_type() == ScalarType::Int && rows.is_contiguous() && ids.dim() == 1 &&
                      ids.scalar_type() == ScalarType::Int && ids.is_contiguous() && ids.size(0) == rows.size(0),
                  "rows and ids must be contiguous int32 [n]");
  TokenLogprobParams p{};
  p.num_rows = rows.size(0), p.dim = hidden.size(1), p.vocab = vocab, p.eps = static_cast<float>(eps);
  p.weight_dtype = DTypeOf(dtype), p.hidden_dtype = DTypeOf(hidden), p.packed = lm_head.scalar_type() == ScalarType::Byte;
  if (p.packed) {
    const int64_t bytes = LinearPackedBytes(vocab, p.dim, p.weight_dtype);
    STD_TORCH_CHECK(lm_head.is_contiguous() && lm_head.numel() == bytes, "lm_head must have ", bytes, " bytes for vocab ",
                    vocab, ", hidden's dim ", p.dim, " and its dtype, got ", lm_head.numel());
  } else {
    STD_TORCH_CHECK(HasRows(lm_head) && lm_head.size(0) == vocab && lm_head.size(1) == p.dim &&
                        lm_head.scalar_type() == dtype,
                    "lm_head must be [", vocab, ", ", p.dim, "] of its dtype with contiguous rows");
    p.weight_stride = lm_head.stride(0);
  }
  Tensor logprobs = torch::stable::new_empty(hidden, {p.num_rows}, ScalarType::Float);
  Tensor scratch = torch::stable::new_empty(hidden, {TokenLogprobScratchBytes(p)}, ScalarType::Byte);
  p.hidden = hidden.data_ptr(), p.hidden_stride = hidden.stride(0), p.rows = Data<const int32_t>(rows);
  p.norm_weight = VectorOf(norm_weight, p.dim, "norm_weight"), p.lm_head = lm_head.data_ptr();
  p.ids = Data<const int32_t>(ids), p.logprobs = Data<float>(logprobs), p.scratch = scratch.mutable_data_ptr();
  TTSK_SELECT(TokenLogprob)(p);
  return logprobs;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("token_logprob", TORCH_BOX(&TokenLogprobOp)); }

}  // namespace ttsk
