#include "ttskernels/tree_attention.h"

#include "pages.h"
#include "trees.h"

namespace ttsk::testing {
namespace {

struct Options {
  int64_t q_heads, kv_heads, dim, v_dim;
  DType type;
  bool packed, deep;
  KvForm form;
};

// A head of q as a kernel over such pages reads it: rounded to integers, of which head_dim products with K's fit in int32.
std::vector<double> QueryOf(const Array& q, int64_t at, int64_t dim, KvForm form) {
  std::vector<double> values(dim);
  float top = 0;
  for (int64_t d = 0; d < dim; ++d) values[d] = q.Get(at + d), top = std::max(top, std::fabs(static_cast<float>(values[d])));
  if (form == KvForm::kFloat) return values;
  const double fits = std::floor(2147483647.0 / (MostOf(form) * static_cast<double>(dim)));
  const float most = static_cast<float>(std::min(fits, 32767.0)), up = most / top, step = top / most;
  for (double& value : values) value = std::nearbyint(static_cast<float>(value) * up) * static_cast<double>(step);
  return values;
}

void RunCase(Checks& check, Random& random, const Options& o) {
  const int32_t page_size = o.packed ? 16 : random.Pick({1, 5, 16, 32});
  const Tree tree = RandomTree(random, page_size, o.deep);
  const std::vector<int32_t> plan = BuildPlan(tree.Packed(), RandomCosts(random, o.q_heads / o.kv_heads));
  const int64_t rows = static_cast<int64_t>(tree.row_node.size());
  check.what = Text("%lld rows of %d nodes, %lld/%lld heads x %lld/%lld, %s, %s pages, packed %d", static_cast<long long>(rows),
                    static_cast<int>(tree.parent.size()), static_cast<long long>(o.q_heads),
                    static_cast<long long>(o.kv_heads), static_cast<long long>(o.dim), static_cast<long long>(o.v_dim),
                    NameOf(o.type), NameOf(o.form), o.packed);
  int32_t used = 0;
  for (const int32_t page : tree.pages) used = std::max(used, page + 1);
  Pages k(o.type, used, page_size, o.kv_heads, o.dim, o.packed, true, o.form);
  Pages v(o.type, used, page_size, o.kv_heads, o.v_dim, o.packed, false, o.form);
  for (int32_t node = 0; node < static_cast<int32_t>(tree.parent.size()); ++node) {
    for (int32_t t = 0; t < tree.length[node]; ++t) {
      const Place at = tree.Of(node, tree.Pos0(node) + t);
      for (int64_t h = 0; h < o.kv_heads; ++h) {
        for (Pages* pages : {&k, &v}) {
          std::vector<double> values(pages->dim);
          for (double& value : values) value = random.Normal();
          pages->Put(at.page, at.slot, h, values);
        }
      }
    }
  }
  const int64_t q_stride = o.q_heads * o.dim + 3, out_stride = o.q_heads * o.v_dim + 2;
  Array q = Array::Normal(o.type, rows * q_stride, random), out(o.type, rows * out_stride);
  Array lse(DType::kFloat32, rows * o.q_heads), sinks = Array::Normal(DType::kFloat32, o.q_heads, random);
  const bool sunk = random.Chance(0.3);
  TreeAttentionParams p{};
  p.q = q.data(), p.out = out.data(), p.lse = lse.floats(), p.k = k.data(), p.v = v.data(), p.form = o.form, p.plan = plan.data();
  p.rows = rows, p.q_heads = o.q_heads, p.kv_heads = o.kv_heads, p.head_dim = o.dim, p.v_dim = o.v_dim;
  p.q_stride = q_stride, p.out_stride = out_stride, p.dtype = o.type, p.packed = o.packed;
  p.k_strides = k.strides(), p.v_strides = v.strides(), p.scale = static_cast<float>(1 / std::sqrt(o.dim));
  p.softcap = random.Chance(0.3) ? 2.5f : 0.0f, p.window = random.Chance(0.3) ? static_cast<int32_t>(random.Between(1, 40)) : 0;
  p.sinks = sunk ? sinks.floats() : nullptr;
  TTSK_SELECT(TreeAttention)(p);

  const bool pair_dots = ActiveIsa() == Isa::kAvx512Bf16 || ActiveIsa() == Isa::kNeonBf16;
  const bool rounded_weights = pair_dots && o.type == DType::kBFloat16;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t pos = tree.row_pos[r], first = p.window > 0 ? std::max(0, pos + 1 - p.window) : 0;
    for (int64_t h = 0; h < o.q_heads; ++h) {
      const int64_t kv_head = h / (o.q_heads / o.kv_heads);
      std::vector<double> score, want(o.v_dim, 0.0), magnitude(o.v_dim, 0.0);
      double top = sunk ? sinks.Get(h) : -HUGE_VAL, total = 0, largest = 0;
      const std::vector<double> query = QueryOf(q, r * q_stride + h * o.dim, o.dim, o.form);
      for (int32_t t = first; t <= pos; ++t) {
        const Place at = tree.Of(tree.row_node[r], t);
        double s = 0;
        for (int64_t d = 0; d < o.dim; ++d) s += query[d] * k.Get(at.page, at.slot, kv_head, d);
        s *= p.scale;
        if (p.softcap != 0) s = p.softcap * std::tanh(s / p.softcap);
        score.push_back(s), top = std::max(top, s);
      }
      for (const double s : score) total += std::exp(s - top);
      if (sunk) total += std::exp(sinks.Get(h) - top);
      std::vector<double> integers(o.v_dim, 0.0);
      for (int32_t t = first; t <= pos; ++t) {
        const Place at = tree.Of(tree.row_node[r], t);
        const double weight = std::exp(score[t - first] - top) / total;
        const double v_scale = o.form == KvForm::kFloat ? 1.0 : v.Scale(at.page, at.slot, kv_head);
        largest = std::max(largest, weight * v_scale);
        for (int64_t d = 0; d < o.v_dim; ++d) {
          const double value = v.Get(at.page, at.slot, kv_head, d);
          want[d] += weight * value, magnitude[d] += weight * std::fabs(value), integers[d] += std::fabs(value) / v_scale;
        }
      }
      // A rounded weight, times V's scale, is off by half a step of the row's largest, and meets V's integer.
      const double half = o.form == KvForm::kFloat ? 0.0 : largest / (o.form == KvForm::kInt16 ? 8191 : 32767) * 0.5001;
      const double relative = 2e-5 + (rounded_weights && o.form == KvForm::kFloat ? 0x1p-8 : 0.0);
      for (int64_t d = 0; d < o.v_dim; ++d) {
        check.Near(d, out.Get(r * out_stride + h * o.v_dim + d), want[d],
                   relative * magnitude[d] + half * integers[d] + Rounding(o.type) * std::fabs(want[d]) + 1e-7);
      }
      check.Near(h, lse.Get(r * o.q_heads + h), top + std::log(total), 3e-5);
    }
    for (int64_t d = o.q_heads * o.v_dim; d < out_stride; ++d) check.Equal(d, out.Get(r * out_stride + d), kNan);
  }
}

}  // namespace

TTSK_TEST(tree_attention) {
  const std::pair<int64_t, int64_t> heads[] = {{1, 1}, {3, 1}, {7, 1}, {4, 4}, {6, 2}};
  for (int i = 0; i < 30; ++i) {
    const auto [q_heads, kv_heads] = heads[random.Below(5)];
    const int64_t dim = 16 * random.Between(1, 6);
    const KvForm form = random.Pick({KvForm::kFloat, KvForm::kFloat, KvForm::kInt16, KvForm::kInt8});
    const bool packed = form != KvForm::kFloat || random.Chance(0.6);
    RunCase(check, random, {q_heads, kv_heads, dim, random.Chance(0.7) ? dim : 48, AnyType(random), packed, false, form});
  }
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    RunCase(check, random, {4, 2, 32, 32, type, true, true, KvForm::kFloat});
  }
  for (const KvForm form : {KvForm::kInt16, KvForm::kInt8}) {
    RunCase(check, random, {4, 2, 32, 32, DType::kBFloat16, true, true, form});
  }
}

}  // namespace ttsk::testing
