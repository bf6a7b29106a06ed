// Stored logits of an independent implementation, and how far ours are from them.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "support/world.h"

namespace tessera::test {

struct GoldenSequence {
  std::vector<int32_t> ids;
  std::vector<float> logits;  // [position][vocab]
};
// Reads `N.ids` and `N.<kind>.logits` (fp16 or fp32) for N = 0, 1, ...
std::vector<GoldenSequence> LoadGolden(const std::string& path, const std::string& kind);

struct GoldenComparison {
  std::vector<double> cosines;         // per position
  double top1_equal = 0;               // share of positions
  double mean_logprob_difference = 0;  // of the true next token
};
// With every token in the expanded form, or every one in the absorbed form (docs/numerics.md).
GoldenComparison CompareWithGolden(const LoadedModel& model, const std::vector<GoldenSequence>& golden,
                                   const kernels::Kernels& table, bool expanded);
// As one set of positions.
GoldenComparison Together(const GoldenComparison& a, const GoldenComparison& b);
// The tolerances of the goldens; prints the figures on failure.
void ExpectWithinTolerance(const GoldenComparison& comparison);

}  // namespace tessera::test
