// Packing of linear's weights; the kernels are in kernels/linear.cpp.
#include "ttskernels/linear.h"

#include <algorithm>

#include "ttskernels/threads.h"

namespace ttsk {
namespace {

// Element (column c, reduced index i) of a packed matrix is at PanelBase + (i / f * 64 + c % 64) * f + i % f.
template <typename T>
void PackRows(const T* weight, int64_t n, int64_t k, int64_t row_stride, int64_t f, const PackColumns& columns,
              T* packed) {
  const int64_t padded = (k + f - 1) / f * f;
#pragma omp parallel for num_threads(NumThreads()) schedule(static, 64) if (n * k > 65536)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t column = columns.first + i / columns.group * columns.step + i % columns.group;
    T* out = packed + column / kPanelColumns * padded * kPanelColumns + column % kPanelColumns * f;
    const T* in = weight + i * row_stride;
    for (int64_t j = 0; j < k; ++j) out[j / f * kPanelColumns * f + j % f] = in[j];
  }
}

}  // namespace

int64_t LinearPackedBytes(int64_t n, int64_t k, DType dtype) {
  const int64_t f = PackFactor(dtype);
  return (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns * ((k + f - 1) / f * f) * SizeOf(dtype);
}

void LinearPack(const void* weight, int64_t n, int64_t k, int64_t row_stride, DType dtype, const PackColumns& columns,
                void* packed) {
  const int64_t f = PackFactor(dtype);
  if (SizeOf(dtype) == 4) {
    PackRows(static_cast<const float*>(weight), n, k, row_stride, f, columns, static_cast<float*>(packed));
  } else {
    PackRows(static_cast<const uint16_t*>(weight), n, k, row_stride, f, columns, static_cast<uint16_t*>(packed));
  }
}

// The x rows of one chunk as float32 (or bf16 pairs), k rounded up to a whole pair.
int64_t LinearWorkspaceBytes(int64_t rows, int64_t k) { return std::min<int64_t>(rows, 384) * ((k + 1) / 2 * 2) * 4 + 64; }

}  // namespace ttsk
