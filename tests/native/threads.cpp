#include "ttskernels/threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "check.h"

namespace ttsk::testing {
namespace {

// Every member adds to its own counters between barriers, and reads the others' behind one.
bool Rounds(int threads, int rounds) {
  std::vector<std::atomic<int>> done(threads);
  std::atomic<int> wrong{0}, members{0};
  Together(threads, [&](const Member& me) {
    ++members;
    wrong += me.index < 0 || me.index >= me.count || me.count > threads;
    for (int round = 1; round <= rounds; ++round) {
      ++done[me.index];
      me.Barrier();
      for (int i = 0; i < me.count; ++i) wrong += done[i] < round;
      me.Barrier();
    }
  });
  int total = 0;
  for (const std::atomic<int>& each : done) total += each;
  return wrong == 0 && total == members * rounds && members >= 1;
}

bool EachOnce(int64_t n, bool worth) {
  std::vector<std::atomic<int>> seen(n);
  ForEach(n, worth, [&](int64_t i) { ++seen[i]; });
  bool once = true;
  for (const std::atomic<int>& each : seen) once &= each == 1;
  return once;
}

}  // namespace

TTSK_TEST(threads) {
  const int usual = NumThreads();
  for (int i = 0; i < 200; ++i) {
    const int threads = static_cast<int>(random.Between(1, 6));
    check.what = Text("%d threads", threads);
    check.True(Rounds(threads, static_cast<int>(random.Below(5))), "every member runs, and waits");
  }
  for (const int threads : {1, 2, 5}) {
    SetNumThreads(threads);
    check.what = Text("shares of %d", threads);
    for (const int64_t n : {0, 1, 2, 3, 7, 64, 1000}) check.True(EachOnce(n, true) && EachOnce(n, false), "every member runs, and waits");
  }
  SetNumThreads(usual);
  check.what = "a body inside of a body is run by the member that asks";
  std::atomic<int> inner{0}, alone{0}, outer{0};
  Together(3, [&](const Member&) {
    ++outer;
    Together(3, [&](const Member& me) { ++inner, alone += me.count == 1; });
  });
  check.True(inner == outer && alone == outer, "every member runs, and waits");
  check.what = "callers at the same time";
  std::atomic<int> right{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) right += Rounds(3, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
  check.True(right == 200, "every member runs, and waits");
  if (std::getenv("TTSK_EMULATED") != nullptr) return;  // qemu's fork crashes in a program with threads
  check.what = "after fork, in the child and in the parent";
  const pid_t child = fork();
  if (child == 0) _exit(Rounds(3, 10) ? 0 : 1);
  int status = -1;
  const bool ended = child > 0 && waitpid(child, &status, 0) == child;
  check.True(ended && WIFEXITED(status) && WEXITSTATUS(status) == 0, "every member runs, and waits");
  check.True(Rounds(3, 10), "every member runs, and waits");
}

}  // namespace ttsk::testing
