// Attention of every plan row over its own path through a forest of KV nodes: shared nodes are read once. Torch-free.
#pragma once

#include <cstdint>

#include "ttskernels/dtype.h"
#include "ttskernels/isa.h"
#include "ttskernels/kv_form.h"

namespace ttsk {

// Element strides of an engine's pool [pages, page_size, kv_heads, head_dim]; the last dimension is contiguous.
struct KvStrides {
  int64_t page, token, head;
};

// q [rows, q_heads, head_dim] and out [rows, q_heads, v_dim] have contiguous heads, rows `*_stride` elements apart, and
// `dtype`, as k and v of form kFloat do; out aliases nothing. Over fixed-point pages (packed), q and the weights of a tile
// become int16 with a scale a row, and products are summed exactly.
// lse [rows, q_heads] (or null) is the natural log of the denominator. A row that sees nothing gives 0 and -inf.
// Packed pools (page_size 16; in fixed point see kv_form.h): K [pages, kv_heads, head_dim / f, 16, f], V [pages, kv_heads, 16 / f, v_dim, f].
// head_dim and v_dim are multiples of 16 up to 256. Unused slots may hold anything, NaN too.
// Reads each item's K, V once per 192 rows of q heads, writes v_dim + 1 values a (row, head), and partials if the plan
// has slots. Runs on NumThreads() threads; results do not depend on it, nor on which items the plan has.
struct TreeAttentionParams {
  const void* q;
  void* out;
  float* lse;
  const void* k;
  const void* v;
  const int32_t* plan;
  int64_t rows, q_heads, kv_heads, head_dim, v_dim, q_stride, out_stride;
  DType dtype;
  bool packed;
  KvForm form;  // kFloat unless packed
  KvStrides k_strides, v_strides;  // not read if packed
  float scale;
  float softcap;       // 0: off; else softcap * tanh(score / softcap)
  int32_t window;      // 0: off; else a row at p sees positions p - window + 1 .. p
  const float* sinks;  // [q_heads] or null: exp(sink) is added to the denominator (so to lse, but for empty rows)
  void* workspace;     // TreeAttentionWorkspaceBytes, 64-byte aligned; null: allocated for the call
};

TTSK_DECLARE_PER_ISA(void TreeAttention(const TreeAttentionParams& p);)

// Of q_heads .. v_dim and plan only; grows with the plan's items and slots and with NumThreads(), which must be the
// same at the call. PlanAdvance does not change it.
int64_t TreeAttentionWorkspaceBytes(const TreeAttentionParams& p);

}  // namespace ttsk
