// Packing of linear's weights; the kernels are in kernels/linear.cpp.
#include "ttskernels/linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "element.h"
#include "ttskernels/threads.h"

namespace ttsk {
namespace {

int64_t ColumnOf(const PackColumns& columns, int64_t row) {
  return columns.first + row / columns.group * columns.step + row % columns.group;
}

// Element (column c, reduced index i) of a packed matrix is at PanelBase + (i / f * 64 + c % 64) * f + i % f: a row goes
// out as `Group`s of f elements, 64 groups apart.
template <typename Element, typename Group>
void PackRows(const void* weight, int64_t n, int64_t k, int64_t row_stride, const PackColumns& columns, void* packed) {
  constexpr int64_t kF = sizeof(Group) / sizeof(Element);
  const int64_t steps = (k + kF - 1) / kF, whole = k / kF;
  ForEach(n, n * k > 65536, [&](int64_t i) {
    const int64_t column = ColumnOf(columns, i);
    const Element* in = static_cast<const Element*>(weight) + i * row_stride;
    Group* out = static_cast<Group*>(packed) + column / kPanelColumns * steps * kPanelColumns + column % kPanelColumns;
    for (int64_t j = 0; j < whole; ++j) std::memcpy(out + j * kPanelColumns, in + j * kF, sizeof(Group));
    if (whole < steps) std::memcpy(out + whole * kPanelColumns, in + whole * kF, (k - whole * kF) * sizeof(Element));
  });
}

// Squared error of `count` values, rounded after multiplication with up. Eight partial sums, for the vector units.
float RoundingError(const float* in, int64_t count, float up, float scale) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to nearest even
  float sums[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) {
      const float error = in[i + j] - ((in[i + j] * up + kRound) - kRound) * scale;
      sums[j] += error * error;
    }
  }
  float sum = 0.0f;
  for (const float part : sums) sum += part;
  for (int64_t i = count / 8 * 8; i < count; ++i) {
    const float error = in[i] - ((in[i] * up + kRound) - kRound) * scale;
    sum += error * error;
  }
  return sum;
}

// The integer that the largest value becomes in int8: the one of kByteTries, half a unit apart, that rounds best.
float LargestInteger(const float* in, int64_t count, float most) {
  float best = kMostByte, least = INFINITY;
  for (int t = 0; t < kByteTries; ++t) {
    const float top = kMostByte - 0.5f * static_cast<float>(t), error = RoundingError(in, count, top / most, most / top);
    if (error < 0.999f * least) best = top, least = error;
  }
  return best;
}

// Turns a group, see TurnUnits of linear_fixed.h.
void Turn(float* v, int64_t units) {
  for (int64_t step = 1; step < kFixedUnit; step *= 2) {
    for (int64_t i = 0; i < units * kFixedUnit; ++i) {
      if (i & step) continue;
      const float a = v[i], b = v[i + step];
      v[i] = a + b, v[i + step] = a - b;
    }
  }
  for (int64_t i = 0; i < kFixedUnit && units > 1; ++i) {
    float *a = v + i, *b = a + kFixedUnit, *c = b + kFixedUnit;
    if (units == 2) {
      const float sum = *a + *b;
      *b = *a - *b, *a = sum;
    } else {
      const float most = (*a + *b + *c) * kTwoThirds;
      *a -= most, *b -= most, *c -= most;
    }
  }
}

// Integer i of a group to column c of a block's values. Bytes lie so that those at even places are the first two of four
// (EvenBytes).
template <bool kBytes>
void Place(int value, int64_t i, int64_t c, uint8_t* out) {
  if (kBytes) {
    constexpr int64_t kPlace[] = {0, 2, 1, 3};
    out[(i / 4 * kPanelColumns + c) * 4 + kPlace[i % 4]] = static_cast<uint8_t>(value + kByteZero);
  } else {
    reinterpret_cast<int16_t*>(out)[(i / 2 * kPanelColumns + c) * 2 + i % 2] = static_cast<int16_t>(value);
  }
}

// Turned weights times turned inputs are so many times as large as they were; the weights' scales undo it.
constexpr float Unturned(int64_t units) { return 1.0f / static_cast<float>(units == 2 ? 2 * kFixedUnit : kFixedUnit); }

// One group of a row to column c of a packed block.
template <bool kBytes>
void PackGroup(float* in, const FixedGroups& groups, int64_t c, uint8_t* block) {
  if (kBytes) Turn(in, groups.units);
  float most = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < groups.size(); ++i) most = std::max(most, std::fabs(in[i])), finite &= std::isfinite(in[i]);
  float* scales = reinterpret_cast<float*>(block);
  uint8_t* out = block + kPanelColumns * 4;
  const bool scaled = finite && most >= kLeastScaled;
  const float top = !scaled ? 1.0f : kBytes ? LargestInteger(in, groups.size(), most) : kMostWord;
  const float up = scaled ? top / most : 0.0f;
  scales[c] = scaled ? most / top * (kBytes ? Unturned(groups.units) : 1.0f) : finite ? 0.0f : NAN;
  for (int64_t i = 0; i < groups.size(); ++i) {
    Place<kBytes>(static_cast<int>(finite ? std::nearbyint(in[i] * up) : 0.0f), i, c, out);
  }
}

template <bool kBytes>
void PackFixed(const void* weight, int64_t n, int64_t k, int64_t row_stride, DType dtype, const PackColumns& columns,
               void* packed) {
  const FixedGroups groups(kBytes ? LinearForm::kInt8 : LinearForm::kInt16, k);
  const int64_t size = groups.size(), block = groups.block_bytes(kBytes ? 1 : 2);
  ForEach(n, n * k > 65536, [&](int64_t i) {
    const int64_t column = ColumnOf(columns, i);
    uint8_t* panel = static_cast<uint8_t*>(packed) + column / kPanelColumns * groups.count * block;
    float wide[kMostUnits * kFixedUnit];
    for (int64_t g = 0; g < groups.count; ++g) {
      const int64_t count = std::min(size, k - g * size);
      for (int64_t j = 0; j < count; ++j) wide[j] = ElementAsFloat(weight, i * row_stride + g * size + j, dtype);
      std::fill(wide + count, wide + size, 0.0f);
      PackGroup<kBytes>(wide, groups, column % kPanelColumns, panel + g * block);
    }
  });
}

}  // namespace

int64_t LinearPackedBytes(int64_t n, int64_t k, DType dtype, LinearForm form) {
  if (form != LinearForm::kFloat) {
    const FixedGroups groups(form, k);
    return (n + kPanelColumns - 1) / kPanelColumns * groups.count * groups.block_bytes(form == LinearForm::kInt16 ? 2 : 1);
  }
  const int64_t f = PackFactor(dtype);
  return (n + kPanelColumns - 1) / kPanelColumns * kPanelColumns * ((k + f - 1) / f * f) * SizeOf(dtype);
}

void LinearPack(const void* weight, int64_t n, int64_t k, int64_t row_stride, DType dtype, const PackColumns& columns,
                void* packed, LinearForm form) {
  if (form == LinearForm::kInt16) return PackFixed<false>(weight, n, k, row_stride, dtype, columns, packed);
  if (form == LinearForm::kInt8) return PackFixed<true>(weight, n, k, row_stride, dtype, columns, packed);
  if (dtype == DType::kFloat32) return PackRows<float, float>(weight, n, k, row_stride, columns, packed);
  if (dtype == DType::kFloat16) return PackRows<uint16_t, uint16_t>(weight, n, k, row_stride, columns, packed);
  PackRows<uint16_t, uint32_t>(weight, n, k, row_stride, columns, packed);
}

void LinearPackRounded(const int8_t* values, const float* scales, int64_t n, int64_t k, const PackColumns& columns,
                       void* packed) {
  const FixedGroups groups(LinearForm::kInt8, k);
  const int64_t block = groups.block_bytes(1);
  ForEach(n, n * k > 65536, [&](int64_t row) {
    const int64_t column = ColumnOf(columns, row), c = column % kPanelColumns;
    uint8_t* out = static_cast<uint8_t*>(packed) + column / kPanelColumns * groups.count * block;
    for (int64_t g = 0; g < groups.count; ++g, out += block) {
      const int8_t* group = values + (row * groups.count + g) * groups.size();
      reinterpret_cast<float*>(out)[c] = scales[row * groups.count + g] * Unturned(groups.units);
      for (int64_t i = 0; i < groups.size(); ++i) Place<true>(group[i], i, c, out + kPanelColumns * 4);
    }
  });
}

// The x rows of one chunk as float32 (or bf16 pairs, or int16 with scales), k rounded up to a whole group.
int64_t LinearWorkspaceBytes(int64_t rows, int64_t k) {
  return std::min<int64_t>(rows, 384) * ((k + kFixedUnit - 1) / kFixedUnit * kFixedUnit) * 4 + 64;
}

}  // namespace ttsk
