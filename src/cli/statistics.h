// Mean, deviation and percentiles of measured values, for the benchmarks. Pure.
#pragma once

#include <vector>

namespace tessera::cli {

class Statistics {
 public:
  explicit Statistics(std::vector<double> values);

  bool empty() const { return values_.empty(); }
  double Mean() const;
  double Deviation() const;  // of the population
  // Linear interpolation between the neighbours; `percent` from 0 to 100. 0 where there are no values.
  double Percentile(double percent) const;

 private:
  std::vector<double> values_;  // ascending
};

}  // namespace tessera::cli
