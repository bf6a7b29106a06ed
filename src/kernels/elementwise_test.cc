// Row functions of every instruction set against the reference: equal bits on ordinary and extreme values,
// odd lengths, and nothing written beyond the row.
#include "kernels/kernels_testing.h"

namespace tessera::kernels {
namespace {

class ElementwiseTest : public KernelTest {};
INSTANTIATE_TEST_SUITE_P(Isa, ElementwiseTest, ::testing::ValuesIn(VectorIsas()), IsaTestName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(ElementwiseTest);

constexpr int kLengths[] = {0,  1,  2,  3,  5,  7,   8,   9,   15,  16,  17,
                            31, 33, 63, 64, 65, 100, 127, 128, 129, 255, 777};
constexpr int kCanary = 19;  // values after a row that must stay

std::vector<float> AnyFloats(RandomStream& random, int n, bool non_finite) {
  std::vector<float> values(n);
  for (float& value : values) value = AnyFloat(random, non_finite);
  return values;
}

// Rows of the same length as the reference's, plus canaries.
void ExpectSame(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    ASSERT_TRUE(SameFloat(a[i], b[i])) << i << ": " << a[i] << " " << b[i];
}
void ExpectSame(const std::vector<Bf16>& a, const std::vector<Bf16>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    ASSERT_TRUE(SameBf16(a[i], b[i])) << i << ": " << a[i].bits << " " << b[i].bits;
}

TEST_P(ElementwiseTest, RmsNorm) {
  RandomStream random(20);
  for (const int n : kLengths) {
    for (int trial = 0; trial < 8; ++trial) {
      if (n == 0) continue;
      const std::vector<float> x =
          trial < 4 ? NormalFloats(random, n, trial + 0.1f) : AnyFloats(random, n, trial > 5);
      const std::vector<float> weight = NormalFloats(random, n);
      std::vector<float> a(n + kCanary, 42.0f), b = a;
      const bool expected = Reference().rms_norm(x.data(), weight.data(), n, 1e-6f, a.data());
      EXPECT_EQ(kernels().rms_norm(x.data(), weight.data(), n, 1e-6f, b.data()), expected);
      ExpectSame(a, b);
    }
  }
}

TEST_P(ElementwiseTest, QuantizeStatic) {
  RandomStream random(21);
  for (const int leaf_k : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 130}) {
    for (const int num_leaves : {1, 2, 16}) {
      for (int trial = 0; trial < 4; ++trial) {
        const int n = leaf_k * num_leaves;
        const std::vector<float> x = AnyFloats(random, n, trial > 1);
        const std::vector<float> beta = NormalFloats(random, n);
        const std::vector<float> scale =
            trial % 2 == 0 ? std::vector<float>(n, 1.0f) : NormalFloats(random, n, 50.0f);
        std::vector<int8_t> a(num_leaves * ((leaf_k + 3) / 4 * 4) + kCanary, 77), b = a;
        std::vector<int32_t> sums_a(num_leaves + 1, 5), sums_b = sums_a;
        const float* maybe_beta = trial == 1 ? beta.data() : nullptr;
        const float zero_point = static_cast<float>(static_cast<int>(random.Below(40)) - 20);
        Reference().quantize_static(x.data(), maybe_beta, scale.data(), trial == 3, zero_point, n, num_leaves,
                                    a.data(), sums_a.data());
        kernels().quantize_static(x.data(), maybe_beta, scale.data(), trial == 3, zero_point, n, num_leaves,
                                  b.data(), sums_b.data());
        ASSERT_EQ(a, b);
        ASSERT_EQ(sums_a, sums_b);
      }
    }
  }
}

TEST_P(ElementwiseTest, QuantizeDynamic) {
  RandomStream random(22);
  for (const int leaf_k : {1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 64, 130}) {
    for (const int num_leaves : {1, 2, 16}) {
      for (int trial = 0; trial < 6; ++trial) {
        const int n = leaf_k * num_leaves;
        const std::vector<float> x = trial < 2   ? NormalFloats(random, n, trial == 0 ? 3.0f : 1e-12f)
                                     : trial < 4 ? AnyFloats(random, n, false)
                                                 : AnyFloats(random, n, true);
        std::vector<int8_t> a(num_leaves * ((leaf_k + 3) / 4 * 4) + kCanary, 77), b = a;
        std::vector<int32_t> sums_a(num_leaves + 1, 5), sums_b = sums_a;
        std::vector<float> scales_a(num_leaves + 1, 5.0f), scales_b = scales_a;
        Reference().quantize_dynamic(x.data(), n, num_leaves, a.data(), scales_a.data(), sums_a.data());
        kernels().quantize_dynamic(x.data(), n, num_leaves, b.data(), scales_b.data(), sums_b.data());
        ASSERT_EQ(a, b);
        ASSERT_EQ(sums_a, sums_b);
        ExpectSame(scales_a, scales_b);
      }
    }
  }
}

TEST_P(ElementwiseTest, QuantizeRoundsExactTiesToEven) {
  std::vector<float> x;
  for (int i = -260; i <= 260; ++i) x.push_back(static_cast<float>(i) * 0.5f);
  const int n = static_cast<int>(x.size());
  const float scale = 1.0f;
  std::vector<int8_t> a(n + 4), b(n + 4);
  int32_t sum_a = 0, sum_b = 0;
  for (const float zero_point : {0.0f, -128.0f, 13.0f}) {
    Reference().quantize_static(x.data(), nullptr, &scale, false, zero_point, n, 1, a.data(), &sum_a);
    kernels().quantize_static(x.data(), nullptr, &scale, false, zero_point, n, 1, b.data(), &sum_b);
    ASSERT_EQ(a, b);
    ASSERT_EQ(sum_a, sum_b);
  }
}

TEST_P(ElementwiseTest, Conversions) {
  RandomStream random(23);
  for (const int n : kLengths) {
    const std::vector<float> x = AnyFloats(random, n, true);
    std::vector<Bf16> a(n + kCanary, Bf16{0x1234}), b = a;
    Reference().to_bf16(x.data(), n, a.data());
    kernels().to_bf16(x.data(), n, b.data());
    ExpectSame(a, b);
    std::vector<float> wide_a(n + kCanary, 3.0f), wide_b = wide_a;
    std::vector<Bf16> any(n);
    for (Bf16& value : any) value.bits = static_cast<uint16_t>(random.Next32());
    Reference().to_float(any.data(), n, wide_a.data());
    kernels().to_float(any.data(), n, wide_b.data());
    ExpectSame(wide_a, wide_b);
  }
}

TEST_P(ElementwiseTest, EveryHighHalfAroundATieRoundsAlike) {
  std::vector<float> x;
  for (uint32_t high = 0; high < 0x10000; high += 7) {
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      x.push_back(std::bit_cast<float>(high << 16 | low));
    }
  }
  std::vector<Bf16> a(x.size()), b(x.size());
  Reference().to_bf16(x.data(), static_cast<int>(x.size()), a.data());
  kernels().to_bf16(x.data(), static_cast<int>(x.size()), b.data());
  ExpectSame(a, b);
}

TEST_P(ElementwiseTest, SiluMulAndSigmoid) {
  RandomStream random(24);
  for (const int n : kLengths) {
    for (int trial = 0; trial < 6; ++trial) {
      std::vector<Bf16> gate(n), up(n);
      for (int i = 0; i < n; ++i) {
        gate[i] = trial < 3 ? ToBf16(Normal(random) * 40.0f) : Bf16{static_cast<uint16_t>(random.Next32())};
        up[i] = trial < 3 ? ToBf16(Normal(random)) : Bf16{static_cast<uint16_t>(random.Next32())};
      }
      std::vector<float> a(n + kCanary, 3.0f), b = a;
      Reference().silu_mul(gate.data(), up.data(), n, a.data());
      kernels().silu_mul(gate.data(), up.data(), n, b.data());
      ExpectSame(a, b);
      const std::vector<float> x = trial < 3 ? NormalFloats(random, n, 60.0f) : AnyFloats(random, n, true);
      Reference().sigmoid(x.data(), n, a.data());
      kernels().sigmoid(x.data(), n, b.data());
      ExpectSame(a, b);
    }
  }
}

TEST_P(ElementwiseTest, RopeInPlaceToo) {
  RandomStream random(25);
  for (const int n : {0, 2, 4, 6, 14, 16, 18, 32, 34, 64, 66, 128}) {
    const std::vector<float> cos = NormalFloats(random, n / 2);
    const std::vector<float> sin = NormalFloats(random, n / 2);
    std::vector<Bf16> x = NormalBf16(random, n + kCanary);
    if (n > 4) x[3] = Bf16{0x0001};
    std::vector<Bf16> a(n + kCanary, Bf16{0x1234}), b = a;
    Reference().rope(x.data(), cos.data(), sin.data(), n, a.data());
    kernels().rope(x.data(), cos.data(), sin.data(), n, b.data());
    ExpectSame(a, b);
    b = x;
    kernels().rope(b.data(), cos.data(), sin.data(), n, b.data());
    for (int i = 0; i < n; ++i) ASSERT_TRUE(SameBf16(a[i], b[i]));
    for (int i = n; i < n + kCanary; ++i) ASSERT_EQ(b[i].bits, x[i].bits);
  }
}

TEST_P(ElementwiseTest, AddFixed) {
  RandomStream random(26);
  for (const int n : kLengths) {
    std::vector<int64_t> sums(n);
    for (int64_t& sum : sums) sum = static_cast<int64_t>(random.Next64()) >> random.Below(64);
    if (n > 20) {
      // Whole vectors around the size where AVX2 changes its way.
      for (int i = 0; i < 16; ++i) sums[i] = ((int64_t{1} << 51) - 8 + i) * (i % 3 == 0 ? -1 : 1);
      for (int i = 8; i < 16 && n > 100; ++i) sums[i] = static_cast<int64_t>(random.Next64()) >> 14;
    }
    if (n > 2 && n < 20) sums[1] = (int64_t{1} << 54) + (int64_t{1} << 46) + (int64_t{1} << 30) + 1;
    std::vector<float> a = AnyFloats(random, n + kCanary, false), b = a;
    Reference().add_fixed(sums.data(), n, a.data());
    kernels().add_fixed(sums.data(), n, b.data());
    ExpectSame(a, b);
  }
}

TEST_P(ElementwiseTest, Range) {
  RandomStream random(27);
  const float infinity = std::bit_cast<float>(kInfinityBits);
  std::vector<int> lengths(std::begin(kLengths), std::end(kLengths));
  lengths.insert(lengths.end(), {kMaxBlock - 1, kMaxBlock, kMaxBlock + 1, 3 * kMaxBlock + 17});
  for (const int n : lengths) {
    for (int trial = 0; trial < 8; ++trial) {
      std::vector<float> x = AnyFloats(random, n, trial > 5);
      if (trial == 1) x = NormalFloats(random, n, -1.0f);
      if (trial == 2) x.assign(n, -infinity);
      if (trial == 3) x.assign(n, -0.0f);
      if (trial == 4 && n > 0) x[random.Below(n)] = infinity;
      if (trial == 5) {
        for (float& value : x) value = -std::abs(value) - 1.0f;
        if (n > 0) x[random.Below(n)] = -infinity;
      }
      std::vector<float> maxima_a(NumMaxBlocks(n) + kCanary, 3.0f), maxima_b = maxima_a;
      const RowRange a = Reference().range(x.data(), n, maxima_a.data());
      const RowRange b = kernels().range(x.data(), n, maxima_b.data());
      EXPECT_EQ(Bits(a.min), Bits(b.min));
      EXPECT_EQ(Bits(a.max), Bits(b.max));
      EXPECT_EQ(a.finite, b.finite);
      ExpectSame(maxima_a, maxima_b);
    }
  }
}

TEST_P(ElementwiseTest, Select) {
  RandomStream random(29);
  const float infinity = std::bit_cast<float>(kInfinityBits);
  for (const int n : kLengths) {
    for (const float low : {-infinity, -1.0f, 0.0f, 2.0f}) {
      std::vector<float> x = NormalFloats(random, n, 1.5f);
      for (int i = 0; i < n; i += 5) x[i] = low;
      for (int i = 2; i < n; i += 7) x[i] = -0.0f;
      if (n > 0) x[random.Below(n)] = -infinity;
      for (const float high : {low, low + 1.0f, infinity}) {
        std::vector<int32_t> a(n + 16, -7), b = a;
        const int count = Reference().select(x.data(), n, low, high, 1000, a.data());
        ASSERT_EQ(kernels().select(x.data(), n, low, high, 1000, b.data()), count);
        for (int i = 0; i < count; ++i) ASSERT_EQ(a[i], b[i]);
      }
    }
  }
}

TEST_P(ElementwiseTest, ExpSum) {
  RandomStream random(28);
  const float infinity = std::bit_cast<float>(kInfinityBits);
  for (const int n : kLengths) {
    for (int trial = 0; trial < 10; ++trial) {
      std::vector<float> x = NormalFloats(random, n, trial % 5 < 3 ? 5.0f : 100.0f);
      if (trial % 5 == 2 && n > 1) x[random.Below(n)] = -infinity;
      const float divisor = trial < 5 ? 1.0f : 0.7f;
      float shift = 0;
      for (const float value : x) shift = std::max(shift, value / divisor);
      std::vector<float> a(n + kCanary, 3.0f), b = a;
      const float sum_a = Reference().exp_sum(x.data(), n, divisor, shift, a.data());
      const float sum_b = kernels().exp_sum(x.data(), n, divisor, shift, b.data());
      EXPECT_TRUE(SameFloat(sum_a, sum_b)) << sum_a << " " << sum_b;
      ExpectSame(a, b);
      EXPECT_TRUE(SameFloat(kernels().exp_sum(x.data(), n, divisor, shift, nullptr), sum_a));
    }
  }
}

// The worst row is one of equal values, whose errors do not cancel.
TEST_P(ElementwiseTest, NearExpSumIsNear) {
  RandomStream random(31);
  const float infinity = std::bit_cast<float>(kInfinityBits);
  for (const int n : {1, 3, 16, 63, 64, 65, 250, 1000, 129280}) {
    for (int trial = 0; trial < 60; ++trial) {
      const float divisor = std::vector<float>{0x1p-10f, 0.3f, 1, 7}[random.Below(4)];
      const float offset = std::vector<float>{0, -1020, 1015}[random.Below(3)] * divisor;
      std::vector<float> x = NormalFloats(random, n, trial % 3 == 0 ? 0 : 3 * divisor * random.Unit());
      const float step = divisor * random.Unit();
      for (int i = 0; i < n; ++i) x[i] = offset - std::abs(x[i]) - step;
      if (trial % 4 == 1) x[random.Below(n)] = -infinity;
      if (trial % 4 < 3) x[random.Below(n)] = offset;
      const float sum = Reference().exp_sum(x.data(), n, divisor, offset / divisor, nullptr);
      const float near = kernels().near_exp_sum(x.data(), n, divisor, offset / divisor);
      EXPECT_NEAR(sum, near, kNearExpSum * near + 0x1p-100f)
          << n << " " << divisor << " " << offset << " " << step;
    }
  }
}

// exp_sum takes exp of what is not positive, sigmoid of everything.
TEST_P(ElementwiseTest, ExpOverItsWholeRange) {
  std::vector<float> x;
  for (uint32_t bits = 0; bits < 0x43000000u; bits += 40009) x.push_back(-std::bit_cast<float>(bits));
  for (const float edge : {-87.33f, -87.34f, -87.329f}) x.push_back(edge);
  const int n = static_cast<int>(x.size());
  std::vector<float> a(n), b(n);
  Reference().exp_sum(x.data(), n, 1.0f, 0.0f, a.data());
  kernels().exp_sum(x.data(), n, 1.0f, 0.0f, b.data());
  ExpectSame(a, b);
  for (const float edge : {-88.72f, -88.73f, -88.719f}) x.push_back(edge);
  for (size_t i = 0, size = x.size(); i < size; ++i) x.push_back(-x[i]);
  a.resize(x.size());
  b.resize(x.size());
  Reference().sigmoid(x.data(), static_cast<int>(x.size()), a.data());
  kernels().sigmoid(x.data(), static_cast<int>(x.size()), b.data());
  ExpectSame(a, b);
}

}  // namespace
}  // namespace tessera::kernels
