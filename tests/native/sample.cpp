#include "ttskernels/sample.h"

#include <algorithm>
#include <numeric>

#include "check.h"

namespace ttsk::testing {
namespace {

// The token that (u, options) choose, by sorting and summing in double.
int32_t Choose(const std::vector<double>& logits, double temperature, int64_t top_k, double top_p, double min_p, double u) {
  const int64_t n = static_cast<int64_t>(logits.size());
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  if (temperature == 0) return order[0];
  const double top = logits[order[0]];
  const auto weight = [&](int32_t id) { return std::exp((logits[id] - top) / temperature); };
  if (top_k >= 1 && top_k < n) order.resize(top_k);
  double mass = 0, before = 0;
  for (const int32_t id : order) mass += weight(id);
  size_t kept = 0;
  while (kept < order.size() && (kept == 0 || top_p >= 1 || before < top_p * mass)) before += weight(order[kept++]);
  order.resize(kept);
  while (order.size() > 1 && weight(order.back()) < min_p) order.pop_back();
  std::sort(order.begin(), order.end());
  double total = 0, sum = 0;
  for (const int32_t id : order) total += weight(id);
  for (const int32_t id : order) {
    if ((sum += weight(id)) > u * total) return id;
  }
  return order.back();
}

double Uniform(int64_t key, int32_t position) {
  const uint32_t counter[4] = {static_cast<uint32_t>(position), 0, 0, 0};
  const uint32_t words[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(static_cast<uint64_t>(key) >> 32)};
  return (Philox4x32(counter, words).word[0] >> 8) * 0x1p-24 + 0x1p-25;
}

}  // namespace

// Known answers of Random123.
TTSK_TEST(philox) {
  const uint32_t zero[4] = {0, 0, 0, 0}, ones[4] = {~0u, ~0u, ~0u, ~0u};
  const uint32_t want_zero[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8};
  const uint32_t want_ones[4] = {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd};
  const Philox a = Philox4x32(zero, zero), b = Philox4x32(ones, ones);
  check.True(std::memcmp(a.word, want_zero, 16) == 0 && std::memcmp(b.word, want_ones, 16) == 0, "known answers");
}

TTSK_TEST(sample) {
  for (int i = 0; i < 30; ++i) {
    const int64_t vocab = random.Pick<int64_t>({1, 2, 17, 255, 256, 1000}), count = random.Between(1, 9), rows = count + 2;
    const int64_t stride = vocab + random.Below(5);
    Array logits(DType::kFloat32, rows * stride);
    const double spread = random.Pick({0.1, 3.0, 30.0});
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < vocab; ++c) {  // some ties
        logits.Set(r * stride + c, random.Chance(0.1) && c > 0 ? logits.Get(r * stride + c - 1) : spread * random.Normal());
      }
    }
    std::vector<int32_t> chosen(count), positions(count), tokens(count);
    std::vector<int64_t> keys(count);
    std::vector<SampleOptions> options(count);
    std::vector<float> logprobs(count);
    for (int64_t r = 0; r < count; ++r) {
      chosen[r] = static_cast<int32_t>(random.Below(rows));
      positions[r] = static_cast<int32_t>(random.Below(1000)), keys[r] = static_cast<int64_t>(random.Next());
      options[r] = {random.Pick({0.0f, 0.7f, 1.0f, 2.0f}), random.Pick({0.0f, 1.0f, 5.0f, 300.0f}),
                    random.Pick({1.0f, 0.9f, 0.3f}), random.Pick({0.0f, 0.05f})};
    }
    const int64_t bad = random.Chance(0.2) ? random.Below(count) : -1;
    if (bad >= 0) logits.Set(chosen[bad] * stride + random.Below(vocab), random.Pick({kNan, HUGE_VAL, -HUGE_VAL}));
    SampleParams p{};
    p.logits = logits.floats(), p.rows = chosen.data(), p.keys = keys.data(), p.positions = positions.data();
    p.options = options.data(), p.tokens = tokens.data(), p.logprobs = logprobs.data();
    p.count = count, p.vocab = vocab, p.logits_stride = stride, p.position_offset = 1;
    const int64_t first_bad = Sample(p);
    int64_t wanted_bad = -1;
    for (int64_t r = 0; r < count; ++r) {
      const SampleOptions& o = options[r];
      check.what = Text("vocab %lld, temperature %g, top_k %g, top_p %g, min_p %g", static_cast<long long>(vocab),
                        o.temperature, o.top_k, o.top_p, o.min_p);
      std::vector<double> row(vocab);
      for (int64_t c = 0; c < vocab; ++c) row[c] = logits.Get(chosen[r] * stride + c);
      if (bad >= 0 && chosen[r] == chosen[bad]) {
        if (wanted_bad < 0) wanted_bad = r;
        check.Equal(r, tokens[r], -1), check.Equal(r, logprobs[r], kNan);
        continue;
      }
      // A boundary within float's reach may fall on either side of u, of top-p's mass and of min-p.
      const double u = Uniform(keys[r], positions[r] + 1);
      bool found = false;
      for (const double du : {0.0, -1e-5, 1e-5}) {
        for (const double dp : {0.0, -1e-5, 1e-5}) {
          for (const double dm : {0.0, -1e-6, 1e-6}) {
            const double top_p = o.top_p < 1 ? o.top_p + dp : 1.0, min_p = o.min_p > 0 ? o.min_p + dm : 0.0;
            const double at = u + du < 0 ? 0 : u + du > 1 - 1e-12 ? 1 - 1e-12 : u + du;
            found |= Choose(row, o.temperature, static_cast<int64_t>(o.top_k), top_p, min_p, at) == tokens[r];
          }
        }
      }
      check.True(found, "another token");
      const double temperature = o.temperature == 0 ? 1.0 : o.temperature, top = *std::max_element(row.begin(), row.end());
      double total = 0;
      for (const double logit : row) total += std::exp((logit - top) / temperature);
      const double want = (row[tokens[r]] - top) / temperature - std::log(total);
      check.Near(r, logprobs[r], want, 2e-6 * (1 + std::fabs(want)));
    }
    check.Equal(0, static_cast<double>(first_bad), static_cast<double>(wanted_bad));
  }
}

}  // namespace ttsk::testing
