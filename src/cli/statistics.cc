// See statistics.h.
#include "cli/statistics.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace tessera::cli {

Statistics::Statistics(std::vector<double> values) : values_(std::move(values)) {
  std::sort(values_.begin(), values_.end());
}

double Statistics::Mean() const {
  return values_.empty()
             ? 0
             : std::accumulate(values_.begin(), values_.end(), 0.0) / static_cast<double>(values_.size());
}

double Statistics::Deviation() const {
  if (values_.empty()) return 0;
  const double mean = Mean();
  double sum = 0;
  for (const double value : values_) sum += (value - mean) * (value - mean);
  return std::sqrt(sum / static_cast<double>(values_.size()));
}

double Statistics::Percentile(double percent) const {
  if (values_.empty()) return 0;
  const double place = percent / 100 * static_cast<double>(values_.size() - 1);
  const size_t below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, values_.size() - 1);
  return values_[below] + (values_[above] - values_[below]) * (place - static_cast<double>(below));
}

}  // namespace tessera::cli
