#include "ttskernels/linear.h"

#include <atomic>
#include <utility>
#include <vector>

#include "linear_fixed.h"
#include "ttskernels/threads.h"

namespace ttsk::TTSK_ISA {
namespace {

// A task is one panel times a block of rows; x is converted a chunk of rows at a time.
constexpr int kChunkRows = 384;
// Bytes of y from which a core's caches lose it before it is read: logits of a batch, a prompt's activations.
constexpr int64_t kStreamBytes = 1 << 20;

template <typename T, typename F>
inline void WriteRow(T* y, int columns, bool stream, F value) {
  for (int c = 0; c < columns; c += kLanes) {
    if (columns - c < kLanes) {
      StoreTail(y + c, value(c, columns - c), columns - c);
    } else if (stream) {
      StreamAs(y + c, value(c, kLanes));
    } else {
      StoreAs(y + c, value(c, kLanes));
    }
  }
}

// Whether y is large, and every panel's rows are whole lines of it; what is added to is read anyway.
bool Streams(const LinearParams& p) {
  const int64_t size = SizeOf(p.y_dtype), columns = p.epilogue == LinearEpilogue::kSwiGlu ? p.n / 2 : p.n;
  const bool lines = (reinterpret_cast<uintptr_t>(p.y) | static_cast<uintptr_t>(p.y_stride * size)) % 64 == 0;
  return lines && p.n % kPanel == 0 && p.epilogue != LinearEpilogue::kAdd && p.rows * columns * size > kStreamBytes;
}

template <typename T>
void Epilogue(const LinearParams& p, bool stream, const float* acc, int64_t row, int rows, int64_t panel) {
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
      WriteRow(y + column / 2, kPanel / 2, stream, [&](int c, int) {
        const Vec gate = biased(c, kLanes), up = biased(c + kPanel / 2, kLanes);
        const Vec one = Broadcast(1.0f);
        return Mul(Div(gate, Add(one, Exp(Sub(Zero(), gate)))), up);
      });
    } else if (p.epilogue == LinearEpilogue::kAdd) {
      T* to = y + column;
      WriteRow(to, columns, false, [&](int c, int n) {
        return Add(n == kLanes ? LoadAs(to + c) : LoadTail(to + c, n), biased(c, n));
      });
    } else {
      WriteRow(y + column, columns, stream, biased);
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
  bool dot;              // bf16 dot products on pairs (a level with such products, bf16 x)
  int64_t x_stride;      // of the converted rows
  int64_t step_count, panel_bytes;
  FixedRows fixed;       // of the converted rows, for fixed-point weights
  bool stream;           // y past the caches
};

bool IsFixed(const LinearParams& p) { return p.form != LinearForm::kFloat; }

template <typename Form>
void FixRowAs(const Job& job, int64_t row, int64_t chunk_row) {
  const LinearParams& p = *job.p;
  const int64_t first = row * p.x_stride;
  if (p.x_dtype == DType::kFloat32) FixRow<Form>(static_cast<const float*>(p.x) + first, p.k, job.fixed, chunk_row);
  else if (p.x_dtype == DType::kFloat16) FixRow<Form>(static_cast<const Fp16*>(p.x) + first, p.k, job.fixed, chunk_row);
  else FixRow<Form>(static_cast<const Bf16*>(p.x) + first, p.k, job.fixed, chunk_row);
}

void FixRowOf(const Job& job, int64_t row, int64_t chunk_row) {
  if (job.p->form == LinearForm::kInt16) FixRowAs<Int16Form>(job, row, chunk_row);
  else FixRowAs<Int8Form>(job, row, chunk_row);
}

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

void RunTask(const Job& job, const float* x, int64_t row, int64_t chunk_row, int rows, int64_t panel) {
  alignas(64) float acc[kBlockRows * kPanel];
  const LinearParams& p = *job.p;
  const uint8_t* w = static_cast<const uint8_t*>(p.packed) + panel * job.panel_bytes;
  if (p.form == LinearForm::kInt16) MultiplyFixed<Int16Form>(job.fixed, chunk_row, rows, w, acc);
  else if (p.form == LinearForm::kInt8) MultiplyFixed<Int8Form>(job.fixed, chunk_row, rows, w, acc);
  else MultiplyPanel(p.weight_dtype, job.dot, x, job.x_stride, w, rows, job.step_count, acc);
  if (p.y_dtype == DType::kFloat32) return Epilogue<float>(p, job.stream, acc, row, rows, panel);
  if (p.y_dtype == DType::kFloat16) return Epilogue<Fp16>(p, job.stream, acc, row, rows, panel);
  Epilogue<Bf16>(p, job.stream, acc, row, rows, panel);
}

// Blocks of a chunk's rows, small enough for at least eight tasks a thread, and the order of tasks: all blocks of a panel, so
// that it is read once, or, if there is a thread for each block, all panels of a block.
struct Blocks {
  Blocks(int64_t chunk, int64_t panels, int threads) : panels(panels), rows(kBlockRows) {
    while (rows > kFewRows && (chunk + rows - 1) / rows * panels < 8 * threads) rows /= 2;
    count = (chunk + rows - 1) / rows;
    rows = (chunk + count - 1) / count;
    block_by_block = count <= threads && rows > kFewRows;
  }
  int64_t Panel(int64_t task) const { return block_by_block ? task % panels : task / count; }
  int64_t FirstRow(int64_t task) const { return (block_by_block ? task / panels : task % count) * rows; }

  int64_t panels, rows, count;
  bool block_by_block;
};

// How many of a thread's tasks are taken, in order: what a product fetches behind its panel is then what the thread needs next.
// Who has none left takes those of others. A third of what is left at a time: each taking waits until the thread's writes have
// left its core.
struct alignas(64) Taken {
  std::atomic<int64_t> count{0};

  // [first, end) of n tasks that follow `before` earlier ones; empty: none is left.
  std::pair<int64_t, int64_t> Next(int64_t before, int64_t n) {
    int64_t now = count.load(std::memory_order_relaxed), end;
    do {
      if (now >= before + n) return {n, n};
      end = now + (before + n - now + 2) / 3;
    } while (!count.compare_exchange_weak(now, end, std::memory_order_relaxed));
    return {now - before, end - before};
  }
};

}  // namespace

void Linear(const LinearParams& p) {
  if (p.rows == 0 || p.n == 0) return;
  const int64_t f = PackFactor(p.weight_dtype), steps = (p.k + f - 1) / f;
  const FixedGroups groups(p.form, p.k);
  const int64_t panel_bytes = LinearPackedBytes(kPanel, p.k, p.weight_dtype, p.form);
  Job job{&p, false, (p.k + 1) / 2 * 2, steps, panel_bytes, {nullptr, nullptr, nullptr, groups, 0}, Streams(p)};
  if (IsFixed(p)) {
    const int64_t most = p.rows < kChunkRows ? p.rows : kChunkRows;
    float* scales = reinterpret_cast<float*>(static_cast<int16_t*>(p.workspace) + most * groups.count * groups.size());
    job.fixed = {p.workspace, scales, reinterpret_cast<int32_t*>(scales + most * groups.count), groups, most};
  }
#if defined(TTSK_DOT_PAIRS)
  job.dot = !IsFixed(p) && p.weight_dtype == DType::kBFloat16 && p.x_dtype == DType::kBFloat16;
  if (job.dot) job.x_stride = steps;
#endif
  bool in_place = !IsFixed(p) && p.x_dtype == DType::kFloat32 && steps * f == p.k;
  if (in_place) job.x_stride = p.x_stride;
  if (job.dot && p.k % 2 == 0 && p.x_stride % 2 == 0) in_place = true, job.x_stride = p.x_stride / 2;
  const int64_t panels = (p.n + kPanel - 1) / kPanel;
  const int threads = p.rows * p.n * p.k > 32768 ? NumThreads() : 1;
  std::vector<Taken> taken(threads);
  Together(threads, [&](const Member& me) {
    const int64_t whole = Blocks(kChunkRows, panels, me.count).count * panels;  // tasks of every chunk but the last
    for (int64_t row0 = 0; row0 < p.rows; row0 += kChunkRows) {
      const int64_t chunk = p.rows - row0 < kChunkRows ? p.rows - row0 : kChunkRows;
      float* wide = static_cast<float*>(p.workspace);
      if (!in_place) {
        if (row0 > 0) me.Barrier();  // somebody may still read the last chunk
        const auto [first, last] = me.Share(chunk);
        for (int64_t r = first; r < last; ++r) {
          if (IsFixed(p)) FixRowOf(job, row0 + r, r);
          else ConvertRow(job, row0 + r, wide + r * job.x_stride);
        }
        me.Barrier();
      }
      const float* x = in_place ? static_cast<const float*>(p.x) + row0 * job.x_stride : wide;
      const Blocks blocks(chunk, panels, me.count);
      for (int i = 0; i < me.count; ++i) {
        const Member owner((me.index + i) % me.count, me.count);
        const auto [begin, end] = owner.Share(blocks.count * panels);
        const auto [first, last] = owner.Share(whole);
        const int64_t before = row0 / kChunkRows * (last - first);
        for (;;) {
          const auto [from, to] = taken[owner.index].Next(before, end - begin);
          if (from == to) break;
          for (int64_t t = begin + from; t < begin + to; ++t) {
            const int64_t at = blocks.FirstRow(t), rows = chunk - at < blocks.rows ? chunk - at : blocks.rows;
            RunTask(job, x + at * job.x_stride, row0 + at, at, static_cast<int>(rows), blocks.Panel(t));
          }
        }
      }
    }
    if (job.stream) StreamFence();
  });
}

}  // namespace ttsk::TTSK_ISA
