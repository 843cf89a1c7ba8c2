// Seeded sampling of one token per row: temperature, top-k, top-p, min-p, log-probability. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/isa.h"

namespace ttsk {

struct SampleOptions {
  float temperature;  // 0: the largest logit, ties to the smallest id
  float top_k;        // 0: off
  float top_p;        // 1: off
  float min_p;        // 0: off
};

// Row i reads logits[rows[i]] (rows null: logits[i]). u comes from philox4x32-10(key keys[i], counter positions[i] +
// position_offset), and the token is the first one, in index order over the kept ones, whose cumulative weight exceeds
// u * total. The kept tokens are a prefix of the order (logit descending, id ascending). logprob: under the tempered,
// unfiltered distribution (temperature 0: of temperature 1). One row is one task: no result depends on the thread count.
struct SampleParams {
  const float* logits;  // [*, vocab], rows logits_stride elements apart
  const int32_t* rows;
  const int64_t* keys;
  const int32_t* positions;
  const SampleOptions* options;
  int32_t* tokens;
  float* logprobs;
  int64_t count, vocab, logits_stride;
  int32_t position_offset;
};

// temperature finite and not negative, top_k not negative, 0 < top_p <= 1, 0 <= min_p <= 1.
bool ValidOptions(const SampleOptions& options);

// Options must be valid. A row with a NaN or infinite logit gets token -1 and logprob NaN;
// returns the first such row, or -1.
int64_t Sample(const SampleParams& p);

// philox4x32-10 (Salmon et al. 2011).
struct Philox { uint32_t word[4]; };
Philox Philox4x32(const uint32_t counter[4], const uint32_t key[2]);

// The vector passes of Sample over one row; weights are exp((logit - top) * inverse_temperature).
constexpr int64_t kSampleBlock = 256;
struct SampleTop { float logit; bool finite; };
TTSK_DECLARE_PER_ISA(
    SampleTop SampleFindTop(const float* logits, int64_t n);
    // weights [n]; sums [ceil(n / 256)] of each block.
    void SampleWeights(const float* logits, int64_t n, float top, float inverse_temperature, float* weights,
                       float* sums);
    // Ascending ids of the logits >= floor; returns how many. ids has room for n.
    int64_t SampleCollect(const float* logits, int64_t n, float floor, int32_t* ids);)

}  // namespace ttsk
