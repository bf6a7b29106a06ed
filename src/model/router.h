// Which experts a token goes to and with what weights: the router `noaux_tc` (numerics.md, "router"). Pure.
#pragma once

#include <cstdint>
#include <span>

#include "model/config.h"

namespace tessera {

struct RoutedExpert {
  int32_t expert = 0;
  float weight = 0;
};

// `scores` [n_routed_experts]: sigmoid of the router's logits. `bias` [n_routed_experts] only selects. Fills
// `chosen` [num_experts_per_tok] by descending biased score; ties go to the lower index. NaN scores give some
// valid choice (such rows have failed already).
void Route(const ModelConfig& config, std::span<const float> scores, std::span<const float> bias,
           std::span<RoutedExpert> chosen);

}  // namespace tessera
