#include "ttskernels/rope_append.h"

#include <optional>

#include "tensor.h"

namespace ttsk {
namespace {

Tensor RopeAppendOp(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& inv_freq, double rope_scale,
                    const Tensor& positions, const Tensor& slots, const std::optional<Tensor>& q_norm,
                    const std::optional<Tensor>& k_norm, double eps, const Tensor& k_pages, const Tensor& v_pages) {
  const KvForm form = KvFormOf(k_pages);
  const bool fixed = form != KvForm::kFloat;
  const ScalarType type = fixed ? q.scalar_type() : k_pages.scalar_type();  // of the result and the norms
  const DType dtype = DTypeOf(type), in_dtype = DTypeOf(q);
  const int64_t rows = q.size(0), q_heads = q.size(1), head_dim = q.size(2), kv_heads = k.size(1), v_dim = v.size(2);
  STD_TORCH_CHECK(HasHeads(q) && HasHeads(k) && HasHeads(v), "q, k and v must be [rows, heads, dim] with contiguous heads");
  STD_TORCH_CHECK(k.size(0) == rows && v.size(0) == rows && v.size(1) == kv_heads && k.size(2) == head_dim,
                  "q, k and v must have the same rows, k and v the same heads, q and k the same head_dim");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                      v_pages.scalar_type() == k_pages.scalar_type() &&
                      (in_dtype == dtype || in_dtype == DType::kFloat32),
                  "q, k and v must have one dtype, float32 or that of the pages");
  STD_TORCH_CHECK(head_dim <= 1024 && v_dim <= 1024, "head_dim and v_dim must be at most 1024");
  STD_TORCH_CHECK(inv_freq.scalar_type() == ScalarType::Float && inv_freq.is_contiguous() &&
                      2 * inv_freq.numel() <= head_dim,
                  "inv_freq must be contiguous float32 [at most head_dim / 2]");
  STD_TORCH_CHECK(positions.scalar_type() == ScalarType::Int && slots.scalar_type() == ScalarType::Int &&
                      positions.is_contiguous() && slots.is_contiguous() &&
                      positions.numel() == rows && slots.numel() == rows,
                  "positions and slots must be contiguous int32 [rows]");
  const int64_t f = PackFactor(dtype);
  const bool packed = fixed || k_pages.dim() == 5;
  STD_TORCH_CHECK(k_pages.dim() == (fixed ? 3 : packed ? 5 : 4) && v_pages.dim() == k_pages.dim(),
                  "pages must be packed (5-D; 3-D of integers) or NHD (4-D)");
  const int64_t page_size = packed ? 16 : k_pages.size(1);
  if (fixed) {
    STD_TORCH_CHECK(k_pages.is_contiguous() && v_pages.is_contiguous() && head_dim % 2 == 0 &&
                        k_pages.size(1) == kv_heads && v_pages.size(1) == kv_heads &&
                        k_pages.size(2) == FixedRun(head_dim, form) && v_pages.size(2) == FixedRun(v_dim, form),
                    "fixed-point pages must be contiguous [pages, ", kv_heads, ", ", FixedRun(head_dim, form), "] and [pages, ",
                    kv_heads, ", ", FixedRun(v_dim, form), "]");
  } else if (packed) {
    STD_TORCH_CHECK(k_pages.is_contiguous() && v_pages.is_contiguous() && k_pages.size(1) == kv_heads &&
                        k_pages.size(2) * f == head_dim && k_pages.size(3) == 16 && k_pages.size(4) == f &&
                        v_pages.size(1) == kv_heads && v_pages.size(2) * f == 16 && v_pages.size(3) == v_dim &&
                        v_pages.size(4) == f,
                    "packed pages must be contiguous [pages, ", kv_heads, ", ", head_dim / f, ", 16, ", f,
                    "] and [pages, ", kv_heads, ", ", 16 / f, ", ", v_dim, ", ", f, "]");
  } else {
    STD_TORCH_CHECK(k_pages.stride(3) == 1 && v_pages.stride(3) == 1 && k_pages.size(2) == kv_heads &&
                        k_pages.size(3) == head_dim && v_pages.size(1) == page_size && v_pages.size(2) == kv_heads &&
                        v_pages.size(3) == v_dim,
                    "strided pages must be [pages, page_size, ", kv_heads, ", dim] with last stride 1");
  }
  const int32_t* slot = Data<const int32_t>(slots);
  const int64_t pages = k_pages.size(0) < v_pages.size(0) ? k_pages.size(0) : v_pages.size(0);
  for (int64_t r = 0; r < rows; ++r) {
    STD_TORCH_CHECK(slot[r] >= -1 && slot[r] < pages * page_size, "slots[", r, "] is ", slot[r],
                    ", need -1 or less than ",
                    pages * page_size, " (", pages, " pages of ", page_size, ")");
  }
  for (const auto& norm : {q_norm, k_norm}) {
    if (norm.has_value()) {
      STD_TORCH_CHECK(norm->is_contiguous() && norm->numel() == head_dim &&
                          norm->scalar_type() == type,
                      "q_norm and k_norm must be contiguous [head_dim] of the result's dtype");
    }
  }

  Tensor out = torch::stable::new_empty(q, {rows, q_heads, head_dim}, type);
  RopeAppendParams p{};
  p.q_in = q.data_ptr(), p.k_in = k.data_ptr(), p.v_in = v.data_ptr(), p.q_out = out.mutable_data_ptr();
  p.k_pages = k_pages.mutable_data_ptr(), p.v_pages = v_pages.mutable_data_ptr();
  p.rows = rows, p.q_heads = q_heads, p.kv_heads = kv_heads, p.head_dim = head_dim, p.v_dim = v_dim;
  p.page_size = page_size, p.q_in_stride = q.stride(0), p.k_in_stride = k.stride(0), p.v_in_stride = v.stride(0);
  p.q_out_stride = q_heads * head_dim, p.in_dtype = in_dtype, p.dtype = dtype, p.packed = packed, p.form = form;
  if (!packed) {
    p.k_strides = {k_pages.stride(0), k_pages.stride(1), k_pages.stride(2)};
    p.v_strides = {v_pages.stride(0), v_pages.stride(1), v_pages.stride(2)};
  }
  p.pairs = inv_freq.numel(), p.inv_freq = Data<const float>(inv_freq), p.positions = Data<const int32_t>(positions);
  p.rope_scale = static_cast<float>(rope_scale), p.slots = slot;
  p.q_norm = q_norm.has_value() ? q_norm->data_ptr() : nullptr;
  p.k_norm = k_norm.has_value() ? k_norm->data_ptr() : nullptr;
  p.norm_dtype = dtype, p.eps = static_cast<float>(eps);
  TTSK_SELECT(RopeAppend)(p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("rope_append", TORCH_BOX(&RopeAppendOp)); }

}  // namespace ttsk
