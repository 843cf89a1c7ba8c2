#include "ttskernels/token_logprob.h"

#include "check.h"
#include "ttskernels/linear.h"

namespace ttsk::testing {

TTSK_TEST(token_logprob) {
  for (int i = 0; i < 25; ++i) {
    const DType type = AnyType(random), weights = AnyType(random);
    const bool large = i == 0;  // more panels than slices
    const int64_t dim = large ? 3 : random.Pick<int64_t>({1, 16, 33, 96});
    const int64_t vocab = large ? 2 * kLogprobSlices * kPanelColumns + 70 : random.Pick<int64_t>({1, 63, 64, 65, 500});
    const int64_t tokens = random.Between(1, 9), n = random.Between(1, 12), stride = dim + 1, weight_stride = dim + random.Below(3);
    const bool packed = random.Chance(0.5), normed = random.Chance(0.7);
    check.what = Text("dim %lld, vocab %lld, %s x %s, packed %d", static_cast<long long>(dim), static_cast<long long>(vocab),
                      NameOf(type), NameOf(weights), packed);
    Array hidden(type, tokens * stride), norm = Array::Normal(DType::kFloat32, dim, random);
    Array lm_head(weights, vocab * weight_stride), logprobs(DType::kFloat32, n);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t d = 0; d < dim; ++d) hidden.Set(t * stride + d, random.Normal());
    }
    for (int64_t v = 0; v < vocab; ++v) {
      for (int64_t d = 0; d < dim; ++d) lm_head.Set(v * weight_stride + d, random.Normal());
    }
    const int64_t bad = random.Chance(0.3) ? random.Below(tokens) : -1;
    if (bad >= 0) hidden.Set(bad * stride + random.Below(dim), random.Pick({kNan, HUGE_VAL}));
    std::vector<int32_t> rows(n), ids(n);
    for (int64_t r = 0; r < n; ++r) {
      rows[r] = static_cast<int32_t>(random.Below(tokens)), ids[r] = static_cast<int32_t>(random.Below(vocab));
    }
    Array panels(DType::kFloat32, LinearPackedBytes(vocab, dim, weights) / 4 + 1);
    std::memset(panels.data(), 0, 4 * panels.size());
    LinearPack(lm_head.data(), vocab, dim, weight_stride, weights, {0, vocab, 0}, panels.data());
    TokenLogprobParams p{};
    p.hidden = hidden.data(), p.rows = rows.data(), p.norm_weight = normed ? norm.floats() : nullptr;
    p.lm_head = packed ? panels.data() : lm_head.data(), p.ids = ids.data(), p.logprobs = logprobs.floats();
    p.num_rows = n, p.dim = dim, p.vocab = vocab, p.hidden_stride = stride, p.weight_stride = weight_stride;
    p.eps = 1e-5f, p.packed = packed, p.hidden_dtype = type, p.weight_dtype = weights;
    Array scratch(DType::kFloat32, TokenLogprobScratchBytes(p) / 4 + 1);
    p.scratch = scratch.data();
    TTSK_SELECT(TokenLogprob)(p);
    for (int64_t r = 0; r < n; ++r) {
      std::vector<double> x(dim), logits(vocab);
      double sum = 0, top = -HUGE_VAL, total = 0, largest = 0;
      for (int64_t d = 0; d < dim; ++d) x[d] = hidden.Get(rows[r] * stride + d), sum += x[d] * x[d];
      for (int64_t v = 0; v < vocab; ++v) {
        double magnitude = 0;
        for (int64_t d = 0; d < dim; ++d) {
          const double normed_x = normed ? x[d] * norm.Get(d) / std::sqrt(sum / static_cast<double>(dim) + 1e-5) : x[d];
          logits[v] += normed_x * lm_head.Get(v * weight_stride + d), magnitude += std::fabs(normed_x * lm_head.Get(v * weight_stride + d));
        }
        top = std::max(top, logits[v]), largest = std::max(largest, magnitude);
      }
      for (int64_t v = 0; v < vocab; ++v) total += std::exp(logits[v] - top);
      const double want = rows[r] == bad ? kNan : logits[ids[r]] - top - std::log(total);
      check.Near(r, logprobs.Get(r), want, 2 * (static_cast<double>(dim) + 20) * kEps * largest + 4e-6);
    }
  }
}

}  // namespace ttsk::testing
