#include "ttskernels/path_aggregate.h"

#include <cmath>

namespace ttsk {

void PathAggregate(const float* state, const float* scores, const int32_t* indptr, int64_t paths, float* out) {
  for (int64_t p = 0; p < paths; ++p) {
    const float* in = state + p * kPathStateSize;
    float count = in[0], least = in[1], last = in[2], sum = in[3], log_product = in[4];
    for (int32_t i = indptr[p]; i < indptr[p + 1]; ++i) {
      const float score = scores[i];
      count += 1.0f;
      if (score < least || std::isnan(score)) least = score;
      last = score;
      sum += score;
      log_product += std::log(score);
    }
    float* to = out + p * kPathStateSize;
    to[0] = count;
    to[1] = least;
    to[2] = last;
    to[3] = sum;
    to[4] = log_product;
  }
}

}  // namespace ttsk
