// KV pages of one layer as a test sees them: packed as the CPU's pool, or strided as an engine's.
#pragma once

#include <algorithm>

#include "check.h"
#include "ttskernels/tree_attention.h"

namespace ttsk::testing {

inline const char* NameOf(KvForm form) {
  return form == KvForm::kFloat ? "float" : form == KvForm::kInt16 ? "int16" : "int8";
}

struct Pages {
  DType type;
  int64_t page_size, heads, dim;
  bool packed, keys;
  KvForm form;
  Array array;                     // of floats, NaN until set
  std::vector<unsigned char> runs;  // in fixed point, 0xff (scale NaN) until set

  Pages(DType type, int64_t pages, int64_t page_size, int64_t heads, int64_t dim, bool packed, bool keys,
        KvForm form = KvForm::kFloat)
      : type(type), page_size(page_size), heads(heads), dim(dim), packed(packed), keys(keys), form(form),
        array(type, form == KvForm::kFloat ? pages * page_size * heads * dim : 0),
        runs(form == KvForm::kFloat ? 0 : pages * heads * FixedRun(dim, form) * IntegerBytes(form), 0xff) {}

  // Packed K [pages, heads, dim / f, 16, f], V [pages, heads, 16 / f, dim, f]; strided [pages, page_size, heads, dim].
  int64_t Index(int64_t page, int64_t slot, int64_t head, int64_t d) const {
    const int64_t f = form == KvForm::kFloat ? PackFactor(type) : 2;
    if (!packed) return ((page * page_size + slot) * heads + head) * dim + d;
    const int64_t base = (page * heads + head) * dim * 16;
    return base + (keys ? (d / f * 16 + slot) * f + d % f : (slot / f * dim + d) * f + slot % f);
  }
  // In fixed point: where an integer, or the scale of a slot, is in `runs`.
  int64_t IntegerAt(int64_t page, int64_t slot, int64_t head, int64_t d) const {
    const int64_t run = page * heads + head;
    return (run * FixedRun(dim, form) + Index(page, slot, head, d) - run * dim * 16) * IntegerBytes(form);
  }
  int64_t ScaleAt(int64_t page, int64_t slot, int64_t head) const {
    return ((page * heads + head) * FixedRun(dim, form) + 16 * dim) * IntegerBytes(form) + slot * 4;
  }
  double Scale(int64_t page, int64_t slot, int64_t head) const {
    float scale;
    std::memcpy(&scale, runs.data() + ScaleAt(page, slot, head), sizeof(scale));
    return scale;
  }
  double Get(int64_t page, int64_t slot, int64_t head, int64_t d) const {
    if (form == KvForm::kFloat) return array.Get(Index(page, slot, head, d));
    const unsigned char* at = runs.data() + IntegerAt(page, slot, head, d);
    int16_t word;
    std::memcpy(&word, at, sizeof(word));
    return Scale(page, slot, head) * (form == KvForm::kInt16 ? word : static_cast<int8_t>(*at));
  }
  void Put(int64_t page, int64_t slot, int64_t head, const std::vector<double>& values) {
    double most = 0;
    for (const double value : values) most = std::max(most, std::fabs(value));
    const float scale = static_cast<float>(most / MostOf(form));
    for (int64_t d = 0; d < dim; ++d) {
      if (form == KvForm::kFloat) {
        array.Set(Index(page, slot, head, d), values[d]);
        continue;
      }
      const int16_t word = static_cast<int16_t>(std::nearbyint(values[d] / most * MostOf(form)));
      unsigned char* at = runs.data() + IntegerAt(page, slot, head, d);
      if (form == KvForm::kInt16) std::memcpy(at, &word, sizeof(word));
      else *at = static_cast<unsigned char>(word);
    }
    if (form != KvForm::kFloat) std::memcpy(runs.data() + ScaleAt(page, slot, head), &scale, sizeof(scale));
  }
  void* data() { return form == KvForm::kFloat ? array.data() : runs.data(); }
  KvStrides strides() const { return {page_size * heads * dim, heads * dim, dim}; }
};

}  // namespace ttsk::testing
