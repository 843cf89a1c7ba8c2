#include "ttskernels/linear.h"

#include <atomic>

#include "ttskernels/threads.h"
#include "vec.h"

namespace ttsk::TTSK_ISA {
namespace {

// A task is one panel times a block of rows. Few rows: the panel streams by once per group of up to kGroupRows rows,
// expanded to float32 on the fly. Many rows: kBlockK rows of the panel are expanded once into L1 and serve all groups
// of the block, the accumulators waiting in memory between K blocks (exact, so the chain is the same).
constexpr int kGroupRows = 6;
constexpr int kBlockRows = 96;
constexpr int kChunkRows = 384;
constexpr int kBlockK = 128;  // float32 panel block: 32 KiB
constexpr int kDirectGroups = 4;  // measured: at 16 rows expanding first is 15 % slower, at 48 rows 5 % faster
constexpr int kPrefetchSteps = 8;  // k-steps ahead: 2 KiB, within reach of the memory latency
#if defined(__AVX512F__)
constexpr int kStripVecs = 4;  // 6 x 4 accumulators of 32 registers
#else
constexpr int kStripVecs = 1;  // 6 x 2 accumulators of 16 registers (AVX2)
#endif
constexpr int kPanel = static_cast<int>(kPanelColumns);

// Weight loads: a k-step holds kStep reduced elements.
struct Float32Panel {
  static constexpr int kStep = 1, kStepBytes = kPanel * 4;
  static Vec Load(const uint8_t* p, int) { return LoadAs(reinterpret_cast<const float*>(p)); }
  static constexpr int kVecBytes = 64;
};
struct ExpandedPanel : Float32Panel {};  // a block in L1: nothing to prefetch
struct Fp16Panel {
  static constexpr int kStep = 1, kStepBytes = kPanel * 2;
  static Vec Load(const uint8_t* p, int) { return LoadAs(reinterpret_cast<const Fp16*>(p)); }
  static constexpr int kVecBytes = 32;
};
struct Bf16Panel {
  static constexpr int kStep = 2, kStepBytes = kPanel * 4;
  static Vec Load(const uint8_t* p, int j) { return j == 0 ? Even(LoadPairs(p)) : Odd(LoadPairs(p)); }
  static constexpr int kVecBytes = 64;
};

template <typename Panel>
constexpr bool IsExpanded(Panel) { return false; }
constexpr bool IsExpanded(ExpandedPanel) { return true; }

// acc [kRows][64] (+)= x rows * kStripVecs columns of the panel, over `steps` k-steps.
template <typename Panel, int kRows, bool kFromZero>
void Strip(const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  Vec sum[kRows][kStripVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = kFromZero ? Zero() : Load(acc + r * kPanel + c * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    if constexpr (!IsExpanded(Panel{})) {
      for (int line = 0; line < Panel::kStepBytes; line += 64) {
        __builtin_prefetch(panel + kPrefetchSteps * Panel::kStepBytes + line);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < Panel::kStep; ++j) {
      Vec w[kStripVecs];
#pragma GCC unroll 4
      for (int c = 0; c < kStripVecs; ++c) w[c] = Panel::Load(panel + c * Panel::kVecBytes, j);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const Vec a = Broadcast(x[r * x_stride + j]);
#pragma GCC unroll 4
        for (int c = 0; c < kStripVecs; ++c) sum[r][c] = Fma(a, w[c], sum[r][c]);
      }
    }
    x += Panel::kStep;
    panel += Panel::kStepBytes;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kStripVecs; ++c) Store(acc + r * kPanel + c * kLanes, sum[r][c]);
  }
}

#if defined(__AVX512BF16__)
struct Bf16Dot {
  static constexpr int kStep = 2, kStepBytes = kPanel * 4, kVecBytes = 64;
};
// The same with x as bf16 pairs (stored in the float workspace, one pair per 4 bytes).
template <int kRows, bool kFromZero>
void DotStrip(const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  Vec sum[kRows][kStripVecs];
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kStripVecs; ++c) sum[r][c] = kFromZero ? Zero() : Load(acc + r * kPanel + c * kLanes);
  }
  for (int64_t s = 0; s < steps; ++s) {
    Pairs w[kStripVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kStripVecs; ++c) {
      __builtin_prefetch(panel + kPrefetchSteps * kPanel * 4 + c * 64);
      w[c] = LoadPairs(panel + c * 64);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const Pairs a = BroadcastPair(FloatToBits(x[r * x_stride + s]));
#pragma GCC unroll 4
      for (int c = 0; c < kStripVecs; ++c) sum[r][c] = DotPairs(sum[r][c], w[c], a);
    }
    panel += kPanel * 4;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int c = 0; c < kStripVecs; ++c) Store(acc + r * kPanel + c * kLanes, sum[r][c]);
  }
}
template <int kRows, bool kFromZero>
void RunStrip(Bf16Dot, const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  DotStrip<kRows, kFromZero>(x, x_stride, panel, steps, acc);
}
#endif
template <int kRows, bool kFromZero, typename Panel>
void RunStrip(Panel, const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  Strip<Panel, kRows, kFromZero>(x, x_stride, panel, steps, acc);
}

// One group of 1..6 rows, all 64 columns.
template <typename Panel, bool kFromZero>
void Group(int rows, const float* x, int64_t x_stride, const uint8_t* panel, int64_t steps, float* acc) {
  for (int c = 0; c < kPanel / kLanes; c += kStripVecs) {
    const uint8_t* w = panel + c * Panel::kVecBytes;
    float* out = acc + c * kLanes;
    switch (rows) {
      case 1: RunStrip<1, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 2: RunStrip<2, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 3: RunStrip<3, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 4: RunStrip<4, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      case 5: RunStrip<5, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
      default: RunStrip<6, kFromZero>(Panel{}, x, x_stride, w, steps, out); break;
    }
  }
}

// Groups of nearly equal size: 16 rows are 6 + 5 + 5.
template <typename F>
inline void ForGroups(int rows, F f) {
  const int groups = (rows + kGroupRows - 1) / kGroupRows, small = rows / groups, large = rows % groups;
  for (int g = 0, first = 0; g < groups; ++g) {
    const int size = small + (g < large ? 1 : 0);
    f(first, size);
    first += size;
  }
}

template <typename Panel>
void Multiply(const float* x, int64_t x_stride, const uint8_t* panel, int rows, int64_t steps, float* acc) {
  ForGroups(rows, [&](int first, int size) {
    Group<Panel, true>(size, x + first * x_stride, x_stride, panel, steps, acc + first * kPanel);
  });
}

template <typename Panel>
void MultiplyExpanded(const float* x, int64_t x_stride, const uint8_t* panel, int rows, int64_t steps, float* acc) {
  alignas(64) float wide[kBlockK * kPanel];
  const int64_t block_steps = kBlockK / Panel::kStep;
  for (int64_t s0 = 0; s0 < steps; s0 += block_steps) {
    const int64_t count = steps - s0 < block_steps ? steps - s0 : block_steps;
    for (int64_t s = 0; s < count; ++s) {
      const uint8_t* from = panel + (s0 + s) * Panel::kStepBytes;
      for (int line = 0; line < Panel::kStepBytes; line += 64) {
        __builtin_prefetch(from + block_steps * Panel::kStepBytes + line);  // the next block arrives during this one
      }
      for (int c = 0; c < kPanel / kLanes; ++c) {
        for (int j = 0; j < Panel::kStep; ++j) {
          Store(wide + (s * Panel::kStep + j) * kPanel + c * kLanes, Panel::Load(from + c * Panel::kVecBytes, j));
        }
      }
    }
    const float* x0 = x + s0 * Panel::kStep;
    const uint8_t* w = reinterpret_cast<const uint8_t*>(wide);
    const int64_t k = count * Panel::kStep;
    ForGroups(rows, [&](int first, int size) {
      const float* xg = x0 + first * x_stride;
      float* out = acc + first * kPanel;
      if (s0 == 0) {
        Group<ExpandedPanel, true>(size, xg, x_stride, w, k, out);
      } else {
        Group<ExpandedPanel, false>(size, xg, x_stride, w, k, out);
      }
    });
  }
}

template <typename T, typename F>
inline void WriteRow(T* y, int columns, F value) {
  for (int c = 0; c < columns; c += kLanes) {
    if (columns - c >= kLanes) {
      StoreAs(y + c, value(c, kLanes));
    } else {
      StoreTail(y + c, value(c, columns - c), columns - c);
    }
  }
}

template <typename T>
void Epilogue(const LinearParams& p, const float* acc, int64_t row, int rows, int64_t panel) {
  const int64_t column = panel * kPanel;
  const int columns = static_cast<int>(p.n - column < kPanel ? p.n - column : kPanel);
  const float* bias = p.bias == nullptr ? nullptr : p.bias + column;
  for (int r = 0; r < rows; ++r, acc += kPanel) {
    auto biased = [&](int c, int n) {
      if (bias == nullptr) return Load(acc + c);
      return Add(Load(acc + c), n == kLanes ? Load(bias + c) : LoadTail(bias + c, n));
    };
    T* y = static_cast<T*>(p.y) + (row + r) * p.y_stride;
    if (p.epilogue == LinearEpilogue::kSwiGlu) {
      WriteRow(y + column / 2, kPanel / 2, [&](int c, int) {
        const Vec gate = biased(c, kLanes), up = biased(c + kPanel / 2, kLanes);
        const Vec one = Broadcast(1.0f);
        return Mul(Div(gate, Add(one, Exp(Sub(Zero(), gate)))), up);
      });
    } else if (p.epilogue == LinearEpilogue::kAdd) {
      T* to = y + column;
      WriteRow(to, columns, [&](int c, int n) {
        return Add(n == kLanes ? LoadAs(to + c) : LoadTail(to + c, n), biased(c, n));
      });
    } else {
      WriteRow(y + column, columns, biased);
    }
  }
}

// x rows of a chunk as float32, zero up to an even k.
template <typename T>
void Widen(const T* x, int64_t k, float* out) {
  const int64_t body = k / kLanes * kLanes;
  for (int64_t i = 0; i < body; i += kLanes) Store(out + i, LoadAs(x + i));
  if (k > body) {
    StoreTail(out + body, LoadTail(x + body, static_cast<int>(k - body)), static_cast<int>(k - body));
    if (k % 2 != 0) out[k] = 0.0f;
  }
}

struct Job {
  const LinearParams* p;
  bool dot;              // bf16 dot products on pairs (avx512_bf16 level, bf16 x)
  int64_t x_stride;      // of the converted rows
  int64_t step_count, panel_bytes;
};

void ConvertRow(const Job& job, int64_t row, float* out) {
  const LinearParams& p = *job.p;
  if (job.dot) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + row * p.x_stride;
    if (p.k % 2 != 0) std::memset(out + p.k / 2, 0, 4);
    std::memcpy(out, x, p.k * 2);
  } else if (p.x_dtype == DType::kFloat32) {
    Widen(static_cast<const float*>(p.x) + row * p.x_stride, p.k, out);
  } else if (p.x_dtype == DType::kFloat16) {
    Widen(static_cast<const Fp16*>(p.x) + row * p.x_stride, p.k, out);
  } else {
    Widen(static_cast<const Bf16*>(p.x) + row * p.x_stride, p.k, out);
  }
}

void RunTask(const Job& job, const float* x, int64_t row, int rows, int64_t panel) {
  alignas(64) float acc[kBlockRows * kPanel];
  const LinearParams& p = *job.p;
  const uint8_t* w = static_cast<const uint8_t*>(p.packed) + panel * job.panel_bytes;
  const bool direct = rows <= kDirectGroups * kGroupRows;
  if (p.weight_dtype == DType::kFloat32) {
    Multiply<Float32Panel>(x, job.x_stride, w, rows, job.step_count, acc);
#if defined(__AVX512BF16__)
  } else if (job.dot) {
    Multiply<Bf16Dot>(x, job.x_stride, w, rows, job.step_count, acc);
#endif
  } else if (p.weight_dtype == DType::kFloat16) {
    (direct ? Multiply<Fp16Panel> : MultiplyExpanded<Fp16Panel>)(x, job.x_stride, w, rows, job.step_count, acc);
  } else {
    (direct ? Multiply<Bf16Panel> : MultiplyExpanded<Bf16Panel>)(x, job.x_stride, w, rows, job.step_count, acc);
  }
  if (p.y_dtype == DType::kFloat32) return Epilogue<float>(p, acc, row, rows, panel);
  if (p.y_dtype == DType::kFloat16) return Epilogue<Fp16>(p, acc, row, rows, panel);
  Epilogue<Bf16>(p, acc, row, rows, panel);
}

}  // namespace

void Linear(const LinearParams& p) {
  if (p.rows == 0 || p.n == 0) return;
  const int64_t f = PackFactor(p.weight_dtype), steps = (p.k + f - 1) / f;
  Job job{&p, false, (p.k + 1) / 2 * 2, steps, steps * f * kPanel * SizeOf(p.weight_dtype)};
#if defined(__AVX512BF16__)
  job.dot = p.weight_dtype == DType::kBFloat16 && p.x_dtype == DType::kBFloat16;
  if (job.dot) job.x_stride = steps;
#endif
  const bool in_place = p.x_dtype == DType::kFloat32 && steps * f == p.k;
  if (in_place) job.x_stride = p.x_stride;
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(NumThreads()) if (p.rows * p.n * p.k > 32768)
  {
    int64_t done = 0;  // tasks of the chunks before this one
    for (int64_t row0 = 0; row0 < p.rows; row0 += kChunkRows) {
      const int64_t chunk = p.rows - row0 < kChunkRows ? p.rows - row0 : kChunkRows;
      float* wide = static_cast<float*>(p.workspace);
      if (!in_place) {
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t r = 0; r < chunk; ++r) ConvertRow(job, row0 + r, wide + r * job.x_stride);
      }
      const float* x = in_place ? static_cast<const float*>(p.x) + row0 * p.x_stride : wide;
      int64_t block = kBlockRows;  // small enough for at least eight tasks a thread
      while (block > 24 && (chunk + block - 1) / block * panels < 8 * NumThreads()) block /= 2;
      const int64_t blocks = (chunk + block - 1) / block, tasks = blocks * panels;
      for (;;) {
        int64_t t = next.load(std::memory_order_relaxed);
        while (t < done + tasks && !next.compare_exchange_weak(t, t + 1, std::memory_order_relaxed)) {}
        if (t >= done + tasks) break;
        const int64_t panel = (t - done) / blocks, first = (t - done) % blocks * block;
        const int64_t rows = chunk - first < block ? chunk - first : block;
        RunTask(job, x + first * job.x_stride, row0 + first, static_cast<int>(rows), panel);
      }
      done += tasks;
    }
  }
}

}  // namespace ttsk::TTSK_ISA
