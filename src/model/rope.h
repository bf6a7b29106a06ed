// Rotary tables and the softmax scale, with YaRN always on (model.md of the DeepSeek-V3 reference:
// frequencies are blended between f and f / factor; the softmax scale grows by mscale squared). Computed in
// double, once.
#pragma once

#include <vector>

#include "model/config.h"

namespace tessera {

struct RotaryTables {
  int half = 0;  // pairs per position
  float softmax_scale = 0;
  std::vector<float> cos;  // [num_positions][half]
  std::vector<float> sin;
  const float* CosRow(int position) const { return cos.data() + static_cast<size_t>(position) * half; }
  const float* SinRow(int position) const { return sin.data() + static_cast<size_t>(position) * half; }
};

// The blended frequencies of the qk_rope_head_dim / 2 pairs.
std::vector<double> YarnInverseFrequencies(const ModelConfig& config);
RotaryTables MakeRotaryTables(const ModelConfig& config, int num_positions);

}  // namespace tessera
