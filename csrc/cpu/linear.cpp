// Packing of linear's weights; the kernels are in kernels/linear.cpp.
#include "ttskernels/linear.h"

#include <algorithm>
#include <cstring>

#include "ttskernels/threads.h"

namespace ttsk {
namespace {

// Element (column c, reduced index i) of a packed matrix is at PanelBase + (i / f * 64 + c % 64) * f + i % f: a row goes
// out as `Group`s of f elements, 64 groups apart.
template <typename Element, typename Group>
void PackRows(const void* weight, int64_t n, int64_t k, int64_t row_stride, const PackColumns& columns, void* packed) {
  constexpr int64_t kF = sizeof(Group) / sizeof(Element);
  const int64_t steps = (k + kF - 1) / kF, whole = k / kF;
#pragma omp parallel for num_threads(NumThreads()) schedule(static, 64) if (n * k > 65536)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t column = columns.first + i / columns.group * columns.step + i % columns.group;
    const Element* in = static_cast<const Element*>(weight) + i * row_stride;
    Group* out = static_cast<Group*>(packed) + column / kPanelColumns * steps * kPanelColumns + column % kPanelColumns;
    for (int64_t j = 0; j < whole; ++j) std::memcpy(out + j * kPanelColumns, in + j * kF, sizeof(Group));
    if (whole < steps) std::memcpy(out + whole * kPanelColumns, in + whole * kF, (k - whole * kF) * sizeof(Element));
  }
}

}  // namespace

int64_t LinearPackedBytes(int64_t n, int64_t k, DType dtype) {
  const int64_t f = PackFactor(dtype);
  return (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns * ((k + f - 1) / f * f) * SizeOf(dtype);
}

void LinearPack(const void* weight, int64_t n, int64_t k, int64_t row_stride, DType dtype, const PackColumns& columns,
                void* packed) {
  if (dtype == DType::kFloat32) return PackRows<float, float>(weight, n, k, row_stride, columns, packed);
  if (dtype == DType::kFloat16) return PackRows<uint16_t, uint16_t>(weight, n, k, row_stride, columns, packed);
  PackRows<uint16_t, uint32_t>(weight, n, k, row_stride, columns, packed);
}

// The x rows of one chunk as float32 (or bf16 pairs), k rounded up to a whole pair.
int64_t LinearWorkspaceBytes(int64_t rows, int64_t k) { return std::min<int64_t>(rows, 384) * ((k + 1) / 2 * 2) * 4 + 64; }

}  // namespace ttsk
