// Logits against an independent implementation (tools/tiny_r1/golden.py): a float64 simulation of the W8A8
// model on the true int8 grids. Tolerances: an int8 rounding flip can tip a near-tie of the router at an
// isolated position; systematic differences are errors.
#include <gtest/gtest.h>

#include "support/golden.h"
#include "support/world.h"

namespace tessera::test {
namespace {

class GoldenTest : public testing::TestWithParam<std::tuple<kernels::Isa, bool>> {
 protected:
  Result<const kernels::Kernels*> Table() const { return kernels::ForIsa(std::get<0>(GetParam())); }
  bool expanded() const { return std::get<1>(GetParam()); }
};

TEST_P(GoldenTest, TinyR1MatchesTheSimulation) {
  const auto table = Table();
  if (!table) GTEST_SKIP() << table.error().message;
  static const auto model = LoadModel(TinyR1Folder(), kTinyR1Tokens);
  const auto golden =
      LoadGolden(std::string(TESSERA_SOURCE_DIR) + "/tests/golden/tiny_r1_small.safetensors", "w8a8");
  ExpectWithinTolerance(CompareWithGolden(*model, golden, **table, expanded()));
}

// Plain bf16, dimensions that no vector width divides, positions far beyond YaRN's trained length: against
// transformers (tests/golden/make_bf16_golden.py).
TEST_P(GoldenTest, RandomBf16MatchesTransformers) {
  const auto table = Table();
  if (!table) GTEST_SKIP() << table.error().message;
  const auto model = MakeOddModel(RandomFormat::kBf16);
  const auto golden =
      LoadGolden(std::string(TESSERA_SOURCE_DIR) + "/tests/golden/random_bf16.safetensors", "bf16");
  ExpectWithinTolerance(CompareWithGolden(*model, golden, **table, expanded()));
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, GoldenTest,
                         testing::Combine(testing::Values(kernels::Isa::kScalar, kernels::Isa::kAvx2,
                                                          kernels::Isa::kAvx512, kernels::Isa::kAvx512Bf16),
                                          testing::Bool()),
                         [](const auto& info) {
                           return Format("{}_{}", kernels::IsaName(std::get<0>(info.param)),
                                         std::get<1>(info.param) ? "expanded" : "absorbed");
                         });

}  // namespace
}  // namespace tessera::test
