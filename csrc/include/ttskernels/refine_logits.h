// The largest logits of a row once more, from the vocabulary's own rows: int8 weights and inputs err by a few hundredths, which
// among the likeliest tokens is what decides. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/isa.h"

namespace ttsk {

// Which are computed again: those at most kRefineReach below the row's largest, of more than kRefineMost the largest ones (of
// equal ones the first). Each becomes x . weight in float32. A row with a logit that is not finite stays as it is. One row is
// one task: its bits do not depend on the others, nor on the thread count.
constexpr float kRefineReach = 3.0f;
constexpr int64_t kRefineMost = 16;
struct RefineLogitsParams {
  float* logits;       // [rows, vocab], in place
  const float* x;      // [rows, dim]
  const void* weight;  // [vocab, dim]
  int64_t rows, vocab, dim;
  DType weight_dtype;
};
TTSK_DECLARE_PER_ISA(void RefineLogits(const RefineLogitsParams& p);)

}  // namespace ttsk
