#include "ttskernels/rope_append.h"

#include <cmath>

namespace ttsk {

void RopeTable(const int32_t* positions, int64_t rows, const float* inv_freq, int64_t pairs, float scale, float* cos,
               float* sin) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < pairs; ++i) {
      const float angle = static_cast<float>(positions[r]) * inv_freq[i];
      cos[r * pairs + i] = std::cos(angle) * scale;
      sin[r * pairs + i] = std::sin(angle) * scale;
    }
  }
}

}  // namespace ttsk
