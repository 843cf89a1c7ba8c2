// KV pages of one layer as a test sees them: packed as the CPU's pool, or strided as an engine's.
#pragma once

#include "check.h"
#include "ttskernels/tree_attention.h"

namespace ttsk::testing {

struct Pages {
  DType type;
  int64_t page_size, heads, dim;
  bool packed, keys;
  Array array;  // NaN until set

  Pages(DType type, int64_t pages, int64_t page_size, int64_t heads, int64_t dim, bool packed, bool keys)
      : type(type), page_size(page_size), heads(heads), dim(dim), packed(packed), keys(keys),
        array(type, pages * page_size * heads * dim) {}

  // Packed K [pages, heads, dim / f, 16, f], V [pages, heads, 16 / f, dim, f]; strided [pages, page_size, heads, dim].
  int64_t Index(int64_t page, int64_t slot, int64_t head, int64_t d) const {
    const int64_t f = PackFactor(type);
    if (!packed) return ((page * page_size + slot) * heads + head) * dim + d;
    const int64_t base = (page * heads + head) * dim * 16;
    return base + (keys ? (d / f * 16 + slot) * f + d % f : (slot / f * dim + d) * f + slot % f);
  }
  double Get(int64_t page, int64_t slot, int64_t head, int64_t d) const { return array.Get(Index(page, slot, head, d)); }
  KvStrides strides() const { return {page_size * heads * dim, heads * dim, dim}; }
};

}  // namespace ttsk::testing
