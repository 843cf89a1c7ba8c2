#include <cmath>

#include "ttskernels/rope_append.h"

namespace ttsk {

void RopeTable(const int32_t* positions, int64_t rows, const float* inv_freq, int64_t pairs, float scale,
               float* cos_sin) {
  for (int64_t r = 0; r < rows; ++r, cos_sin += 2 * pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float angle = static_cast<float>(positions[r]) * inv_freq[i];
      cos_sin[i] = std::cos(angle) * scale;
      cos_sin[pairs + i] = std::sin(angle) * scale;
    }
  }
}

}  // namespace ttsk
