// Logits against an independent implementation (tools/tiny_r1/golden.py): a float64 simulation of the W8A8
// model on the true int8 grids. Tolerances: an int8 rounding flip can tip a near-tie of the router at an
// isolated position; systematic differences are errors.
#include <gtest/gtest.h>

#include "support/golden.h"
#include "support/world.h"

namespace tessera::test {
namespace {

class GoldenTest : public testing::TestWithParam<kernels::Isa> {};

TEST_P(GoldenTest, TinyR1MatchesTheSimulation) {
  const auto table = kernels::ForIsa(GetParam());
  if (!table) GTEST_SKIP() << table.error().message;
  static const auto model = LoadModel(TinyR1Folder(), kTinyR1Tokens);
  const auto golden =
      LoadGolden(std::string(TESSERA_SOURCE_DIR) + "/tests/golden/tiny_r1_small.safetensors", "w8a8");
  ExpectWithinTolerance(CompareWithGolden(*model, golden, **table, /*expanded=*/false));
}

// Plain bf16, dimensions that no vector width divides, positions far beyond YaRN's trained length: against
// transformers (tests/golden/make_bf16_golden.py).
TEST_P(GoldenTest, RandomBf16MatchesTransformers) {
  const auto table = kernels::ForIsa(GetParam());
  if (!table) GTEST_SKIP() << table.error().message;
  const auto model = MakeOddModel(RandomFormat::kBf16);
  const auto golden =
      LoadGolden(std::string(TESSERA_SOURCE_DIR) + "/tests/golden/random_bf16.safetensors", "bf16");
  ExpectWithinTolerance(CompareWithGolden(*model, golden, **table, /*expanded=*/false));
}

// Both sets with every token in the expanded form. As one set of positions: it flips one router near-tie more
// than the smaller one alone has room for.
TEST_P(GoldenTest, ExpandedFormMatchesToo) {
  const auto table = kernels::ForIsa(GetParam());
  if (!table) GTEST_SKIP() << table.error().message;
  const std::string folder = std::string(TESSERA_SOURCE_DIR) + "/tests/golden/";
  static const auto tiny = LoadModel(TinyR1Folder(), kTinyR1Tokens);
  const auto odd = MakeOddModel(RandomFormat::kBf16);
  const auto w8a8 = LoadGolden(folder + "tiny_r1_small.safetensors", "w8a8");
  const auto bf16 = LoadGolden(folder + "random_bf16.safetensors", "bf16");
  ExpectWithinTolerance(Together(CompareWithGolden(*tiny, w8a8, **table, /*expanded=*/true),
                                 CompareWithGolden(*odd, bf16, **table, /*expanded=*/true)));
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, GoldenTest,
                         testing::Values(kernels::Isa::kScalar, kernels::Isa::kAvx2, kernels::Isa::kAvx512,
                                         kernels::Isa::kAvx512Bf16),
                         [](const auto& info) { return std::string(kernels::IsaName(info.param)); });

}  // namespace
}  // namespace tessera::test
