// Copies of the first tokens of pages to other pages, for many pools (layers, K and V) whose addresses stand in a table.
// Torch-free; compiles as C++ and CUDA.
#pragma once

#include <cstdint>

#include "ttskernels/plan_step.h"

namespace ttsk {

// One pool of token-major pages: row (page, slot, head) of `row_bytes` bytes is at base + page * page_stride + slot *
// slot_stride + head * head_stride, strides in bytes. A table of pools is an array of these, 8 int64 each.
struct PagePoolView {
  int64_t base, page_stride, slot_stride, head_stride, row_bytes, heads, unit_bytes, reserved;
};

// `unit_bytes` (16, 8, 4, 2 or 1) divides base, strides and row_bytes: what one thread moves at a time.
TTSK_HOST_DEVICE inline int64_t UnitsOfToken(const PagePoolView& pool) {
  return pool.heads * (pool.row_bytes / pool.unit_bytes);
}

// Byte offset, from the start of a page, of unit i of its first tokens: units of one row follow each other.
TTSK_HOST_DEVICE inline int64_t UnitOffset(const PagePoolView& pool, int64_t i) {
  const int64_t per_row = pool.row_bytes / pool.unit_bytes, per_token = pool.heads * per_row;
  const int64_t token = i / per_token, in_token = i - token * per_token, head = in_token / per_row;
  return token * pool.slot_stride + head * pool.head_stride + (in_token - head * per_row) * pool.unit_bytes;
}

}  // namespace ttsk
