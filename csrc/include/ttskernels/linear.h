// y = x W^T + b with weights packed once. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/fixed_point.h"
#include "ttskernels/isa.h"

namespace ttsk {

// Packed weights: panels of 64 output columns, each contiguous over k. bf16: [panel][ceil(k / 2)][64][2], fp16 and
// fp32: [panel][k][64]. Columns past n and the odd k are zero.
constexpr int64_t kPanelColumns = 64;

// How packed weights are kept. Fixed point: a group of consecutive weights of a row shares a float32 scale, its largest
// magnitude over 4095 or 127; so does a group of x, over 8191 or 127. For int8 both are turned before, which spreads outliers:
// each 64 by a Hadamard transform, and the two or three 64s of a group among each other. A group's sum is exact in int32; sums
// are added up as float32 over ascending groups. Packed, of a group of g: [panel][k / g]{scale [64], [g / 2][64][2] int16 or
// [g / 4][64][4] bytes (weight + 128)}.
enum class LinearForm : int { kFloat, kInt16, kInt8 };
constexpr int64_t kFixedUnit = 64;
// Of a row of k: how many units of 64 (the last one filled up with zeros) a group has, and how many groups there are. Larger
// groups are faster and coarser.
struct FixedGroups {
  constexpr FixedGroups(LinearForm form, int64_t k) : units(1), count((k + kFixedUnit - 1) / kFixedUnit) {
    if (form == LinearForm::kInt8) units = count % 3 == 0 ? 3 : count % 2 == 0 ? 2 : 1;
    count /= units;
  }
  constexpr int64_t size() const { return units * kFixedUnit; }
  constexpr int64_t block_bytes(int64_t element_size) const { return kPanelColumns * (4 + size() * element_size); }

  int64_t units, count;
};
int64_t LinearPackedBytes(int64_t n, int64_t k, DType dtype, LinearForm form = LinearForm::kFloat);

// Where row i of a weight goes: column first + i / group * step + i % group of the packed matrix. Several weights can
// share one matrix: q|k|v one after the other, gate and up in alternating groups of 32.
struct PackColumns {
  int64_t first, group, step;
};
// weight: [n, k] of `dtype`, rows row_stride elements apart. Writes only its own columns; `packed` starts zeroed. A
// group with a weight that is not finite gets a NaN scale, so the outputs it reaches are NaN.
void LinearPack(const void* weight, int64_t n, int64_t k, int64_t row_stride, DType dtype, const PackColumns& columns,
                void* packed, LinearForm form = LinearForm::kFloat);

// The same with int8 weights that somebody else has rounded: values [n, ceil(k / 64) * 64] in -127 .. 127, turned (and not
// scaled back), and the scales [n, groups].
void LinearPackRounded(const int8_t* values, const float* scales, int64_t n, int64_t k, const PackColumns& columns,
                       void* packed);

enum class LinearEpilogue : int {
  kStore,   // y = acc + bias
  kAdd,     // y += acc + bias
  kSwiGlu,  // every panel is 32 gate and 32 up columns: y = silu(gate) * up, [rows, n / 2]; n a multiple of 64
};

// x: [rows, k] of the weight dtype or float32; y: [rows, n] float32 or of the weight dtype; y must not overlap x.
// bias: [n] float32 or null, in packed column order. workspace: LinearWorkspaceBytes.
// Every output element is one chain of additions over ascending k (or groups) from zero, the bias added last, at every
// rows, thread count and tail: y[r] alone equals y[r] in any batch bitwise. Reads the weights once per 384 rows.
struct LinearParams {
  const void* x;
  const void* packed;
  const float* bias;
  void* y;
  void* workspace;
  int64_t rows, n, k, x_stride, y_stride;
  DType x_dtype, weight_dtype, y_dtype;
  LinearEpilogue epilogue;
  LinearForm form = LinearForm::kFloat;
};
int64_t LinearWorkspaceBytes(int64_t rows, int64_t k);

TTSK_DECLARE_PER_ISA(void Linear(const LinearParams& p);)

}  // namespace ttsk
