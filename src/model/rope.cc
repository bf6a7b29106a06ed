// YaRN in double, rounded once to fp32.
#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace tessera {
namespace {

double YarnMscale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

float SoftmaxScale(const ModelConfig& config) {
  const double m = YarnMscale(config.yarn.factor, config.yarn.mscale_all_dim);
  return static_cast<float>(m * m / std::sqrt(static_cast<double>(config.qk_head_dim())));
}

}  // namespace

std::vector<double> YarnInverseFrequencies(const ModelConfig& config) {
  const YarnConfig& yarn = config.yarn;
  const int dim = config.qk_rope_head_dim;
  const double base = config.rope_theta;
  std::vector<double> frequencies(dim / 2);
  for (int j = 0; j < dim / 2; ++j) frequencies[j] = std::pow(base, -2.0 * j / dim);
  if (yarn.factor <= 1) return frequencies;
  // The pair index at which a wave makes `rotations` turns within the original context.
  const auto pair_of = [&](double rotations) {
    return dim * std::log(yarn.original_max_position_embeddings / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(base));
  };
  const double low = std::max(std::floor(pair_of(yarn.beta_fast)), 0.0);
  double high = std::min(std::ceil(pair_of(yarn.beta_slow)), dim - 1.0);
  if (low == high) high += 0.001;
  for (int j = 0; j < dim / 2; ++j) {
    const double smooth = 1 - std::clamp((j - low) / (high - low), 0.0, 1.0);
    frequencies[j] = frequencies[j] / yarn.factor * (1 - smooth) + frequencies[j] * smooth;
  }
  return frequencies;
}

RotaryTables MakeRotaryTables(const ModelConfig& config, int num_positions) {
  const std::vector<double> frequencies = YarnInverseFrequencies(config);
  const double magnitude = YarnMscale(config.yarn.factor, config.yarn.mscale) /
                           YarnMscale(config.yarn.factor, config.yarn.mscale_all_dim);
  RotaryTables tables;
  tables.half = static_cast<int>(frequencies.size());
  tables.softmax_scale = SoftmaxScale(config);
  tables.cos.reserve(static_cast<size_t>(num_positions) * tables.half);
  tables.sin.reserve(static_cast<size_t>(num_positions) * tables.half);
  for (int position = 0; position < num_positions; ++position) {
    for (const double frequency : frequencies) {
      tables.cos.push_back(static_cast<float>(std::cos(position * frequency) * magnitude));
      tables.sin.push_back(static_cast<float>(std::sin(position * frequency) * magnitude));
    }
  }
  return tables;
}

}  // namespace tessera
