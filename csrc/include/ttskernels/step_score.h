// Step scores of a few rows of hidden states: gather -> RMS norm -> optional inner layer -> head -> squash, float32
// inside. Torch-free. No value of a row depends on which other rows there are.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/isa.h"

namespace ttsk {

enum class Squash : int {
  kNone = 0,     // the logits
  kSigmoid = 1,  // of each logit
  kSoftmax = 2,  // over all labels
};

// scores[i] = sum over labels of mix * squash(logits) of hidden row rows[i]; NaN if that row holds a value that is not
// finite, or a logit overflows.
// hidden [tokens, dim], rows `hidden_stride` elements apart; norm_weight [dim] or null; inner_weight [inner, dim] with
// inner_bias [inner] or null, followed by ReLU (inner = 0: none); weight [labels, inner or dim], bias [labels] or null,
// mix [labels] or null (all ones).
// Vectors are float32, inner_weight and weight of `weight_dtype`, all contiguous.
// scratch: num_rows * (dim + inner) floats. Runs on all threads for many rows; reads each weight once per four rows.
struct StepScoreParams {
  const void* hidden;
  const int32_t* rows;
  const float* norm_weight;
  const void* inner_weight;
  const float* inner_bias;
  const void* weight;
  const float* bias;
  const float* mix;
  float* scores;
  float* scratch;
  int64_t num_rows, dim, hidden_stride, inner, labels;
  float eps;
  Squash squash;
  DType hidden_dtype, weight_dtype;
};

TTSK_DECLARE_PER_ISA(void StepScore(const StepScoreParams& p);)

}  // namespace ttsk
