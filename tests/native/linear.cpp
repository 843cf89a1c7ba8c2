#include "ttskernels/linear.h"

#include <algorithm>
#include <bit>
#include <vector>

#include "check.h"

namespace ttsk::testing {
namespace {

struct Shape {
  int64_t rows, n, k;
  DType x, weight, y;
  LinearEpilogue epilogue;
};

// Worst case of a chain of k multiply-adds, and one more rounding for the bias.
double ChainError(const Shape& s, double magnitude) { return (static_cast<double>(s.k) + 2) * kEps * magnitude; }

void RunCase(Checks& check, Random& random, const Shape& s) {
  check.what = Text("%lld x %lld x %lld, %s x %s to %s, epilogue %d", static_cast<long long>(s.rows),
                    static_cast<long long>(s.n), static_cast<long long>(s.k), NameOf(s.x), NameOf(s.weight), NameOf(s.y),
                    static_cast<int>(s.epilogue));
  const bool swiglu = s.epilogue == LinearEpilogue::kSwiGlu, biased = random.Chance(0.7);
  const int64_t width = swiglu ? s.n / 2 : s.n, x_stride = s.k + random.Below(4);
  const int64_t y_stride = width + random.Below(4) * (width % 32 == 0 && random.Chance(0.5) ? 32 : 1);  // whole lines, or not
  Array x(s.x, s.rows * x_stride), weight = Array::Normal(s.weight, s.n * s.k, random), y(s.y, s.rows * y_stride);
  Array bias = Array::Normal(DType::kFloat32, s.n, random), before(s.y, s.rows * width);
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t i = 0; i < s.k; ++i) x.Set(r * x_stride + i, random.Normal());
    for (int64_t c = 0; c < width && s.epilogue == LinearEpilogue::kAdd; ++c) {
      before.Set(r * width + c, random.Normal());
      y.Set(r * y_stride + c, before.Get(r * width + c));
    }
  }
  std::vector<unsigned char> packed(LinearPackedBytes(s.n, s.k, s.weight) + 64);
  unsigned char* aligned = packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64) % 64;
  if (swiglu) {  // gate rows, then up rows, in alternating groups of 32
    LinearPack(weight.data(), width, s.k, s.k, s.weight, {0, 32, 64}, aligned);
    LinearPack(static_cast<char*>(weight.data()) + width * s.k * SizeOf(s.weight), width, s.k, s.k, s.weight, {32, 32, 64},
               aligned);
  } else {
    LinearPack(weight.data(), s.n, s.k, s.k, s.weight, {0, s.n, 0}, aligned);
  }
  std::vector<unsigned char> workspace(LinearWorkspaceBytes(s.rows, s.k) + 64);
  LinearParams p{};
  p.x = x.data(), p.packed = aligned, p.bias = biased ? bias.floats() : nullptr, p.y = y.data();
  p.workspace = workspace.data() + (64 - reinterpret_cast<uintptr_t>(workspace.data()) % 64) % 64;
  p.rows = s.rows, p.n = s.n, p.k = s.k, p.x_stride = x_stride, p.y_stride = y_stride;
  p.x_dtype = s.x, p.weight_dtype = s.weight, p.y_dtype = s.y, p.epilogue = s.epilogue;
  TTSK_SELECT(Linear)(p);

  const auto dot = [&](int64_t r, int64_t weight_row, int64_t column, double* error) {
    double sum = 0, magnitude = 0;
    for (int64_t i = 0; i < s.k; ++i) {
      const double term = x.Get(r * x_stride + i) * weight.Get(weight_row * s.k + i);
      sum += term, magnitude += std::fabs(term);
    }
    const double b = biased ? bias.Get(column) : 0.0;
    *error = ChainError(s, magnitude + std::fabs(b));
    return sum + b;
  };
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      double error, want;
      if (swiglu) {
        const int64_t column = c / 32 * 64 + c % 32;
        double up_error;
        const double gate = dot(r, c, column, &error), up = dot(r, width + c, column + 32, &up_error);
        const double silu = gate / (1 + std::exp(-gate));
        want = silu * up;
        error = 1.1 * error * std::fabs(up) + std::fabs(silu) * up_error + 4e-7 * std::fabs(want);
      } else {
        want = dot(r, c, c, &error);
        if (s.epilogue == LinearEpilogue::kAdd) want += before.Get(r * width + c);
      }
      const double least = s.y == DType::kFloat16 ? 0x1p-25 : 1e-30;  // half a step between denormal numbers
      const double rounding = std::max((Rounding(s.y) + kEps) * std::fabs(want), least);
      check.Near(r * width + c, y.Get(r * y_stride + c), want, error + rounding);
    }
    for (int64_t c = width; c < y_stride; ++c) check.Equal(c, y.Get(r * y_stride + c), kNan);
  }
  if (s.epilogue == LinearEpilogue::kAdd) return;
  // A row alone has the bits that it has among others.
  const int64_t row = random.Below(s.rows), size = SizeOf(s.y) * width;
  Array alone(s.y, y_stride);
  p.x = static_cast<const char*>(p.x) + row * x_stride * SizeOf(s.x), p.y = alone.data(), p.rows = 1;
  TTSK_SELECT(Linear)(p);
  const char* together = static_cast<const char*>(y.data()) + row * y_stride * SizeOf(s.y);
  check.True(std::memcmp(alone.data(), together, size) == 0, "a row alone has other bits");
}

// A group of a row, as it is, and as fixed point rounds it: int8 after the matrix of signs (-1)^popcount(i & j), of three 64s
// after it for each, and a reflection; and the largest magnitude of that.
struct Group {
  Group(const Array& from, int64_t begin, int64_t count, int64_t size, bool turn) : values(size), turned(size) {
    for (int64_t i = 0; i < count; ++i) values[i] = from.Get(begin + i);
    const int64_t part = size == 192 ? 64 : size;
    for (int64_t i = 0; i < size && turn; ++i) {
      for (int64_t j = i / part * part; j < i / part * part + part; ++j) {
        turned[i] += std::popcount(static_cast<uint64_t>(i % part & j % part)) % 2 ? -values[j] : values[j];
      }
    }
    for (int64_t i = 0; i < 64 && size == 192 && turn; ++i) {
      const double two_thirds = (turned[i] + turned[i + 64] + turned[i + 128]) * 2 / 3;
      turned[i] -= two_thirds, turned[i + 64] -= two_thirds, turned[i + 128] -= two_thirds;
    }
    if (!turn) turned = values;
    for (const double value : turned) top = std::max(top, std::fabs(value));
  }
  std::vector<double> values, turned;
  double top = 0;
};
using Groups = std::vector<Group>;
std::vector<Groups> GroupsOf(const Array& from, int64_t rows, int64_t k, int64_t size, bool turn) {
  std::vector<Groups> result(rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t first = 0; first < k; first += size) {
      result[r].emplace_back(from, r * k + first, std::min(size, k - first), size, turn);
    }
  }
  return result;
}

// Fixed point: a term errs by at most half a scale of its weight's group, times the input, and the other way round.
void RunFixed(Checks& check, Random& random, int64_t rows, int64_t n, int64_t k, DType dtype, LinearForm form) {
  const bool words = form == LinearForm::kInt16;
  check.what = Text("%lld x %lld x %lld, %s as %s", static_cast<long long>(rows), static_cast<long long>(n),
                    static_cast<long long>(k), NameOf(dtype), words ? "int16" : "int8");
  Array x = Array::Normal(dtype, rows * k, random), weight = Array::Normal(dtype, n * k, random);
  Array y(DType::kFloat32, rows * n);
  std::vector<unsigned char> packed(LinearPackedBytes(n, k, dtype, form)), workspace(LinearWorkspaceBytes(rows, k));
  LinearPack(weight.data(), n, k, k, dtype, {0, n, 0}, packed.data(), form);
  LinearParams p{};
  p.x = x.data(), p.packed = packed.data(), p.y = y.data(), p.workspace = workspace.data();
  p.rows = rows, p.n = n, p.k = k, p.x_stride = k, p.y_stride = n;
  p.x_dtype = p.weight_dtype = dtype, p.y_dtype = DType::kFloat32, p.form = form;
  TTSK_SELECT(Linear)(p);
  const int64_t size = FixedGroups(form, k).size();
  const double half_w = 0.5001 / (words ? kMostWord : kMostByte - 0.5 * (kByteTries - 1));
  const double half_x = 0.5001 / (words ? kMostRowOfWords : kMostByte);
  const double scale = words ? 1.0 : size == 128 ? 1.0 / 128 : 1.0 / 64;
  const std::vector<Groups> xs = GroupsOf(x, rows, k, size, !words), ws = GroupsOf(weight, n, k, size, !words);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < n; ++c) {
      double sum = 0, error = 0;
      for (size_t g = 0; g < xs[r].size(); ++g) {
        const Group &in = xs[r][g], &by = ws[c][g];
        for (int64_t i = 0; i < size; ++i) {
          const double a = std::fabs(in.turned[i]), b = std::fabs(by.turned[i]);
          error += scale * (a * half_w * by.top + b * half_x * in.top + half_w * half_x * by.top * in.top);
          error += 8 * kEps * scale * (a * b + in.top * b + a * by.top);  // the transform's own roundings are of its largest
          sum += in.values[i] * by.values[i];
        }
      }
      check.Near(r * n + c, y.Get(r * n + c), sum, error + 1e-30);
    }
  }
  const int64_t row = random.Below(rows);
  std::vector<float> alone(n);
  p.x = static_cast<const char*>(x.data()) + row * k * SizeOf(dtype), p.y = alone.data(), p.rows = 1;
  TTSK_SELECT(Linear)(p);
  check.True(std::memcmp(alone.data(), y.floats() + row * n, n * 4) == 0, "a row alone has other bits");
}

}  // namespace

TTSK_TEST(linear) {
  for (const LinearForm form : {LinearForm::kInt16, LinearForm::kInt8}) {
    for (int i = 0; i < 12; ++i) {
      RunFixed(check, random, random.Pick<int64_t>({1, 2, 6, 7, 25, 97}), random.Pick<int64_t>({1, 15, 64, 130}),
               random.Pick<int64_t>({1, 31, 64, 129, 260, 380, 500}),
               random.Pick({DType::kFloat32, DType::kFloat16, DType::kBFloat16}), form);
    }
  }
  for (const DType weight : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {
    for (int i = 0; i < 12; ++i) {
      Shape s{random.Pick<int64_t>({1, 2, 5, 6, 7, 16, 25, 97}), random.Pick<int64_t>({1, 15, 64, 65, 130}),
              random.Pick<int64_t>({1, 2, 31, 64, 129, 260}), weight, weight, weight, LinearEpilogue::kStore};
      if (random.Chance(0.5)) s.x = DType::kFloat32;
      if (random.Chance(0.5)) s.y = DType::kFloat32;
      s.epilogue = random.Pick({LinearEpilogue::kStore, LinearEpilogue::kAdd, LinearEpilogue::kSwiGlu});
      if (s.epilogue == LinearEpilogue::kSwiGlu) s.n = random.Pick<int64_t>({64, 128});
      RunCase(check, random, s);
    }
  }
  for (const DType y : {DType::kFloat32, DType::kFloat16, DType::kBFloat16}) {  // large ones are written past the caches
    for (int i = 0; i < 3; ++i) {
      RunCase(check, random, {1100, 512, 3, y, y, y, LinearEpilogue::kStore});
      RunCase(check, random, {1100, 1024, 3, y, y, y, LinearEpilogue::kSwiGlu});
    }
  }
  RunCase(check, random, {400, 70, 33, DType::kBFloat16, DType::kBFloat16, DType::kFloat32, LinearEpilogue::kStore});
}

}  // namespace ttsk::testing
