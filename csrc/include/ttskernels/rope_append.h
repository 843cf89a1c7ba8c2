// Rotates q and k (optionally after a norm of each head) and writes k, v into KV pages, one pass. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/isa.h"
#include "ttskernels/tree_attention.h"

namespace ttsk {

// Row r at position p: element i < pairs and its partner i + pairs of each head turn by p * inv_freq[i]; elements from
// 2 * pairs on are kept. Arithmetic in float32, one rounding to `dtype` at the end.
// q_in [rows, q_heads, head_dim], k_in, v_in [rows, kv_heads, ...] hold `in_dtype` (float32 or `dtype`), rows
// `*_stride` elements apart, heads contiguous, so they may lie side by side in a fused projection's rows.
// q_out [rows, q_heads, head_dim] of `dtype`; it may alias q_in if the dtypes and strides agree.
// slots[r] = page * page_size + slot, -1: k and v of this row are not written. Slots must be distinct. Fixed-point pages
// (packed, see kv_form.h) get integers to nearest even of k turned and v as it is; `dtype` is then q_out's alone.
// Reads and writes each value once; on all threads for many rows; no allocation.
struct RopeAppendParams {
  const void* q_in;
  const void* k_in;
  const void* v_in;
  void* q_out;
  void* k_pages;
  void* v_pages;
  int64_t rows, q_heads, kv_heads, head_dim, v_dim, page_size;
  int64_t q_in_stride, k_in_stride, v_in_stride, q_out_stride;
  DType in_dtype, dtype;
  bool packed;                     // layout of the pages, as in TreeAttentionParams
  KvForm form;                     // kFloat unless packed
  KvStrides k_strides, v_strides;  // not read if packed
  int64_t pairs;                   // at most head_dim / 2; head_dim, v_dim <= 1024
  const float* cos_sin;            // [rows, 2 * pairs] from RopeTable, for all layers of an iteration; or null:
  const float* inv_freq;           // [pairs] computed here from these three
  const int32_t* positions;        // [rows]
  float rope_scale;                // multiplies cos and sin
  const int32_t* slots;            // [rows]
  const void* q_norm;              // [head_dim] of norm_dtype, or null: no norm
  const void* k_norm;
  DType norm_dtype;
  float eps;
};

TTSK_DECLARE_PER_ISA(void RopeAppend(const RopeAppendParams& p);)

// cos_sin[r] = {scale * cos(positions[r] * inv_freq), scale * sin(...)}, `pairs` of each, in float32 as transformers
// computes them. About 1 us a row of 64 pairs: once per iteration, not per layer.
void RopeTable(const int32_t* positions, int64_t rows, const float* inv_freq, int64_t pairs, float scale,
               float* cos_sin);

}  // namespace ttsk
