#include "ttskernels/refine_logits.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "ttskernels/sample.h"
#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

template <typename W>
float Dot(const float* x, const W* weight, int64_t dim) {
  Vec sum = Zero();
  const int64_t body = dim / kLanes * kLanes;
  for (int64_t i = 0; i < body; i += kLanes) sum = Fma(Load(x + i), LoadAs(weight + i), sum);
  if (const int tail = static_cast<int>(dim - body); tail > 0) {
    sum = Fma(LoadTail(x + body, tail), LoadTail(weight + body, tail), sum);
  }
  return ReduceAdd(sum);
}

template <typename W>
void RefineRow(const RefineLogitsParams& p, int64_t row, std::vector<int32_t>& ids) {
  float* logits = p.logits + row * p.vocab;
  const SampleTop top = SampleFindTop(logits, p.vocab);
  if (!top.finite) return;
  ids.resize(p.vocab);
  const int64_t found = SampleCollect(logits, p.vocab, top.logit - kRefineReach, ids.data());
  const auto end = ids.begin() + found, last = ids.begin() + std::min(found, kRefineMost);
  std::nth_element(ids.begin(), last, end, [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  for (auto id = ids.begin(); id < last; ++id) {
    logits[*id] = Dot(p.x + row * p.dim, static_cast<const W*>(p.weight) + *id * p.dim, p.dim);
  }
}

template <typename W>
void Run(const RefineLogitsParams& p) {
  std::atomic<int64_t> next{0};
  Together(p.rows > 1 ? NumThreads() : 1, [&](const Member&) {
    static thread_local std::vector<int32_t> ids;
    for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < p.rows;) RefineRow<W>(p, row, ids);
  });
}

}  // namespace

void RefineLogits(const RefineLogitsParams& p) {
  if (p.weight_dtype == DType::kFloat32) Run<float>(p);
  else if (p.weight_dtype == DType::kFloat16) Run<Fp16>(p);
  else Run<Bf16>(p);
}

}  // namespace ttsk::TTSK_ISA
