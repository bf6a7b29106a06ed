// The reference against independent arithmetic: double precision, 128-bit integers, and the definitions of
// docs/numerics.md written a second time on unpacked weights.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/kernels_testing.h"

namespace tessera::kernels {
namespace {

class ReferenceTest : public ::testing::Test {
 protected:
  void SetUp() override { SetFlushToZero(); }
  const Kernels& kernels = Reference();
};

float ExpOf(const Kernels& kernels, float x) {
  return kernels.exp_sum(&x, 1, 1.0f, 0.0f, nullptr);
}

TEST_F(ReferenceTest, ExpIsWithinNineTenthsOfAnUlp) {
  RandomStream random(3);
  for (int i = 0; i < 20000; ++i) {
    const float x = random.Unit() * 176.0f - 87.3f;
    if (x > 88.72f) continue;
    const double exact = std::exp(static_cast<double>(x));
    const float got = ExpOf(kernels, x);
    const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
    ASSERT_LE(std::abs(got - exact), 0.9 * ulp) << x;
  }
}

TEST_F(ReferenceTest, ExpAtTheEdges) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(ExpOf(kernels, 0.0f), 1.0f);
  EXPECT_EQ(ExpOf(kernels, 88.73f), infinity);
  EXPECT_LT(ExpOf(kernels, 88.72f), infinity);
  EXPECT_EQ(Bits(ExpOf(kernels, -87.34f)), 0u);
  EXPECT_GT(ExpOf(kernels, -87.33f), 0.0f);
  EXPECT_EQ(Bits(ExpOf(kernels, -infinity)), 0u);
  EXPECT_TRUE(std::isnan(ExpOf(kernels, std::numeric_limits<float>::quiet_NaN())));
}

TEST_F(ReferenceTest, LogIsCloseToTheExactOne) {
  RandomStream random(4);
  EXPECT_EQ(Bits(kernels.log(1.0f)), 0u);
  for (int i = 0; i < 20000; ++i) {
    const float x = std::exp2(random.Unit() * 40.0f);
    const double exact = std::log(static_cast<double>(x));
    ASSERT_NEAR(kernels.log(x), exact, 3e-7 * exact + 1e-9) << x;
  }
}

TEST_F(ReferenceTest, RmsNormSumsSixtyFourLanes) {
  RandomStream random(5);
  for (const int n : {1, 64, 65, 256, 777}) {
    const std::vector<float> x = NormalFloats(random, n, 3.0f);
    const std::vector<float> weight = NormalFloats(random, n);
    std::vector<float> out(n);
    EXPECT_TRUE(kernels.rms_norm(x.data(), weight.data(), n, 1e-6f, out.data()));
    std::vector<float> lanes(64);
    for (int i = 0; i < n; ++i) lanes[i % 64] = std::fma(x[i], x[i], lanes[i % 64]);
    for (int apart = 32; apart > 0; apart /= 2) {
      for (int j = 0; j < apart; ++j) lanes[j] += lanes[j + apart];
    }
    const float r = 1.0f / std::sqrt(lanes[0] / static_cast<float>(n) + 1e-6f);
    for (int i = 0; i < n; ++i) ASSERT_EQ(Bits(out[i]), Bits((x[i] * r) * weight[i]));
  }
  const float huge = 1e20f;
  const float one = 1.0f;
  float out = 0;
  EXPECT_FALSE(kernels.rms_norm(&huge, &one, 1, 1e-6f, &out));
}

TEST_F(ReferenceTest, StaticQuantisationRoundsTiesAndClamps) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> x = {0.5f, 1.5f, -0.5f, -2.5f, 1e9f, -1e9f, nan, 3.4f, 126.5f, -127.5f};
  const float inverse_scale = 1.0f;
  std::vector<int8_t> out(16, 99);
  int32_t sums[2] = {};
  kernels.quantize_static(x.data(), nullptr, &inverse_scale, false, 0.0f, 10, 2, out.data(), sums);
  const std::vector<int8_t> expected = {0, 2, 0, -2, 127, 0, 0, 0, -128, -128, 3, 126, -128, 0, 0, 0};
  EXPECT_EQ(out, expected);
  EXPECT_EQ(sums[0], 127);
  EXPECT_EQ(sums[1], -128 - 128 + 3 + 126 - 128);
  const std::vector<float> beta = {1, 0, 0, 0};
  const std::vector<float> scales = {10, 20, 30, 40};
  kernels.quantize_static(x.data(), beta.data(), scales.data(), true, -3.0f, 4, 1, out.data(), sums);
  EXPECT_EQ(std::vector<int8_t>(out.begin(), out.begin() + 4), (std::vector<int8_t>{12, 27, -18, -103}));
}

TEST_F(ReferenceTest, DynamicQuantisationScalesEachLeaf) {
  const std::vector<float> x = {1.0f, -2.0f, 0.5f, 0, 0, 0};
  std::vector<int8_t> out(8, 99);
  float scales[2];
  int32_t sums[2];
  kernels.quantize_dynamic(x.data(), 6, 2, out.data(), scales, sums);
  EXPECT_EQ(out, (std::vector<int8_t>{64, -127, 32, 0, 0, 0, 0, 0}));
  EXPECT_EQ(scales[0], 2.0f / 127.0f);
  EXPECT_EQ(scales[1], 1e-10f / 127.0f);
  EXPECT_EQ(sums[0], 64 - 127 + 32);
  EXPECT_EQ(sums[1], 0);
  const std::vector<float> bad = {1.0f, std::numeric_limits<float>::quiet_NaN(), 2.0f};
  kernels.quantize_dynamic(bad.data(), 3, 1, out.data(), scales, sums);
  EXPECT_TRUE(std::isnan(scales[0]));
  EXPECT_EQ(out[0], -127);
}

TEST_F(ReferenceTest, SiluSigmoidRopeAndMax) {
  RandomStream random(6);
  for (int i = 0; i < 1000; ++i) {
    const Bf16 gate = ToBf16(Normal(random) * 10);
    const Bf16 up = ToBf16(Normal(random));
    const float x = ToFloat(gate);
    float out = 0;
    kernels.silu_mul(&gate, &up, 1, &out);
    const double exact = x / (1 + std::exp(-double{x})) * ToFloat(up);
    ASSERT_NEAR(out, exact, std::abs(exact) * 1e-6 + 1e-30);
    kernels.sigmoid(&x, 1, &out);
    ASSERT_NEAR(out, 1 / (1 + std::exp(-double{x})), 1e-7);
  }
  const Bf16 pair[2] = {ToBf16(3.0f), ToBf16(5.0f)};
  const float cos = 0.5f;
  const float sin = 2.0f;
  Bf16 turned[2];
  kernels.rope(pair, &cos, &sin, 2, turned);
  EXPECT_EQ(ToFloat(turned[0]), 3 * 0.5f - 5 * 2.0f);
  EXPECT_EQ(ToFloat(turned[1]), 3 * 2.0f + 5 * 0.5f);

  const float infinity = std::numeric_limits<float>::infinity();
  const std::vector<float> row = {-infinity, -3.0f, std::numeric_limits<float>::quiet_NaN(), -1.0f};
  float block_max = 0;
  RowRange range = kernels.range(row.data(), 4, &block_max);
  EXPECT_EQ(range.max, -1.0f);
  EXPECT_EQ(range.min, -infinity);
  EXPECT_EQ(block_max, -1.0f);
  EXPECT_FALSE(range.finite);
  range = kernels.range(row.data(), 2, &block_max);
  EXPECT_EQ(range.max, -3.0f);
  EXPECT_TRUE(range.finite);
  EXPECT_EQ(kernels.range(row.data(), 0, nullptr).max, -infinity);
  const std::vector<float> zeros = {-0.0f, -0.0f};
  EXPECT_EQ(Bits(kernels.range(zeros.data(), 2, &block_max).max), 0u);
  const float ordered[] = {3, 1, 2};
  int32_t ids[3 + 16];
  EXPECT_EQ(kernels.select(ordered, 3, 1.0f, 3.0f, 10, ids), 2);
  EXPECT_EQ(ids[0], 11);
  EXPECT_EQ(ids[1], 12);
}

TEST_F(ReferenceTest, ExpSumTakesMaskedLogits) {
  const std::vector<float> row = {0.0f, -std::numeric_limits<float>::infinity(), 1.0f};
  std::vector<float> out(3);
  EXPECT_NEAR(kernels.exp_sum(row.data(), 3, 1.0f, 1.0f, out.data()), std::exp(-1.0) + 1, 1e-6);
  EXPECT_EQ(Bits(out[1]), 0u);
}

TEST_F(ReferenceTest, AddFixedRoundsOnceFromSixtyFourBits) {
  // Just above a tie of fp32 that decides a tie of bf16: through double the last bit is lost and both go
  // down.
  const int64_t sums[3] = {(int64_t{1} << 54) + (int64_t{1} << 46) + (int64_t{1} << 30) + 1,
                           -(int64_t{1} << 28), 0};
  float residual[3] = {0, 10, -0.0f};
  kernels.add_fixed(sums, 3, residual);
  EXPECT_EQ(residual[0], 0x1p26f + 0x1p19f);
  EXPECT_EQ(residual[1], 9.0f);
  EXPECT_EQ(residual[2], 0.0f);
}

TEST_F(ReferenceTest, Int8ProductsAreExact) {
  RandomStream random(7);
  const int num_rows = 3;
  const int num_outputs = 37;
  const int k = 29;
  Int8Weight weight(random, num_outputs, 1, k);
  Int8Input input(random, num_rows, 1, k, true);
  const std::vector<float> scale = NormalFloats(random, num_outputs, 0.01f);
  std::vector<int32_t> bias(num_outputs);
  for (int32_t& value : bias) value = static_cast<int32_t>(random.Below(20000)) - 10000;
  std::vector<Bf16> fixed(num_rows * num_outputs);
  std::vector<Bf16> dynamic(num_rows * num_outputs);
  kernels.gemm_int8_static(input.view(), weight.shape, {bias.data(), scale.data()}, {num_rows}, 0, 2,
                           fixed.data(), num_outputs);
  kernels.gemm_int8_dynamic(input.view(), weight.shape, scale.data(), {num_rows}, 0, 2, dynamic.data(),
                            num_outputs);
  for (int row = 0; row < num_rows; ++row) {
    for (int n = 0; n < num_outputs; ++n) {
      int64_t acc = 0;
      for (int i = 0; i < k; ++i) acc += input.data[row * input.stride + i] * weight.values[n * k + i];
      EXPECT_EQ(fixed[row * num_outputs + n].bits, ToBf16(static_cast<float>(acc + bias[n]) * scale[n]).bits);
      const float factor = input.scales[row] * scale[n];
      EXPECT_EQ(dynamic[row * num_outputs + n].bits, ToBf16(static_cast<float>(acc) * factor).bits);
    }
  }
}

TEST_F(ReferenceTest, FixedPointTermsAreTheRoundedLeafValues) {
  RandomStream random(8);
  const int num_outputs = 5;
  const int leaf_k = 6;
  Int8Weight weight(random, num_outputs, kNumLeaves, leaf_k);
  Int8Input input(random, 1, kNumLeaves, leaf_k, false);
  const std::vector<float> scale = NormalFloats(random, num_outputs, 0.01f);
  const float row_weight = 0.3f;
  std::vector<int64_t> sums(num_outputs, 7);
  uint8_t out_of_range = 0;
  kernels.gemm_int8_dynamic_fixed(input.view(), weight.shape, scale.data(), &row_weight, {1}, 0, 1,
                                  {sums.data(), num_outputs, &out_of_range});
  for (int n = 0; n < num_outputs; ++n) {
    int64_t expected = 7;
    for (int leaf = 0; leaf < kNumLeaves; ++leaf) {
      int acc = 0;
      for (int i = 0; i < leaf_k; ++i) {
        acc += input.data[leaf * input.leaf_pad + i] * weight.values[(n * kNumLeaves + leaf) * leaf_k + i];
      }
      const float c = ((row_weight * input.scales[leaf]) * scale[n]) * static_cast<float>(acc);
      expected += std::llrint(std::ldexp(static_cast<double>(c), 28));
    }
    EXPECT_EQ(sums[n], expected);
  }
  EXPECT_EQ(out_of_range, 0);
}

TEST_F(ReferenceTest, TermsOutOfRangeAddNothingAndAreSeen) {
  RandomStream random(9);
  Bf16Weight weight(random, 3, 1, 2);
  weight.values = {ToBf16(1), ToBf16(0), ToBf16(0x1p27f), ToBf16(0), ToBf16(NAN), ToBf16(0)};
  weight.Pack();
  const std::vector<Bf16> x = {ToBf16(1), ToBf16(0)};
  std::vector<int64_t> sums(3, 5);
  uint8_t out_of_range = 0;
  kernels.gemm_bf16_fixed({x.data(), 2}, weight.shape, nullptr, {1}, 0, 1, {sums.data(), 3, &out_of_range});
  EXPECT_EQ(sums, (std::vector<int64_t>{5 + (int64_t{1} << 28), 5, 5}));
  EXPECT_EQ(out_of_range, 1);
}

TEST_F(ReferenceTest, PairChainTakesTheOddElementFirst) {
  RandomStream random(10);
  const int num_outputs = 19;
  const int k = 33;
  Bf16Weight weight(random, num_outputs, 1, k);
  Bf16Input input(random, 2, 1, k);
  std::vector<float> out(2 * num_outputs);
  kernels.gemm_bf16_float(input.view(), weight.shape, {2}, 0, 2, out.data(), num_outputs);
  for (int row = 0; row < 2; ++row) {
    for (int n = 0; n < num_outputs; ++n) {
      float acc = 0;
      for (int i = 0; i < k; i += 2) {
        const auto term = [&](int j) {
          if (j < k)
            acc =
                std::fma(ToFloat(input.data[row * input.stride + j]), ToFloat(weight.values[n * k + j]), acc);
        };
        term(i + 1);
        term(i);
      }
      EXPECT_EQ(Bits(out[row * num_outputs + n]), Bits(acc));
    }
  }
}

TEST_F(ReferenceTest, RowMapsGatherAndScatter) {
  RandomStream random(11);
  Bf16Weight weight(random, 4, 1, 4);
  Bf16Input input(random, 3, 1, 4);
  std::vector<float> plain(3 * 4);
  std::vector<float> mapped(3 * 4, -1.0f);
  kernels.gemm_bf16_float(input.view(), weight.shape, {3}, 0, 1, plain.data(), 4);
  const std::vector<int32_t> in_rows = {2, 0};
  const std::vector<int32_t> out_rows = {0, 2};
  kernels.gemm_bf16_float(input.view(), weight.shape, {2, in_rows.data(), out_rows.data()}, 0, 1,
                          mapped.data(), 4);
  for (int n = 0; n < 4; ++n) {
    EXPECT_EQ(mapped[n], plain[2 * 4 + n]);
    EXPECT_EQ(mapped[4 + n], -1.0f);
    EXPECT_EQ(mapped[8 + n], plain[n]);
  }
}

TEST_F(ReferenceTest, AttentionIsSoftmaxOverVisiblePositions) {
  RandomStream random(12);
  const int latent = 12;
  const int rope = 4;
  const int width = latent + rope;
  const std::vector<int> visible = {1, 2, 3, 511, 512, 513, 1024, 1100};
  const int num_rows = static_cast<int>(visible.size());
  const int block_size = 16;
  std::vector<int32_t> block_ids(1104 / block_size);
  for (size_t i = 0; i < block_ids.size(); ++i)
    block_ids[i] = static_cast<int32_t>((i * 5) % block_ids.size());
  const std::vector<Bf16> cache = NormalBf16(random, 1104 * 32);
  const std::vector<Bf16> queries = NormalBf16(random, num_rows * width);
  AttentionTile tile = {.queries = {queries.data(), width},
                        .num_rows = num_rows,
                        .num_visible = visible.data(),
                        .pages = {cache.data(), block_ids.data(), block_size, block_size * 32, 32},
                        .key_width = width,
                        .value_width = latent,
                        .softmax_scale = 0.7f};
  Aligned<std::byte> scratch(AttentionScratchBytes(width, latent));
  std::vector<Bf16> out(num_rows * latent);
  uint64_t bad_rows = 1;
  EXPECT_TRUE(kernels.attention(tile, scratch.data(), out.data(), latent, &bad_rows));
  EXPECT_EQ(bad_rows, 0u);
  for (int row = 0; row < num_rows; ++row) {
    std::vector<double> sum(latent);
    double total = 0;
    for (int t = 0; t < visible[row]; ++t) {
      const Bf16* key = &cache[(block_ids[t / block_size] * block_size + t % block_size) * 32];
      double score = 0;
      for (int i = 0; i < width; ++i) score += double{ToFloat(queries[row * width + i])} * ToFloat(key[i]);
      const double p = std::exp(score * 0.7 - 20);
      total += p;
      for (int d = 0; d < latent; ++d) sum[d] += p * ToFloat(key[d]);
    }
    for (int d = 0; d < latent; ++d) ASSERT_NEAR(ToFloat(out[row * latent + d]), sum[d] / total, 0.02) << row;
  }
}

}  // namespace
}  // namespace tessera::kernels
