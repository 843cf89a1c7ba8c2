#include "ttskernels/rms_norm.h"

#include "check.h"

namespace ttsk::testing {

TTSK_TEST(rms_norm) {
  for (int i = 0; i < 40; ++i) {
    const DType type = AnyType(random), in = random.Chance(0.5) ? DType::kFloat32 : type;
    const int64_t rows = random.Pick<int64_t>({1, 3, 9}), dim = random.Pick<int64_t>({1, 3, 16, 17, 64, 100, 576});
    const int64_t x_stride = dim + random.Below(3), y_stride = dim + random.Below(3);
    check.what = Text("%lld x %lld, %s to %s", static_cast<long long>(rows), static_cast<long long>(dim), NameOf(in),
                      NameOf(type));
    Array x(in, rows * x_stride), weight = Array::Normal(type, dim, random), y(type, rows * y_stride);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < dim; ++c) x.Set(r * x_stride + c, 3 * random.Normal());
    }
    const double eps = 1e-5;
    TTSK_SELECT(RmsNorm)({x.data(), weight.data(), y.data(), rows, dim, x_stride, y_stride, static_cast<float>(eps), in, type});
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0;
      for (int64_t c = 0; c < dim; ++c) sum += x.Get(r * x_stride + c) * x.Get(r * x_stride + c);
      const double scale = 1 / std::sqrt(sum / static_cast<double>(dim) + eps);
      for (int64_t c = 0; c < dim; ++c) {
        const double want = x.Get(r * x_stride + c) * scale * weight.Get(c);
        const double error = Rounding(type) + (static_cast<double>(dim) / 16 + 12) * kEps;
        check.Near(r * dim + c, y.Get(r * y_stride + c), want, error * std::fabs(want) + 1e-7 * (type == DType::kFloat16));
      }
      for (int64_t c = dim; c < y_stride; ++c) check.Equal(c, y.Get(r * y_stride + c), kNan);
    }
  }
}

}  // namespace ttsk::testing
