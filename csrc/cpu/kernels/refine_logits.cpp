#include "ttskernels/refine_logits.h"

#include <atomic>

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

// The largest of a row, in descending order, of equal ones the first.
struct Largest {
  float logits[kRefineMost];
  int64_t ids[kRefineMost];
  int64_t count = 0;

  void Offer(float logit, int64_t id) {
    if (count == kRefineMost && !(logit > logits[count - 1])) return;
    int64_t at = count < kRefineMost ? count++ : count - 1;
    for (; at > 0 && logit > logits[at - 1]; --at) logits[at] = logits[at - 1], ids[at] = ids[at - 1];
    logits[at] = logit, ids[at] = id;
  }
  float Least() const { return count < kRefineMost ? -__builtin_inff() : logits[count - 1]; }
};

// One pass: few logits are among the largest of those before them.
bool FindLargest(const float* logits, int64_t n, Largest* largest) {
  Vec zeros = Zero(), least = Broadcast(largest->Least());
  const Vec zero = Zero();
  const int64_t body = n / kLanes * kLanes;
  const auto offer = [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) largest->Offer(logits[i], i);
    least = Broadcast(largest->Least());
  };
  for (int64_t i = 0; i < body; i += kLanes) {
    const Vec v = Load(logits + i);
    zeros = Fma(v, zero, zeros);  // NaN from the first logit that is not finite on
    if (AnyGreater(v, least)) offer(i, i + kLanes);
  }
  if (n > body) {
    zeros = Fma(LoadTail(logits + body, static_cast<int>(n - body)), zero, zeros);
    offer(body, n);
  }
  const float check = ReduceAdd(zeros);
  return check == check;
}

template <typename W>
void RefineRow(const RefineLogitsParams& p, int64_t row) {
  float* logits = p.logits + row * p.vocab;
  Largest largest;
  if (!FindLargest(logits, p.vocab, &largest)) return;
  for (int64_t i = 0; i < largest.count && largest.logits[i] >= largest.logits[0] - kRefineReach; ++i) {
    const W* weight = static_cast<const W*>(p.weight) + largest.ids[i] * p.dim;
    logits[largest.ids[i]] = Dot(p.x + row * p.dim, weight, p.dim);
  }
}

template <typename W>
void Run(const RefineLogitsParams& p) {
  std::atomic<int64_t> next{0};
  Together(p.rows > 1 ? NumThreads() : 1, [&](const Member&) {
    for (int64_t row; (row = next.fetch_add(1, std::memory_order_relaxed)) < p.rows;) RefineRow<W>(p, row);
  });
}

}  // namespace

void RefineLogits(const RefineLogitsParams& p) {
  if (p.weight_dtype == DType::kFloat32) Run<float>(p);
  else if (p.weight_dtype == DType::kFloat16) Run<Fp16>(p);
  else Run<Bf16>(p);
}

}  // namespace ttsk::TTSK_ISA
