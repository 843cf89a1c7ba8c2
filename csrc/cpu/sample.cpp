// The scalar part of sampling: Philox, the filters' cut, the inverse CDF. The vector passes are in kernels/sample.cpp.
#include "ttskernels/sample.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ttskernels/threads.h"

namespace ttsk {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();

struct Scratch {
  std::vector<float> weights, sums;
  std::vector<int32_t> ids;
  std::vector<uint64_t> order;
};

// The kept tokens: a prefix of the order (logit descending, id ascending), down to and including this one.
struct Cut {
  float logit;
  int32_t id;
};

// Sorts ascending into that order.
uint64_t OrderKey(float logit, int32_t id) {
  const float positive_zero = logit + 0.0f;  // -0 and 0 are equal
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, 4);
  const uint32_t ascending = bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
  return (static_cast<uint64_t>(~ascending) << 32) | static_cast<uint32_t>(id);
}

double UniformOf(int64_t key, int32_t position) {
  const uint32_t counter[4] = {static_cast<uint32_t>(position), 0, 0, 0};
  const uint64_t bits = static_cast<uint64_t>(key);
  const uint32_t words[2] = {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
  return (Philox4x32(counter, words).word[0] >> 8) * 0x1p-24 + 0x1p-25;
}

// Where top-k ends, then top-p of what it left, then min-p. The order is built from the top, from the logits within
// `reach` of the largest, a wider reach following only if the cut is not inside: a peaked row never sorts its tail.
Cut FindCut(const float* logits, int64_t n, float top, float inverse_temperature, const SampleOptions& o, double total,
            Scratch& s) {
  const bool has_top_k = o.top_k >= 1 && o.top_k < static_cast<float>(n), has_top_p = o.top_p < 1;
  const int64_t top_k = has_top_k ? static_cast<int64_t>(o.top_k) : n;
  for (float reach = 4 / inverse_temperature;; reach *= 2) {
    const float floor = reach < kLargest / 4 ? std::max(top - reach, -kLargest) : -kLargest;
    const int64_t found = TTSK_SELECT(SampleCollect)(logits, n, floor, s.ids.data());
    const bool all = floor == -kLargest;
    if (has_top_k && found < top_k && !all) continue;
    s.order.resize(found);
    for (int64_t i = 0; i < found; ++i) s.order[i] = OrderKey(logits[s.ids[i]], s.ids[i]);
    const auto weight = [&](uint64_t key) { return s.weights[static_cast<uint32_t>(key)]; };
    const auto begin = s.order.begin();
    if (top_k < found) {
      std::nth_element(begin, begin + top_k, s.order.end());
      s.order.resize(top_k);
    }
    double mass = total;
    if (has_top_k) {
      mass = 0;
      for (const uint64_t key : s.order) mass += weight(key);
    }
    const double budget = has_top_p ? static_cast<double>(o.top_p) * mass : std::numeric_limits<double>::infinity();
    // A token stays if its weight reaches min-p and those before it in the order have less than the budget. Halves are
    // parted and summed, not sorted: O(found).
    const auto light = std::partition(begin, s.order.end(), [&](uint64_t key) { return weight(key) >= o.min_p; });
    const bool complete = all || has_top_k || light != s.order.end();
    s.order.erase(light, s.order.end());
    const int64_t size = static_cast<int64_t>(s.order.size());
    int64_t end = 0, limit = size;
    double before = 0;
    while (limit - end > 32) {
      const int64_t middle = (end + limit) / 2;
      std::nth_element(begin + end, begin + middle, begin + limit);
      double half = 0;
      for (int64_t i = end; i < middle; ++i) half += weight(s.order[i]);
      if (before + half >= budget) {
        limit = middle;
      } else {
        before += half;
        end = middle;
      }
    }
    std::sort(begin + end, begin + limit);
    while (end < limit && (end == 0 || before < budget)) before += weight(s.order[end++]);
    if (end == size && !complete) continue;  // the next token might be kept too
    const int32_t id = static_cast<int32_t>(static_cast<uint32_t>(s.order[end - 1]));
    return {logits[id], id};
  }
}

// Every weight counts; blocks of kSampleBlock tokens are skipped by their sums.
int32_t DrawFromAll(const Scratch& s, int64_t n, double target) {
  double sum = 0;
  int64_t block = 0;
  const int64_t blocks = static_cast<int64_t>(s.sums.size());
  while (block + 1 < blocks && sum + s.sums[block] <= target) sum += s.sums[block++];
  const int64_t first = block * kSampleBlock, end = std::min(n, first + kSampleBlock);
  int64_t last = -1;  // rounding may leave the target just beyond the block's last weight
  for (int64_t i = first; i < end; ++i) {
    sum += s.weights[i];
    if (s.weights[i] > 0) last = i;
    if (sum > target) return static_cast<int32_t>(i);
  }
  for (int64_t i = first; last < 0 && i-- > 0;) last = s.weights[i] > 0 ? i : -1;
  return static_cast<int32_t>(last);
}

int32_t DrawFromKept(const float* logits, int64_t n, const Cut& cut, double u, Scratch& s) {
  const int64_t found = TTSK_SELECT(SampleCollect)(logits, n, cut.logit, s.ids.data());
  const auto dropped = [&](int32_t id) { return logits[id] == cut.logit && id > cut.id; };
  double total = 0, sum = 0;
  for (int64_t i = 0; i < found; ++i) total += dropped(s.ids[i]) ? 0.0 : s.weights[s.ids[i]];
  int32_t last = cut.id;
  for (int64_t i = 0; i < found; ++i) {
    const int32_t id = s.ids[i];
    if (dropped(id) || s.weights[id] <= 0) continue;
    sum += s.weights[id];
    last = id;
    if (sum > u * total) break;
  }
  return last;
}

bool SampleRow(const SampleParams& p, int64_t i, Scratch& s) {
  const int64_t n = p.vocab, row = p.rows != nullptr ? p.rows[i] : i;
  const float* logits = p.logits + row * p.logits_stride;
  const SampleOptions& o = p.options[i];
  const SampleTop top = TTSK_SELECT(SampleFindTop)(logits, n);
  p.tokens[i] = -1;
  p.logprobs[i] = std::numeric_limits<float>::quiet_NaN();
  if (!top.finite) return false;
  const bool greedy = o.temperature == 0;
  const float inverse = greedy ? 1.0f : std::min(1 / o.temperature, kLargest);
  s.weights.resize(n);
  s.ids.resize(n);
  s.sums.resize((n + kSampleBlock - 1) / kSampleBlock);
  TTSK_SELECT(SampleWeights)(logits, n, top.logit, inverse, s.weights.data(), s.sums.data());
  double total = 0;
  for (const float sum : s.sums) total += sum;
  int32_t token;
  if (greedy) {
    TTSK_SELECT(SampleCollect)(logits, n, top.logit, s.ids.data());
    token = s.ids[0];
  } else {
    const double u = UniformOf(p.keys[i], p.positions[i] + p.position_offset);
    if ((o.top_k >= 1 && o.top_k < static_cast<float>(n)) || o.top_p < 1 || o.min_p > 0) {
      token = DrawFromKept(logits, n, FindCut(logits, n, top.logit, inverse, o, total, s), u, s);
    } else {
      token = DrawFromAll(s, n, u * total);
    }
  }
  p.tokens[i] = token;
  p.logprobs[i] = static_cast<float>(
      static_cast<double>(logits[token] - top.logit) * inverse - std::log(total));
  return true;
}

}  // namespace

Philox Philox4x32(const uint32_t counter[4], const uint32_t key[2]) {
  uint32_t c[4] = {counter[0], counter[1], counter[2], counter[3]}, k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c[0], b = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof(c));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

bool ValidOptions(const SampleOptions& o) {
  return o.temperature >= 0 && o.temperature <= kLargest && o.top_k >= 0 && o.top_p > 0 && o.top_p <= 1 && o.min_p >= 0 &&
         o.min_p <= 1;
}

int64_t Sample(const SampleParams& p) {
  std::atomic<int64_t> next{0}, bad{p.count};
  Together(p.count > 1 ? NumThreads() : 1, [&](const Member&) {
    static thread_local Scratch scratch;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < p.count;) {
      if (SampleRow(p, i, scratch)) continue;
      int64_t seen = bad.load();
      while (i < seen && !bad.compare_exchange_weak(seen, i)) {}
    }
  });
  return bad.load() < p.count ? bad.load() : -1;
}

extern "C" {
// For tests: philox4x32-10 of a whole counter and key.
__attribute__((visibility("default"))) void ttsk_philox4x32(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const Philox words = Philox4x32(counter, key);
  std::memcpy(out, words.word, sizeof(words.word));
}
}

}  // namespace ttsk
