#include "ttskernels/refine_logits.h"

#include <algorithm>
#include <numeric>

#include "check.h"

namespace ttsk::testing {

TTSK_TEST(refine_logits) {
  for (int i = 0; i < 30; ++i) {
    const DType type = AnyType(random);
    const int64_t rows = random.Pick<int64_t>({1, 3, 9}), vocab = random.Pick<int64_t>({1, 15, 16, 40, 1000});
    const int64_t dim = random.Pick<int64_t>({1, 16, 33, 100});
    check.what = Text("%lld x %lld x %lld, %s", static_cast<long long>(rows), static_cast<long long>(vocab),
                      static_cast<long long>(dim), NameOf(type));
    Array x = Array::Normal(DType::kFloat32, rows * dim, random), weight = Array::Normal(type, vocab * dim, random);
    Array logits(DType::kFloat32, rows * vocab);
    const double spread = random.Pick({0.5, 5.0});
    for (int64_t e = 0; e < rows * vocab; ++e) logits.Set(e, spread * std::round(4 * random.Normal()) / 4);  // some ties
    if (random.Chance(0.3)) logits.Set(random.Below(rows * vocab), random.Pick({kNan, kNan * -1, 1e300, -1e300}));
    Array refined = logits;
    TTSK_SELECT(RefineLogits)({refined.floats(), x.floats(), weight.data(), rows, vocab, dim, type});
    for (int64_t r = 0; r < rows; ++r) {
      std::vector<int64_t> order(vocab);
      std::iota(order.begin(), order.end(), 0);
      const auto at = [&](int64_t id) { return logits.Get(r * vocab + id); };
      const bool finite = std::all_of(order.begin(), order.end(), [&](int64_t id) { return std::isfinite(at(id)); });
      if (finite) std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return at(a) > at(b); });
      for (int64_t n = 0; n < vocab; ++n) {
        const int64_t id = order[n];
        double want = at(id), error = 0;
        if (finite && n < kRefineMost && want >= at(order[0]) - kRefineReach) {
          want = 0;
          for (int64_t d = 0; d < dim; ++d) {
            const double product = x.Get(r * dim + d) * weight.Get(id * dim + d);
            want += product, error += (static_cast<double>(dim) / 16 + 8) * kEps * std::fabs(product);
          }
        }
        check.Near(r * vocab + id, refined.Get(r * vocab + id), want, error);
      }
    }
  }
}

}  // namespace ttsk::testing
