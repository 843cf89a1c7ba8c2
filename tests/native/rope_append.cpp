#include "ttskernels/rope_append.h"

#include <tuple>

#include "check.h"
#include "pages.h"

namespace ttsk::testing {
namespace {

// One head turned (after its norm) in double.
std::vector<double> Turned(const Array& in, int64_t at, int64_t dim, const Array* norm, double eps, int64_t pairs,
                           int32_t position, const Array& inv_freq, double scale) {
  std::vector<double> x(dim);
  double sum = 0;
  for (int64_t i = 0; i < dim; ++i) x[i] = in.Get(at + i), sum += x[i] * x[i];
  if (norm != nullptr) {
    for (int64_t i = 0; i < dim; ++i) x[i] *= norm->Get(i) / std::sqrt(sum / static_cast<double>(dim) + eps);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const double angle = static_cast<float>(static_cast<float>(position) * static_cast<float>(inv_freq.Get(i)));
    const double c = std::cos(angle) * scale, s = std::sin(angle) * scale, a = x[i], b = x[pairs + i];
    x[i] = a * c - b * s, x[pairs + i] = b * c + a * s;
  }
  return x;
}

}  // namespace

TTSK_TEST(rope_append) {
  for (int i = 0; i < 40; ++i) {
    const DType type = AnyType(random), in = random.Chance(0.5) ? DType::kFloat32 : type;
    const KvForm form = random.Pick({KvForm::kFloat, KvForm::kFloat, KvForm::kInt16, KvForm::kInt8});
    const bool packed = form != KvForm::kFloat || random.Chance(0.5), normed = random.Chance(0.5), table = random.Chance(0.5);
    const int64_t page_size = packed ? 16 : random.Pick<int64_t>({1, 5, 16});
    const int64_t kv_heads = random.Between(1, 3), q_heads = kv_heads * random.Between(1, 3), rows = random.Between(1, 7);
    const int64_t dim = 16 * random.Between(1, 6), v_dim = random.Chance(0.7) ? dim : 48, pages = rows + 2;
    const int64_t pairs = random.Chance(0.7) ? dim / 2 : dim / 4;
    check.what = Text("%lld rows, %lld/%lld heads x %lld, %s to %s, %s pages, packed %d, norm %d", static_cast<long long>(rows),
                      static_cast<long long>(q_heads), static_cast<long long>(kv_heads), static_cast<long long>(dim),
                      NameOf(in), NameOf(type), NameOf(form), packed, normed);
    const int64_t q_stride = q_heads * dim + 5, k_stride = kv_heads * dim + 2, v_stride = kv_heads * v_dim + 1;
    Array q = Array::Normal(in, rows * q_stride, random), k = Array::Normal(in, rows * k_stride, random);
    Array v = Array::Normal(in, rows * v_stride, random), q_out(type, rows * q_heads * dim);
    Array q_norm = Array::Normal(type, dim, random), k_norm = Array::Normal(type, dim, random);
    Array inv_freq(DType::kFloat32, pairs), cos_sin(DType::kFloat32, rows * 2 * pairs);
    for (int64_t j = 0; j < pairs; ++j) inv_freq.Set(j, std::pow(1e4, -2.0 * static_cast<double>(j) / dim));
    const double scale = random.Pick({1.0, 1.25}), eps = 1e-6;
    std::vector<int32_t> positions(rows), slots(rows);
    for (int64_t r = 0; r < rows; ++r) {
      positions[r] = static_cast<int32_t>(random.Below(5000));
      slots[r] = random.Chance(0.2) ? -1 : static_cast<int32_t>((pages - 1 - r) * page_size + random.Below(page_size));
    }
    Pages k_pages(type, pages, page_size, kv_heads, dim, packed, true, form);
    Pages v_pages(type, pages, page_size, kv_heads, v_dim, packed, false, form);
    RopeTable(positions.data(), rows, inv_freq.floats(), pairs, static_cast<float>(scale), cos_sin.floats());
    RopeAppendParams p{};
    p.q_in = q.data(), p.k_in = k.data(), p.v_in = v.data(), p.q_out = q_out.data();
    p.k_pages = k_pages.data(), p.v_pages = v_pages.data(), p.form = form;
    p.rows = rows, p.q_heads = q_heads, p.kv_heads = kv_heads, p.head_dim = dim, p.v_dim = v_dim, p.page_size = page_size;
    p.q_in_stride = q_stride, p.k_in_stride = k_stride, p.v_in_stride = v_stride, p.q_out_stride = q_heads * dim;
    p.in_dtype = in, p.dtype = p.norm_dtype = type, p.packed = packed;
    p.k_strides = k_pages.strides(), p.v_strides = v_pages.strides(), p.pairs = pairs;
    p.cos_sin = table ? cos_sin.floats() : nullptr, p.inv_freq = inv_freq.floats(), p.positions = positions.data();
    p.rope_scale = static_cast<float>(scale), p.slots = slots.data(), p.eps = static_cast<float>(eps);
    p.q_norm = normed ? q_norm.data() : nullptr, p.k_norm = normed ? k_norm.data() : nullptr;
    TTSK_SELECT(RopeAppend)(p);

    const auto tolerance = [&](double want) { return Rounding(type) * std::fabs(want) + 4e-6; };
    std::vector<std::vector<int64_t>> written(pages, std::vector<int64_t>(page_size, -1));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t h = 0; h < q_heads; ++h) {
        const auto want = Turned(q, r * q_stride + h * dim, dim, normed ? &q_norm : nullptr, eps, pairs, positions[r], inv_freq, scale);
        for (int64_t d = 0; d < dim; ++d) check.Near(d, q_out.Get((r * q_heads + h) * dim + d), want[d], tolerance(want[d]));
      }
      if (slots[r] >= 0) written[slots[r] / page_size][slots[r] % page_size] = r;
    }
    for (int64_t page = 0; page < pages; ++page) {
      for (int64_t slot = 0; slot < page_size; ++slot) {
        const int64_t r = written[page][slot];
        for (int64_t h = 0; h < kv_heads; ++h) {
          std::vector<double> want(dim, kNan);
          if (r >= 0) want = Turned(k, r * k_stride + h * dim, dim, normed ? &k_norm : nullptr, eps, pairs, positions[r], inv_freq, scale);
          std::vector<double> value(v_dim, kNan);
          for (int64_t d = 0; d < v_dim; ++d) value[d] = r >= 0 ? v.Get(r * v_stride + h * v_dim + d) : kNan;
          for (const auto& [pool, wanted, keys] : {std::tuple{&k_pages, &want, true}, std::tuple{&v_pages, &value, false}}) {
            double most = 0;
            for (const double x : *wanted) most = std::max(most, std::fabs(x));
            for (int64_t d = 0; d < pool->dim; ++d) {
              const double x = (*wanted)[d], plain = keys ? tolerance(x) : Rounding(type) * std::fabs(x) + 3e-8;
              const double half_step = (0.5 + 0x1p-10) * most / MostOf(form) + 6e-6;
              check.Near(d, pool->Get(page, slot, h, d), x, form == KvForm::kFloat ? plain : half_step);
            }
          }
        }
      }
    }
  }
}

}  // namespace ttsk::testing
