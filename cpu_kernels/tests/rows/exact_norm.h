// Layer norm and RMS norm in double precision, and how far a kernel may be from that.

#ifndef QUAKE_TESTS_ROWS_EXACT_NORM_H_
#define QUAKE_TESTS_ROWS_EXACT_NORM_H_

#include <algorithm>
#include <string>
#include <vector>

#include "core/norm.h"
#include "tests/harness.h"

namespace quake::tests {

// A row of a call: each begins at its own element.
struct NormRow {
  const Storage& storage;
  const char *x, *residual;  // residual and sum may be null
  const char *y, *sum;
  std::size_t first, size;  // in elements
};

// In a float32 sum of n elements, over vectors of at least 4 lanes of which eight run side by side, an element
// passes through up to n/32 + 12 additions in a piece of 4096; the pieces are added in double precision. With
// u = 2^-24 it errs by at most c u times the sum of the magnitudes, c = min(n, 4096)/32 + 12. So the mean errs
// by m = c u mean|v| + u |mean|, a difference d from it by m + u |d|, and the variance, whose first-order term
// in m vanishes, by m^2 and (c + 3) u of itself. Of the factor that is half, and three roundings; the products
// and the sum with the offset follow.
inline void check_norm_row(const NormRow& row, const Norm& norm, const std::string& what) {
  constexpr double u = 0x1p-24;
  const double n = static_cast<double>(row.size), c = std::min(n, 4096.0) / 32 + 12;
  const auto input = [&](const char* data, std::size_t i) {
    return flushed(static_cast<float>(row.storage.get(data, row.first + i)));
  };
  std::vector<double> v(row.size);
  double sum = 0, magnitude = 0, squares = 0;
  for (std::size_t i = 0; i < row.size; ++i) {
    v[i] = input(row.x, i);
    if (row.residual != nullptr) {
      const double exact = v[i] + static_cast<double>(input(row.residual, i));
      v[i] = flushed(static_cast<float>(exact));
      const double rounded = row.storage.get(row.sum, row.first + i);
      check(within(rounded, v[i], u, row.storage), "%s: sum[%zu] = %.9g, exact %.9g", what.c_str(), i, rounded,
            exact);
    }
    sum += v[i];
    magnitude += std::fabs(v[i]);
  }
  const double mean = norm.centered ? sum / n : 0;
  const double of_mean = norm.centered ? c * u * magnitude / n + u * std::fabs(mean) + kSmallestNormal : 0;
  for (const double value : v) squares += (value - mean) * (value - mean);
  const double factor = 1 / std::sqrt(squares / n + static_cast<double>(norm.epsilon));
  const bool nan = std::isnan(magnitude);
  // Beyond that the squares overflow, or the sums.
  if (!nan && !(magnitude < 1e18)) return;
  const double of_factor = (c + 3) * u / 2 + of_mean * factor * of_mean * factor / 2 + 3 * u;
  for (std::size_t i = 0; i < row.size; ++i) {
    const double scale = flushed(norm.scale[i]), offset = norm.offset ? flushed(norm.offset[i]) : 0.0f;
    const double y = row.storage.get(row.y, row.first + i), d = v[i] - mean;
    if (nan || std::isnan(scale) || std::isnan(offset)) {
      check(std::isnan(y), "%s: y[%zu] = %.9g, not NaN", what.c_str(), i, y);
      continue;
    }
    if (!(std::fabs(scale) < 1e18 && std::fabs(offset) < 1e36)) continue;
    const double product = d * factor * scale, exact = product + offset;
    const double more = (of_mean + u * std::fabs(d) + kSmallestNormal) * factor * std::fabs(scale) +
                        (of_factor + 3 * u) * std::fabs(product) + u * std::fabs(exact) + 2 * kSmallestNormal;
    check(within(y, exact, 0, row.storage, more * (1 + row.storage.half_ulp)),
          "%s: y[%zu] = %.9g, exact %.9g, may err by %.2g", what.c_str(), i, y, exact, more);
  }
}

}  // namespace quake::tests

#endif  // QUAKE_TESTS_ROWS_EXACT_NORM_H_
