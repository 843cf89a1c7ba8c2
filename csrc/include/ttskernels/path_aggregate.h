// Running (count, min, last, sum, log-product) of each path's step scores. Torch-free.
#pragma once

#include <cstdint>

namespace ttsk {

constexpr int kPathStateSize = 5;

// out[p] = state[p] with scores[indptr[p] .. indptr[p + 1]) folded in, one by one in order, so that the result does not
// depend on how the scores were cut into calls. state, out: [paths, 5] float32; out may alias state. A zero score makes
// the log-product -inf, a negative one NaN; a NaN score makes everything but the count NaN. Single-threaded.
void PathAggregate(const float* state, const float* scores, const int32_t* indptr, int64_t paths, float* out);

}  // namespace ttsk
