#include "ttskernels/tree_attention.h"

#include <optional>

#include "check_plan.h"
#include "tensor.h"

namespace ttsk {
namespace {

Tensor TreeAttentionOp(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& plan, double scale,
                       double softcap, int64_t window, const std::optional<Tensor>& sinks, Tensor out) {
  const DType dtype = DTypeOf(q);
  STD_TORCH_CHECK(HasHeads(q), "q must be [rows, q_heads, head_dim] with contiguous heads");
  const KvForm form = KvFormOf(k);
  const bool fixed = form != KvForm::kFloat, packed = fixed || k.dim() == 5;
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type() && (fixed || k.scalar_type() == q.scalar_type()),
                  "k_pages and v_pages must have q's dtype, or be int16 or int8 pages");
  STD_TORCH_CHECK(k.dim() == (fixed ? 3 : packed ? 5 : 4) && v.dim() == k.dim(),
                  "k_pages and v_pages must be packed (5-D; 3-D of integers) or NHD (4-D)");
  const int64_t kv_heads = k.size(packed ? 1 : 2), page_size = packed ? 16 : k.size(1);
  const int64_t head_dim = q.size(2), f = PackFactor(dtype);
  const int64_t v_dim = fixed ? (v.size(2) - FixedRun(0, form)) / 16 : v.size(3);
  if (fixed) {
    STD_TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && k.size(2) == FixedRun(head_dim, form) &&
                        v.size(2) == FixedRun(v_dim, form) && v.size(1) == kv_heads,
                    "fixed-point pools must be contiguous [pages, kv_heads, ", FixedRun(head_dim, form),
                    "] and [pages, kv_heads, 16 * v_dim and room for 16 scales]");
  } else if (packed) {
    STD_TORCH_CHECK(k.is_contiguous() && v.is_contiguous() && k.size(3) == 16 && k.size(4) == f && v.size(4) == f &&
                        k.size(2) * f == head_dim && v.size(1) == kv_heads && v.size(2) * f == 16,
                    "packed pools must be contiguous [pages, kv_heads, ", head_dim / f, ", 16, ", f,
                    "] and [pages, kv_heads, ", 16 / f, ", v_dim, ", f, "]");
  } else {
    STD_TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1 && k.size(3) == head_dim && v.size(1) == page_size &&
                        v.size(2) == kv_heads,
                    "strided pools must be [pages, page_size, kv_heads, dim] with last stride 1");
  }
  STD_TORCH_CHECK(v.size(0) == k.size(0), "k_pages has ", k.size(0), " pages, v_pages ", v.size(0));
  STD_TORCH_CHECK(kv_heads > 0 && q.size(1) % kv_heads == 0, "q_heads ", q.size(1),
                  " is no multiple of kv_heads ", kv_heads);
  STD_TORCH_CHECK(head_dim % 16 == 0 && v_dim % 16 == 0 && head_dim > 0 && v_dim > 0 && head_dim <= 256 && v_dim <= 256,
                  "head_dim and v_dim must be multiples of 16 up to 256, got ", head_dim, " and ", v_dim);
  STD_TORCH_CHECK(softcap >= 0 && window >= 0, "softcap and window must be 0 (off) or positive, got ", softcap, " and ",
                  window);
  if (sinks.has_value()) {
    STD_TORCH_CHECK(sinks->scalar_type() == ScalarType::Float && sinks->is_contiguous() && sinks->dim() == 1 &&
                        sinks->numel() == q.size(1),
                    "sinks must be float32 [q_heads]");
  }
  STD_TORCH_CHECK(out.scalar_type() == q.scalar_type() && HasHeads(out) && out.size(0) == q.size(0) &&
                      out.size(1) == q.size(1) && out.size(2) == v_dim,
                  "out must be [rows, q_heads, v_dim] of q's dtype, each row contiguous");
  CheckPlan(plan, q.size(0), page_size, k.size(0));

  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  TreeAttentionParams p{};
  p.q = q.data_ptr(), p.out = out.mutable_data_ptr(), p.lse = Data<float>(lse);
  p.k = k.data_ptr(), p.v = v.data_ptr(), p.plan = Data<const int32_t>(plan);
  p.rows = q.size(0), p.q_heads = q.size(1), p.kv_heads = kv_heads, p.head_dim = head_dim, p.v_dim = v_dim;
  p.q_stride = q.stride(0), p.out_stride = out.stride(0), p.dtype = dtype, p.packed = packed, p.form = form;
  if (!packed) {
    p.k_strides = {k.stride(0), k.stride(1), k.stride(2)};
    p.v_strides = {v.stride(0), v.stride(1), v.stride(2)};
  }
  p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
  p.window = static_cast<int32_t>(window < INT32_MAX ? window : INT32_MAX);
  p.sinks = sinks.has_value() ? Data<const float>(*sinks) : nullptr;
  TTSK_SELECT(TreeAttention)(p);
  return lse;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ttskernels, CPU, m) { m.impl("tree_attention", TORCH_BOX(&TreeAttentionOp)); }

}  // namespace ttsk
