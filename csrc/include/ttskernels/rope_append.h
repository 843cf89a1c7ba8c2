// Rotary positions on q and k, and k, v written to their packed pages, in one pass. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/isa.h"

namespace ttsk {

// cos, sin [rows, pairs] of positions[r] * inv_freq[i], times scale; the product in float32, as transformers has it.
void RopeTable(const int32_t* positions, int64_t rows, const float* inv_freq, int64_t pairs, float scale, float* cos,
               float* sin);

// q [rows, q_heads, head_dim], k [rows, kv_heads, head_dim], v [rows, kv_heads, v_dim] of `in_dtype` (`dtype` or
// float32), heads contiguous, rows `*_stride` elements apart. The first 2 * pairs elements of a head are rotated, element
// i with element i + pairs. q_norm, k_norm [head_dim] of `dtype` or null: RMS norm of each head before the rotation.
// q_out: [rows, q_heads, head_dim] of `dtype`. K, V of row r go to slot slots[r] (page * 16 + offset; -1: nowhere).
// float32 inside, rounded once. Opens an OpenMP team over rows; no allocation.
struct RopeAppendParams {
  const void *q, *k, *v;
  void *q_out, *k_pages, *v_pages;
  const int32_t* slots;
  const float *cos, *sin;
  const void *q_norm, *k_norm;
  int64_t rows, q_heads, kv_heads, head_dim, v_dim, pairs;
  int64_t q_stride, k_stride, v_stride, q_out_stride;
  DType in_dtype, dtype;
  float eps;
};

TTSK_DECLARE_PER_ISA(void RopeAppend(const RopeAppendParams& p);)

}  // namespace ttsk
