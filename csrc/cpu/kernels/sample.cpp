#include "ttskernels/sample.h"

#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

constexpr float kLowest = -3.402823466e38f;

// Missing lanes of the last vector repeat the first logit, which changes neither maximum nor finiteness.
inline Vec LoadPadded(const float* p, int n, float pad) { return SelectFirst(n, LoadTail(p, n), Broadcast(pad)); }

}  // namespace

SampleTop SampleFindTop(const float* logits, int64_t n) {
  Vec top = Broadcast(logits[0]), zeros = Zero();
  const Vec zero = Zero();
  const int64_t body = n / kLanes * kLanes;
  for (int64_t i = 0; i < body; i += kLanes) {
    const Vec v = Load(logits + i);
    top = Max(v, top);
    zeros = Fma(v, zero, zeros);  // NaN from the first non-finite logit on
  }
  if (n > body) {
    const Vec v = LoadPadded(logits + body, static_cast<int>(n - body), logits[0]);
    top = Max(v, top);
    zeros = Fma(v, zero, zeros);
  }
  const float check = ReduceAdd(zeros);
  return {ReduceMax(top), check == check};
}

void SampleWeights(const float* logits, int64_t n, float top, float inverse_temperature, float* weights, float* sums) {
  const Vec shift = Broadcast(top), scale = Broadcast(inverse_temperature);
  for (int64_t b = 0; b * kSampleBlock < n; ++b) {
    const int64_t first = b * kSampleBlock, end = n - first < kSampleBlock ? n : first + kSampleBlock;
    Vec sum = Zero();
    int64_t i = first;
    for (; i + kLanes <= end; i += kLanes) {
      const Vec w = Exp(Mul(Sub(Load(logits + i), shift), scale));
      Store(weights + i, w);
      sum = Add(sum, w);
    }
    if (i < end) {
      const int tail = static_cast<int>(end - i);
      const Vec w = SelectFirst(tail, Exp(Mul(Sub(LoadPadded(logits + i, tail, top), shift), scale)), Zero());
      StoreTail(weights + i, w, tail);
      sum = Add(sum, w);
    }
    sums[b] = ReduceAdd(sum);
  }
}

int64_t SampleCollect(const float* logits, int64_t n, float floor, int32_t* ids) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const int lanes = static_cast<int>(n - i < kLanes ? n - i : kLanes);
    const Vec v = lanes == kLanes ? Load(logits + i) : LoadPadded(logits + i, lanes, kLowest);
    if (!(ReduceMax(v) >= floor)) continue;
    for (int j = 0; j < lanes; ++j) {
      ids[count] = static_cast<int32_t>(i + j);
      count += logits[i + j] >= floor;
    }
  }
  return count;
}

}  // namespace ttsk::TTSK_ISA
