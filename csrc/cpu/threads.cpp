// A team of threads that wait by spinning for a while, then asleep. OpenMP's either spins too short, and then every region
// pays for waking somebody up (about 50 us in a virtual machine), or too long while another process has the core.
#include "ttskernels/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ttsk {
namespace {

constexpr int kMostThreads = 255;
constexpr auto kSpin = std::chrono::microseconds(200);  // a few times what sleeping and waking costs
constexpr int kSpinsALook = 16;                         // at the clock
constexpr auto kStay = std::chrono::milliseconds(2);    // on a CPU, before asking for another one

using Word = std::atomic<uint32_t>;

int CountCpus() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return static_cast<int>(std::thread::hardware_concurrency());
}

int CurrentCpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

void Relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// 0 where the variable is no number of threads.
int Wanted(const char* variable) {
  const char* text = std::getenv(variable);
  char* end = nullptr;
  const long n = text != nullptr ? std::strtol(text, &end, 10) : 0;
  return n <= 0 || *end != 0 ? 0 : n < kMostThreads ? static_cast<int>(n) : kMostThreads;
}

std::atomic<int>& Threads() {
  static std::atomic<int> threads{[] {
    const int own = Wanted("TTSK_NUM_THREADS"), omp = Wanted("OMP_NUM_THREADS"), n = own > 0 ? own : omp;
    return n > 0 ? n : CountCpus() > 0 ? CountCpus() : 1;
  }()};
  return threads;
}

thread_local bool in_team = false;

class Team {
 public:
  // Never destroyed: its threads sleep until the process ends. A forked child, which has none of them, begins a new one.
  static Team& Get() {
#if defined(__linux__)
    static const int registered = pthread_atfork(nullptr, nullptr, [] { Slot().store(nullptr); });
    (void)registered;
#endif
    Team* found = Slot().load(std::memory_order_acquire);
    if (found == nullptr) {
      Team* fresh = new Team;
      if (Slot().compare_exchange_strong(found, fresh)) return *fresh;
      delete fresh;  // it has no threads yet
    }
    return *Slot().load(std::memory_order_acquire);
  }

  bool Run(int threads, void (*body)(void*, const Member&), void* context) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    while (started_ < threads) {
      if (!Start()) return false;
    }
    body_ = body, context_ = context;
    cpus_[0].store(CurrentCpu(), std::memory_order_relaxed);
    sequence_ = (sequence_ + 1) & 0xffffff;
    region_.store(sequence_ << 8 | static_cast<uint32_t>(threads));  // before the look for sleepers that notify has
    region_.notify_all();
    const Member me(0, threads);
    in_team = true;
    body(context, me);
    in_team = false;
    Barrier(me);
    return true;
  }

  void Barrier(const Member& me) {
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    if (!Arrive(me.count)) WaitChange(phase_, phase, me.index, 0, me.count);
  }

 private:
  static std::atomic<Team*>& Slot() {
    static std::atomic<Team*> slot{nullptr};
    return slot;
  }

  // True for the last of `count`. Once counted, a thread reads nothing of the region: the next one may have begun.
  bool Arrive(int count) {
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < static_cast<uint32_t>(count)) return false;
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1);
    phase_.notify_all();
    return true;
  }

  // Whether one of the threads [first, last) last ran where thread `index`, the caller, is now.
  bool Shares(int index, int first, int last) const {
    const int cpu = CurrentCpu();
    for (int i = first; i < last; ++i) {
      if (i != index && cpu >= 0 && cpus_[i].load(std::memory_order_relaxed) == cpu) return true;
    }
    return false;
  }

  // To a CPU that no other of `count` threads has. A thread is often woken where its waker runs; both are then too short of
  // work for the scheduler to part them, and one CPU does everything.
  void MoveAway(int index, int count) {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
    cpu_set_t left = allowed;
    for (int i = 0; i < count; ++i) {
      const int cpu = cpus_[i].load(std::memory_order_relaxed);
      if (i != index && cpu >= 0 && cpu < CPU_SETSIZE) CPU_CLR(cpu, &left);
    }
    if (CPU_COUNT(&left) == 0 || sched_setaffinity(0, sizeof(left), &left) != 0) return;
    sched_setaffinity(0, sizeof(allowed), &allowed);  // it stays where it is, but need not
    cpus_[index].store(CurrentCpu(), std::memory_order_relaxed);
#endif
  }

  // Thread `index` waits for those of [first, last). Where one of them last ran on this very CPU, spinning keeps it away.
  void WaitChange(const Word& word, uint32_t old, int index, int first, int last) {
    if (!Shares(index, first, last)) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      do {
        for (int i = 0; i < kSpinsALook; ++i) {
          if (word.load(std::memory_order_acquire) != old) return;
          Relax();
        }
      } while (std::chrono::steady_clock::now() < until);
    }
    while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
  }

  bool Start() {
    try {
      std::thread([this, index = started_, seen = region_.load()] { Work(index, seen); }).detach();
    } catch (const std::system_error&) {  // the system gives no more threads
      return false;
    }
    ++started_;
    return true;
  }

  void Work(int index, uint32_t seen) {
#if defined(__linux__)
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);  // signals are the caller's
#endif
    in_team = true;
    auto moved = std::chrono::steady_clock::now() - kStay;
    for (;;) {
      WaitChange(region_, seen, index, 0, 1);
      seen = region_.load(std::memory_order_acquire);
      const int count = static_cast<int>(seen & 0xff);
      cpus_[index].store(CurrentCpu(), std::memory_order_relaxed);
      if (index >= count) continue;  // a region does not end without its own threads, so the rest of it is not read here
      if (Shares(index, 0, index) && std::chrono::steady_clock::now() - moved > kStay) {
        MoveAway(index, count);
        moved = std::chrono::steady_clock::now();
      }
      body_(context_, Member(index, count));
      Arrive(count);
    }
  }

  std::mutex busy_;
  int started_ = 1;  // threads, with whoever calls
  uint32_t sequence_ = 0;
  void (*body_)(void*, const Member&) = nullptr;
  void* context_ = nullptr;
  alignas(64) Word region_{0};  // sequence number and threads of the region
  alignas(64) Word arrived_{0};
  alignas(64) Word phase_{0};
  alignas(64) std::atomic<int> cpus_[kMostThreads + 1] = {};
};

}  // namespace

int NumThreads() { return Threads().load(std::memory_order_relaxed); }
void SetNumThreads(int threads) { Threads().store(std::clamp(threads, 1, kMostThreads), std::memory_order_relaxed); }

void Member::Barrier() const {
  if (count > 1) Team::Get().Barrier(*this);
}

std::pair<int64_t, int64_t> Member::Share(int64_t n) const { return {n * index / count, n * (index + 1) / count}; }

void RunTogether(int threads, void (*body)(void*, const Member&), void* context) {
  threads = threads < kMostThreads ? threads : kMostThreads;
  if (threads > 1 && !in_team && Team::Get().Run(threads, body, context)) return;
  body(context, Member(0, 1));
}

}  // namespace ttsk

extern "C" {
__attribute__((visibility("default"))) int ttsk_num_threads() { return ttsk::NumThreads(); }
__attribute__((visibility("default"))) void ttsk_set_num_threads(int threads) { ttsk::SetNumThreads(threads); }
}
