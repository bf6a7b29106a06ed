// The router against hand-worked cases: groups, ties, weights.
#include "model/router.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace tessera {
namespace {

ModelConfig Config(int experts, int groups, int kept, int top_k) {
  ModelConfig config;
  config.n_routed_experts = experts;
  config.n_group = groups;
  config.topk_group = kept;
  config.num_experts_per_tok = top_k;
  config.routed_scaling_factor = 2.5f;
  return config;
}

std::vector<int> Experts(const std::vector<RoutedExpert>& chosen) {
  std::vector<int> experts;
  for (const RoutedExpert& slot : chosen) experts.push_back(slot.expert);
  return experts;
}

TEST(Route, KeepsTheGroupsWithTheBestTwo) {
  // Group 0 has the single best expert but the weaker pair.
  const std::vector<float> scores = {0.9f, 0.1f, 0.1f, 0.6f, 0.5f, 0.1f, 0.3f, 0.3f, 0.3f};
  std::vector<RoutedExpert> chosen(2);
  Route(Config(9, 3, 1, 2), scores, std::vector<float>(9, 0.0f), chosen);
  EXPECT_EQ(Experts(chosen), (std::vector<int>{3, 4}));
  EXPECT_FLOAT_EQ(chosen[0].weight, 0.6f / 1.1f * 2.5f);
  EXPECT_FLOAT_EQ(chosen[1].weight, 0.5f / 1.1f * 2.5f);
}

TEST(Route, BiasSelectsButDoesNotWeigh) {
  const std::vector<float> scores = {0.5f, 0.4f, 0.3f, 0.2f};
  const std::vector<float> bias = {-1.0f, 0.0f, 0.0f, 1.0f};
  std::vector<RoutedExpert> chosen(2);
  Route(Config(4, 1, 1, 2), scores, bias, chosen);
  EXPECT_EQ(Experts(chosen), (std::vector<int>{3, 1}));
  EXPECT_FLOAT_EQ(chosen[0].weight, 0.2f / (0.2f + 0.4f) * 2.5f);
}

TEST(Route, NegativeBiasedScoresBeatOtherGroups) {
  // A mask of 0 instead of -inf would let the dropped group win here.
  const std::vector<float> scores = {0.1f, 0.1f, 0.2f, 0.2f};
  const std::vector<float> bias = {-3.0f, -3.0f, -2.0f, -2.0f};
  std::vector<RoutedExpert> chosen(2);
  Route(Config(4, 2, 1, 2), scores, bias, chosen);
  EXPECT_EQ(Experts(chosen), (std::vector<int>{2, 3}));
}

TEST(Route, TiesGoToTheLowerIndex) {
  std::vector<RoutedExpert> chosen(3);
  Route(Config(8, 4, 2, 3), std::vector<float>(8, 0.25f), std::vector<float>(8, 0.0f), chosen);
  EXPECT_EQ(Experts(chosen), (std::vector<int>{0, 1, 2}));
  const std::vector<float> zeros = {-0.0f, 0.0f, -0.0f, 0.0f};
  chosen.resize(2);
  Route(Config(4, 1, 1, 2), zeros, std::vector<float>(4, 0.0f), chosen);
  EXPECT_EQ(Experts(chosen), (std::vector<int>{0, 1}));
}

TEST(Route, NanGivesAValidChoice) {
  std::vector<RoutedExpert> chosen(4);
  Route(Config(8, 4, 2, 4), std::vector<float>(8, std::nanf("")), std::vector<float>(8, 0.0f), chosen);
  std::vector<int> seen(8, 0);
  for (const RoutedExpert& slot : chosen) EXPECT_EQ(seen.at(slot.expert)++, 0);
}

}  // namespace
}  // namespace tessera
