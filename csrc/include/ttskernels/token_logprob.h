// Log-probabilities of given tokens from a few rows of hidden states: gather -> RMS norm -> vocabulary head -> log softmax
// at one id a row, float32 inside. Torch-free. No value of a row depends on which other rows there are.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/isa.h"

namespace ttsk {

// logprobs[i] = log softmax(norm(hidden[rows[i]]) lm_head^T)[ids[i]]; NaN if that row holds a value that is not finite,
// or its logits overflow.
// hidden [tokens, dim] of `hidden_dtype`, rows `hidden_stride` elements apart; norm_weight [dim] float32 or null.
// lm_head [vocab, dim] of `weight_dtype`: packed (LinearPack of the whole matrix), or plain with rows weight_stride
// elements apart, then packed a panel of 64 rows at a time per 384 rows of hidden.
// The vocabulary is cut into at most kLogprobSlices runs of panels; each keeps a running maximum and sum, panel by panel,
// and a row's runs are merged in order: no buffer grows with rows * vocab. Runs on all threads; reads lm_head once per
// 384 rows. scratch: TokenLogprobScratchBytes, 64-byte aligned.
struct TokenLogprobParams {
  const void* hidden;
  const int32_t* rows;
  const float* norm_weight;
  const void* lm_head;
  const int32_t* ids;
  float* logprobs;
  void* scratch;
  int64_t num_rows, dim, vocab, hidden_stride, weight_stride;
  float eps;
  bool packed;
  DType hidden_dtype, weight_dtype;
};

constexpr int64_t kLogprobSlices = 128;
// Of num_rows, dim, packed and weight_dtype; with a plain lm_head also of NumThreads(), the same at the call.
int64_t TokenLogprobScratchBytes(const TokenLogprobParams& p);

TTSK_DECLARE_PER_ISA(void TokenLogprob(const TokenLogprobParams& p);)

}  // namespace ttsk
