#include "ttskernels/step_score.h"

#include "check.h"
#include "ttskernels/path_aggregate.h"

namespace ttsk::testing {
namespace {

// rms-normed row in double, or the row itself without a norm.
std::vector<double> Normed(const Array& hidden, int64_t at, int64_t dim, const float* norm, double eps) {
  std::vector<double> x(dim);
  double sum = 0;
  for (int64_t i = 0; i < dim; ++i) x[i] = hidden.Get(at + i), sum += x[i] * x[i];
  for (int64_t i = 0; i < dim && norm != nullptr; ++i) x[i] *= norm[i] / std::sqrt(sum / static_cast<double>(dim) + eps);
  return x;
}

}  // namespace

TTSK_TEST(step_score) {
  for (int i = 0; i < 60; ++i) {
    const DType type = AnyType(random), weights = AnyType(random);
    const int64_t dim = random.Pick<int64_t>({1, 16, 30, 96, 128}), inner = random.Pick<int64_t>({0, 0, 5, 33});
    const int64_t labels = random.Between(1, 3), tokens = random.Between(1, 9), n = random.Between(1, 7), stride = dim + 3;
    const Squash squash = labels > 1 ? random.Pick({Squash::kNone, Squash::kSigmoid, Squash::kSoftmax})
                                     : random.Pick({Squash::kNone, Squash::kSigmoid});
    check.what = Text("dim %lld, inner %lld, %lld labels, %s, squash %d", static_cast<long long>(dim),
                      static_cast<long long>(inner), static_cast<long long>(labels), NameOf(type), static_cast<int>(squash));
    const int64_t width = inner > 0 ? inner : dim;
    Array hidden(type, tokens * stride), norm = Array::Normal(DType::kFloat32, dim, random);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < dim; ++d) hidden.Set(t * stride + d, random.Normal());
    }
    const int64_t bad = random.Chance(0.3) ? random.Below(tokens) : -1;
    if (bad >= 0) hidden.Set(bad * stride + random.Below(dim), random.Pick({kNan, HUGE_VAL, -HUGE_VAL}));
    Array inner_weight = Array::Normal(weights, inner * dim, random, 1 / std::sqrt(dim));
    Array inner_bias = Array::Normal(DType::kFloat32, inner, random), bias = Array::Normal(DType::kFloat32, labels, random);
    Array weight = Array::Normal(weights, labels * width, random, 1 / std::sqrt(width));
    Array mix = Array::Normal(DType::kFloat32, labels, random), scores(DType::kFloat32, n), scratch(DType::kFloat32, n * (dim + inner));
    std::vector<int32_t> rows(n);
    for (int32_t& row : rows) row = static_cast<int32_t>(random.Below(tokens));
    const bool normed = random.Chance(0.7), biased = random.Chance(0.5), mixed = labels > 1 || random.Chance(0.5);
    StepScoreParams p{};
    p.hidden = hidden.data(), p.rows = rows.data(), p.norm_weight = normed ? norm.floats() : nullptr;
    p.inner_weight = inner > 0 ? inner_weight.data() : nullptr, p.inner_bias = biased && inner > 0 ? inner_bias.floats() : nullptr;
    p.weight = weight.data(), p.bias = biased ? bias.floats() : nullptr, p.mix = mixed ? mix.floats() : nullptr;
    p.scores = scores.floats(), p.scratch = scratch.floats(), p.num_rows = n, p.dim = dim, p.hidden_stride = stride;
    p.inner = inner, p.labels = labels, p.eps = 1e-5f, p.squash = squash, p.hidden_dtype = type, p.weight_dtype = weights;
    TTSK_SELECT(StepScore)(p);
    for (int64_t r = 0; r < n; ++r) {
      std::vector<double> x = Normed(hidden, rows[r] * stride, dim, p.norm_weight, 1e-5);
      if (inner > 0) {
        std::vector<double> y(inner);
        for (int64_t u = 0; u < inner; ++u) {
          double z = p.inner_bias != nullptr ? inner_bias.Get(u) : 0.0;
          for (int64_t d = 0; d < dim; ++d) z += x[d] * inner_weight.Get(u * dim + d);
          y[u] = z > 0 ? z : 0;
        }
        x = y;
      }
      std::vector<double> z(labels);
      double total = 0, want = 0, size = 1;
      for (int64_t l = 0; l < labels; ++l) {
        z[l] = biased ? bias.Get(l) : 0.0;
        for (int64_t d = 0; d < width; ++d) z[l] += x[d] * weight.Get(l * width + d);
        total += std::exp(z[l]);
      }
      for (int64_t l = 0; l < labels; ++l) {
        const double value = squash == Squash::kNone ? z[l] : squash == Squash::kSigmoid ? 1 / (1 + std::exp(-z[l])) : std::exp(z[l]) / total;
        want += (mixed ? mix.Get(l) : 1.0) * value, size += std::fabs((mixed ? mix.Get(l) : 1.0) * z[l]);
      }
      check.Near(r, scores.Get(r), rows[r] == bad ? kNan : want, 4e-6 * size);
    }
  }
}

TTSK_TEST(path_aggregate) {
  const double inf = HUGE_VAL;
  const float state[10] = {0, HUGE_VALF, NAN, 0, 0, 2, 0.25f, 0.5f, 0.75f, std::log(0.125f)};
  const float scores[5] = {0.5f, 0.25f, 0.75f, 0.125f, 0.0f};
  const int32_t indptr[3] = {0, 3, 5};
  float out[10];
  PathAggregate(state, scores, indptr, 2, out);
  const double want[10] = {3, 0.25, 0.75, 1.5, std::log(0.09375), 4, 0, 0, 0.875, -inf};
  for (int i = 0; i < 10; ++i) check.Near(i, out[i], want[i], 1e-6);
}

}  // namespace ttsk::testing
