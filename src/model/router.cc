// Selection by repeated arg-max: top-k is small, and ties then go to the lower index by themselves.
#include "model/router.h"

#include <vector>

#include "base/check.h"

namespace tessera {
namespace {

// The index of the largest value among those not taken, the lowest one on ties; marks it taken.
int TakeLargest(std::span<const float> values, std::span<char> taken) {
  int best = -1;
  for (int i = 0; i < static_cast<int>(values.size()); ++i) {
    if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
  }
  CHECK_GE(best, 0);
  taken[best] = 1;
  return best;
}

}  // namespace

void Route(const ModelConfig& config, std::span<const float> scores, std::span<const float> bias,
           std::span<RoutedExpert> chosen) {
  const int num_experts = config.n_routed_experts;
  const int group_size = num_experts / config.n_group;
  thread_local std::vector<float> biased;
  thread_local std::vector<char> taken;
  biased.resize(num_experts);
  for (int e = 0; e < num_experts; ++e) biased[e] = scores[e] + bias[e];

  taken.assign(num_experts, config.n_group > config.topk_group ? 1 : 0);
  if (config.n_group > config.topk_group) {
    thread_local std::vector<float> group_scores;
    thread_local std::vector<char> pair_taken, group_taken;
    group_scores.resize(config.n_group);
    group_taken.assign(config.n_group, 0);
    for (int g = 0; g < config.n_group; ++g) {
      const std::span<const float> members =
          std::span<const float>(biased).subspan(g * group_size, group_size);
      pair_taken.assign(group_size, 0);
      const float first = members[TakeLargest(members, pair_taken)];
      group_scores[g] = first + members[TakeLargest(members, pair_taken)];
    }
    for (int kept = 0; kept < config.topk_group; ++kept) {
      const int g = TakeLargest(group_scores, group_taken);
      for (int e = g * group_size; e < (g + 1) * group_size; ++e) taken[e] = 0;
    }
  }

  float sum = 0;
  for (RoutedExpert& slot : chosen) {
    slot.expert = TakeLargest(biased, taken);
    slot.weight = scores[slot.expert];
    sum += slot.weight;
  }
  for (RoutedExpert& slot : chosen) slot.weight = slot.weight / (sum + 1e-20f) * config.routed_scaling_factor;
}

}  // namespace tessera
