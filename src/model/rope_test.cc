// YaRN tables against the figures of DeepSeek-R1's own configuration.
#include "model/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tessera {
namespace {

ModelConfig R1() {
  ModelConfig config;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.yarn = {.factor = 40, .beta_fast = 32, .beta_slow = 1, .mscale = 1, .mscale_all_dim = 1};
  return config;
}

TEST(Yarn, BlendsBetweenPairs10And23) {
  const std::vector<double> frequencies = YarnInverseFrequencies(R1());
  ASSERT_EQ(frequencies.size(), 32u);
  for (int j = 0; j < 32; ++j) {
    const double plain = std::pow(10000.0, -2.0 * j / 64);
    if (j <= 10) {
      EXPECT_DOUBLE_EQ(frequencies[j], plain) << j;
    } else if (j >= 23) {
      EXPECT_DOUBLE_EQ(frequencies[j], plain / 40) << j;
    } else {
      EXPECT_LT(frequencies[j], plain) << j;
      EXPECT_GT(frequencies[j], plain / 40) << j;
    }
  }
}

TEST(Yarn, SoftmaxScaleGrowsByMscaleSquared) {
  EXPECT_NEAR(MakeRotaryTables(R1(), 1).softmax_scale, 0.1352338, 1e-7);
  ModelConfig plain = R1();
  plain.yarn.factor = 1;
  EXPECT_FLOAT_EQ(MakeRotaryTables(plain, 1).softmax_scale, 1 / std::sqrt(192.0f));
}

TEST(Yarn, TablesHoldCosAndSinOfPositionTimesFrequency) {
  const RotaryTables tables = MakeRotaryTables(R1(), 100);
  const std::vector<double> frequencies = YarnInverseFrequencies(R1());
  for (const int position : {0, 1, 99}) {
    for (const int j : {0, 15, 31}) {
      EXPECT_EQ(tables.CosRow(position)[j], static_cast<float>(std::cos(position * frequencies[j])));
      EXPECT_EQ(tables.SinRow(position)[j], static_cast<float>(std::sin(position * frequencies[j])));
    }
  }
}

}  // namespace
}  // namespace tessera
