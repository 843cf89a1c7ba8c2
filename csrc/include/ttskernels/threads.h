// The threads that every kernel runs on, and what they wait with. Torch-free.
#pragma once

#include <cstdint>
#include <utility>

namespace ttsk {

// TTSK_NUM_THREADS or OMP_NUM_THREADS if set, else the CPUs this process may use, until SetNumThreads. Results never
// depend on it.
int NumThreads();
void SetNumThreads(int threads);

// One of the threads that run a body together.
class Member {
 public:
  Member(int index, int count) : index(index), count(count) {}
  // Returns when all members have called it.
  void Barrier() const;
  // Consecutive [first, last) of n things, sizes differing by at most one.
  std::pair<int64_t, int64_t> Share(int64_t n) const;

  const int index, count;
};

// Runs body(context, member) on `threads` threads, the caller among them, or on fewer (down to the caller alone: inside
// of another body, or while another caller has the threads), and returns when all are done. A body must not throw.
void RunTogether(int threads, void (*body)(void* context, const Member& member), void* context);

template <typename F>
void Together(int threads, F body) {  // body(member)
  RunTogether(threads, [](void* context, const Member& member) { (*static_cast<F*>(context))(member); }, &body);
}

// body(i) of every i < n, on all threads if that is `worth` it.
template <typename F>
void ForEach(int64_t n, bool worth, F body) {
  if (!worth) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  Together(NumThreads(), [&](const Member& member) {
    const auto [first, last] = member.Share(n);
    for (int64_t i = first; i < last; ++i) body(i);
  });
}

}  // namespace ttsk
