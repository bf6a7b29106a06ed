// Matrix products of every instruction set against the reference: equal bits for odd shapes, row maps, leaves
// of any size, extreme values; and nothing written outside the outputs asked for.
#include "kernels/kernels_testing.h"

namespace tessera::kernels {
namespace {

class GemmTest : public KernelTest {};
INSTANTIATE_TEST_SUITE_P(Isa, GemmTest, ::testing::ValuesIn(VectorIsas()), IsaTestName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(GemmTest);

// A product: rows of a call, whether they are gathered and scattered, outputs, and the panels computed (a
// hole at either end where there are several).
struct Shape {
  int num_rows;
  int num_outputs;
  int leaf_k;
  bool mapped;
};
constexpr Shape kShapes[] = {
    {0, 32, 8, false},   {1, 1, 1, false},   {1, 31, 2, true},      {1, 200, 64, false},
    {2, 33, 3, false},   {3, 64, 129, true}, {4, 96, 40, false},    {5, 40, 7, true},
    {6, 16, 5, false},   {7, 17, 8, true},   {8, 130, 30, false},   {9, 48, 12, true},
    {13, 70, 11, false}, {15, 15, 33, true}, {16, 64, 100, false},  {23, 65, 34, true},
    {33, 50, 17, false}, {64, 36, 6, true},  {3, 160, 4001, false}, {20, 96, 4001, false}};

// Inputs drawn from twice as many rows, outputs scattered over twice as many.
struct Map {
  Map(RandomStream& random, const Shape& shape) : rows{.count = shape.num_rows}, num_rows(shape.num_rows) {
    if (!shape.mapped) return;
    num_rows = shape.num_rows * 2;
    for (int i = 0; i < shape.num_rows; ++i) {
      in_rows.push_back(static_cast<int32_t>(random.Below(num_rows)));
      out_rows.push_back(2 * i + static_cast<int32_t>(random.Below(2)));
    }
    for (int i = shape.num_rows - 1; i > 0; --i) std::swap(out_rows[i], out_rows[random.Below(i + 1)]);
    rows.in_rows = in_rows.data();
    rows.out_rows = out_rows.data();
  }
  RowMap rows;
  int num_rows;  // of inputs and outputs
  std::vector<int32_t> in_rows;
  std::vector<int32_t> out_rows;
};

// Outputs with a gap between rows, all canaries at first.
template <typename T>
struct Outputs {
  Outputs(int num_rows, int num_outputs, T canary)
      : stride(num_outputs + 7), values((num_rows + 1) * stride, canary) {}
  T* data() { return values.data(); }
  int64_t stride;
  std::vector<T> values;
};

void ExpectSame(const Outputs<Bf16>& a, const Outputs<Bf16>& b) {
  for (size_t i = 0; i < a.values.size(); ++i) {
    ASSERT_TRUE(SameBf16(a.values[i], b.values[i]))
        << i << ": " << a.values[i].bits << " " << b.values[i].bits;
  }
}
void ExpectSame(const Outputs<float>& a, const Outputs<float>& b) {
  for (size_t i = 0; i < a.values.size(); ++i) {
    ASSERT_TRUE(SameFloat(a.values[i], b.values[i])) << i << ": " << a.values[i] << " " << b.values[i];
  }
}

struct FixedOutputs {
  FixedOutputs(int num_rows, int num_outputs, RandomStream random)
      : sums(num_rows, num_outputs, 0), out_of_range(num_rows + 1, 0) {
    for (int64_t& sum : sums.values) sum = static_cast<int64_t>(random.Next64()) >> 8;
  }
  FixedRows view() { return {sums.data(), sums.stride, out_of_range.data()}; }
  Outputs<int64_t> sums;
  std::vector<uint8_t> out_of_range;
};
void ExpectSame(const FixedOutputs& a, const FixedOutputs& b) {
  ASSERT_EQ(a.sums.values, b.sums.values);
  ASSERT_EQ(a.out_of_range, b.out_of_range);
}

// Panel ranges of a weight: all, and an inner part where there is one.
std::vector<std::pair<int, int>> PanelRanges(int num_panels) {
  std::vector<std::pair<int, int>> ranges = {{0, num_panels}};
  if (num_panels > 1) ranges.push_back({1, num_panels});
  if (num_panels > 2) ranges.push_back({1, num_panels - 1});
  return ranges;
}

std::vector<int32_t> QuantBias(RandomStream& random, int n) {
  std::vector<int32_t> bias(n);
  for (int32_t& value : bias) value = static_cast<int32_t>(random.Next32()) >> (4 + random.Below(20));
  return bias;
}

TEST_P(GemmTest, Int8ToBf16) {
  RandomStream random(30);
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(Format("{} rows, {} outputs, K {}", shape.num_rows, shape.num_outputs, shape.leaf_k));
    const Map map(random, shape);
    Int8Weight weight(random, shape.num_outputs, 1, shape.leaf_k);
    Int8Input input(random, map.num_rows, 1, shape.leaf_k, true);
    const std::vector<float> scale = NormalFloats(random, shape.num_outputs, 0.02f);
    const std::vector<int32_t> bias = QuantBias(random, shape.num_outputs);
    const StaticScales scales = {bias.data(), scale.data()};
    for (const auto& [begin, end] : PanelRanges(weight.shape.num_panels())) {
      Outputs<Bf16> a(map.num_rows, shape.num_outputs, Bf16{0x4321}), b = a;
      Reference().gemm_int8_static(input.view(), weight.shape, scales, map.rows, begin, end, a.data(),
                                   a.stride);
      kernels().gemm_int8_static(input.view(), weight.shape, scales, map.rows, begin, end, b.data(),
                                 b.stride);
      ExpectSame(a, b);
      Reference().gemm_int8_dynamic(input.view(), weight.shape, scale.data(), map.rows, begin, end, a.data(),
                                    a.stride);
      kernels().gemm_int8_dynamic(input.view(), weight.shape, scale.data(), map.rows, begin, end, b.data(),
                                  b.stride);
      ExpectSame(a, b);
    }
  }
}

TEST_P(GemmTest, Int8Extremes) {
  // Every product at its limit: -128 x -128, -128 x 127, over a long K.
  RandomStream random(31);
  const int k = 18432;
  for (const int activation : {-128, 127}) {
    Int8Weight weight(random, 40, 1, k);
    for (size_t i = 0; i < weight.values.size(); ++i) weight.values[i] = i / k % 2 == 0 ? -128 : 127;
    PackInt8(weight.values.data(), k, weight.shape, 0, 2, weight.packed.data());
    Int8Input input(random, 3, 1, k, true);
    std::fill(input.data.begin(), input.data.end(), static_cast<int8_t>(activation));
    for (int32_t& sum : input.sums) sum = activation * k;
    const std::vector<float> scale(40, 1.0f);
    Outputs<Bf16> a(3, 40, Bf16{0x4321}), b = a;
    Reference().gemm_int8_dynamic(input.view(), weight.shape, scale.data(), {3}, 0, 2, a.data(), a.stride);
    kernels().gemm_int8_dynamic(input.view(), weight.shape, scale.data(), {3}, 0, 2, b.data(), b.stride);
    ExpectSame(a, b);
  }
}

TEST_P(GemmTest, Int8Fixed) {
  RandomStream random(32);
  for (const Shape& shape : kShapes) {
    for (const int num_leaves : {16, 1, 5}) {
      if (shape.leaf_k > 1000 && num_leaves > 1) continue;
      SCOPED_TRACE(Format("{} rows, {} outputs, leaf {}", shape.num_rows, shape.num_outputs, shape.leaf_k));
      const Map map(random, shape);
      Int8Weight weight(random, shape.num_outputs, num_leaves, shape.leaf_k);
      Int8Input input(random, map.num_rows, num_leaves, shape.leaf_k, true);
      const float size = std::exp2(static_cast<float>(random.Below(24)) - 14.0f);  // terms up to the limit
      const std::vector<float> scale = NormalFloats(random, shape.num_outputs, size);
      const std::vector<float> row_weight = NormalFloats(random, shape.num_rows);
      const float* weights = random.Below(2) != 0 ? row_weight.data() : nullptr;
      const std::vector<int32_t> bias = QuantBias(random, shape.num_outputs);
      const StaticScales scales = {bias.data(), scale.data()};
      for (const auto& [begin, end] : PanelRanges(weight.shape.num_panels())) {
        FixedOutputs a(map.num_rows, shape.num_outputs, RandomStream(1)), b = a;
        Reference().gemm_int8_dynamic_fixed(input.view(), weight.shape, scale.data(), weights, map.rows,
                                            begin, end, a.view());
        kernels().gemm_int8_dynamic_fixed(input.view(), weight.shape, scale.data(), weights, map.rows, begin,
                                          end, b.view());
        ExpectSame(a, b);
        Reference().gemm_int8_static_fixed(input.view(), weight.shape, scales, weights, map.rows, begin, end,
                                           a.view());
        kernels().gemm_int8_static_fixed(input.view(), weight.shape, scales, weights, map.rows, begin, end,
                                         b.view());
        ExpectSame(a, b);
      }
    }
  }
}

TEST_P(GemmTest, Bf16ToBf16AndFloat) {
  RandomStream random(33);
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(Format("{} rows, {} outputs, K {}", shape.num_rows, shape.num_outputs, shape.leaf_k));
    const Map map(random, shape);
    Bf16Weight weight(random, shape.num_outputs, 1, shape.leaf_k);
    Bf16Input input(random, map.num_rows, 1, shape.leaf_k);
    for (const auto& [begin, end] : PanelRanges(weight.shape.num_panels())) {
      Outputs<Bf16> a(map.num_rows, shape.num_outputs, Bf16{0x4321}), b = a;
      Reference().gemm_bf16(input.view(), weight.shape, map.rows, begin, end, a.data(), a.stride);
      kernels().gemm_bf16(input.view(), weight.shape, map.rows, begin, end, b.data(), b.stride);
      ExpectSame(a, b);
      Outputs<float> c(map.num_rows, shape.num_outputs, 4.25f), d = c;
      Reference().gemm_bf16_float(input.view(), weight.shape, map.rows, begin, end, c.data(), c.stride);
      kernels().gemm_bf16_float(input.view(), weight.shape, map.rows, begin, end, d.data(), d.stride);
      ExpectSame(c, d);
    }
  }
}

TEST_P(GemmTest, Bf16OfAnyBits) {
  // Denormals, infinities, NaN, cancellation, underflow to zero of either sign.
  RandomStream random(34);
  for (int trial = 0; trial < 40; ++trial) {
    const int k = 1 + static_cast<int>(random.Below(12));
    Bf16Weight weight(random, 48, 1, k);
    Bf16Input input(random, 9, 1, k);
    const uint32_t mask = trial % 2 == 0 ? 0xffff : 0x8fff;  // any, or tiny: products underflow
    for (Bf16& value : weight.values) value.bits = static_cast<uint16_t>(random.Next32() & mask);
    weight.Pack();
    for (int row = 0; row < 9; ++row) {
      for (int i = 0; i < k; ++i) {
        input.data[row * input.stride + i].bits =
            static_cast<uint16_t>(random.Next32() & (trial % 4 < 2 ? mask : 0xffff));
      }
    }
    Outputs<float> a(9, 48, 4.25f), b = a;
    Reference().gemm_bf16_float(input.view(), weight.shape, {9}, 0, 3, a.data(), a.stride);
    kernels().gemm_bf16_float(input.view(), weight.shape, {9}, 0, 3, b.data(), b.stride);
    ExpectSame(a, b);
    FixedOutputs c(9, 48, RandomStream(2)), d = c;
    Reference().gemm_bf16_fixed(input.view(), weight.shape, nullptr, {9}, 0, 3, c.view());
    kernels().gemm_bf16_fixed(input.view(), weight.shape, nullptr, {9}, 0, 3, d.view());
    ExpectSame(c, d);
  }
}

TEST_P(GemmTest, Bf16Fixed) {
  RandomStream random(35);
  for (const Shape& shape : kShapes) {
    for (const int num_leaves : {16, 1}) {
      if (shape.leaf_k > 1000 && num_leaves > 1) continue;
      const Map map(random, shape);
      const float size = std::exp2(static_cast<float>(random.Below(40)) - 14.0f);
      Bf16Weight weight(random, shape.num_outputs, num_leaves, shape.leaf_k, size);
      Bf16Input input(random, map.num_rows, num_leaves, shape.leaf_k);
      const std::vector<float> row_weight = NormalFloats(random, shape.num_rows);
      for (const auto& [begin, end] : PanelRanges(weight.shape.num_panels())) {
        FixedOutputs a(map.num_rows, shape.num_outputs, RandomStream(3)), b = a;
        Reference().gemm_bf16_fixed(input.view(), weight.shape, row_weight.data(), map.rows, begin, end,
                                    a.view());
        kernels().gemm_bf16_fixed(input.view(), weight.shape, row_weight.data(), map.rows, begin, end,
                                  b.view());
        ExpectSame(a, b);
      }
    }
  }
}

TEST_P(GemmTest, FixedPointRoundsTiesAndLargeTerms) {
  // Products whose leaf values, all leaves alike, are chosen: ties of 2^-29, alone and beside steps of 2^-6,
  // and values around 1/2, 2^16 and 2^22 (where a vector set changes its way) and around the limit. Each
  // value of `large` stands alone in a whole panel of `small` ones, and `half` ones in one of `least` ones;
  // then all stand in a panel that is not whole.
  const std::vector<float> small = {
      0x1p-29f,        0x3p-29f,        -0x1p-29f,      0x1.8p-28f,      0x1p-7f,
      -0x1p-7f,        0x3p-7f,         0x5p-7f,        0x1.fffffep-8f,  0x1.000002p-7f,
      -0x1.000002p-7f, 0x1.000006p-6f,  0x1.00002p-1f,  0x1.01p-6f,      -0x1.01p-6f,
      0x1.fffffep15f,  -0x1.fffffep15f, 0x1.fffff8p5f,  0x1p-100f,       -0x1.234567p-3f,
      0x1.abcdep5f,    0x1.777778p-29f, 0.0f,           -0.0f,           0x1.000004p-5f,
      0x1.00000cp-5f,  0x1.800002p-6f,  0x1.7ffffep-6f, -0x1.800002p-6f, 0x1.5p15f,
      0x1.555556p-1f,  -0x1p15f};
  ASSERT_EQ(small.size(), 32u);
  const std::vector<float> large = {
      0x1p16f,        -0x1p16f,        0x1.fffffep21f, 0x1p22f,        -0x1p22f, 0x1.000002p22f, -0x1.8p25f,
      0x1.fffffep26f, -0x1.fffffep26f, 0x1p27f,        0x1.000002p27f, -0x1p40f, INFINITY,       -NAN};
  const std::vector<float> least = {0x1p-29f,       0x3p-29f,        -0x1p-29f,       0x1.8p-28f,
                                    0x1.fffffep-2f, -0x1.fffffep-2f, 0x1.fffffcp-2f,  0x1p-2f,
                                    -0x1p-2f,       0x1p-7f,         -0x1p-7f,        0x3p-7f,
                                    0x1.fffffep-8f, 0x1.000002p-7f,  0x1.01p-6f,      -0x1.01p-6f,
                                    0x1p-100f,      -0x1.234567p-3f, 0x1.777778p-29f, 0.0f,
                                    -0.0f,          0x1.000004p-5f,  0x1.00000cp-5f,  0x1.800002p-6f,
                                    0x1.7ffffep-6f, -0x1.800002p-6f, 0x1.555556p-2f,  0x1.5p-3f,
                                    0x1.abcdep-4f,  -0x1.abcdep-9f,  0x1.8p-29f,      -0x1.8p-29f};
  ASSERT_EQ(least.size(), 32u);
  const std::vector<float> half = {0x1p-1f, -0x1p-1f, 0x1.000002p-1f, 0x1p16f, 0x1p27f, NAN};
  std::vector<std::vector<float>> cases = {small, large, least};
  for (const float value : half) {
    cases.push_back(least);
    cases.back()[cases.size() % 32] = value;
  }
  for (const float value : large) {
    cases.push_back(small);
    cases.back()[cases.size() % 32] = value;
  }
  for (const std::vector<float>& values : cases) {
    for (const int num_leaves : {1, 16}) {
      const int n = static_cast<int>(values.size());
      PackedInt8 shape = {.num_outputs = n, .num_leaves = num_leaves, .leaf_k = 1};
      Aligned<uint8_t> packed(shape.size_bytes());
      const std::vector<int8_t> ones(n * num_leaves, 1);
      PackInt8(ones.data(), num_leaves, shape, 0, 1, packed.data());
      shape.panels = packed.data();
      std::vector<int8_t> x(4 * num_leaves, 0);
      for (int leaf = 0; leaf < num_leaves; ++leaf) x[leaf * 4] = 1;
      const std::vector<float> scales(num_leaves, 1.0f);
      const std::vector<int32_t> sums(num_leaves, 1);
      const Int8Rows in = {x.data(), 4 * num_leaves, scales.data(), sums.data()};
      FixedOutputs a(1, n, RandomStream(4)), b = a;
      Reference().gemm_int8_dynamic_fixed(in, shape, values.data(), nullptr, {1}, 0, 1, a.view());
      kernels().gemm_int8_dynamic_fixed(in, shape, values.data(), nullptr, {1}, 0, 1, b.view());
      ExpectSame(a, b);
    }
  }
}

TEST_P(GemmTest, TermsOutOfRangeAreSeenInTheirRows) {
  RandomStream random(37);
  constexpr int kRows = 11;
  constexpr int kOutputs = 40;  // a panel that is whole, and one that is not
  Int8Weight weight(random, kOutputs, kNumLeaves, 4);
  const std::vector<float> scale(kOutputs, 1.0f);
  for (const float bad : {0x1p40f, NAN}) {
    for (int bad_row = 0; bad_row < kRows; ++bad_row) {
      Int8Input input(random, kRows, kNumLeaves, 4, false);
      input.scales[bad_row * kNumLeaves + 5] = bad;
      FixedOutputs a(kRows, kOutputs, RandomStream(5)), b = a;
      const int other = (bad_row + 4) % kRows;
      a.out_of_range[other] = b.out_of_range[other] = 1;  // of an earlier product
      Reference().gemm_int8_dynamic_fixed(input.view(), weight.shape, scale.data(), nullptr, {kRows}, 0, 2,
                                          a.view());
      kernels().gemm_int8_dynamic_fixed(input.view(), weight.shape, scale.data(), nullptr, {kRows}, 0, 2,
                                        b.view());
      ExpectSame(a, b);
      for (int row = 0; row < kRows; ++row) {
        EXPECT_EQ(b.out_of_range[row], row == bad_row || row == other) << row << " " << bad_row;
      }
    }
  }
}

TEST_P(GemmTest, FloatChain) {
  RandomStream random(36);
  for (const Shape& shape : kShapes) {
    const std::vector<float> values = NormalFloats(random, shape.num_outputs * shape.leaf_k);
    PackedFloat weight = {.num_outputs = shape.num_outputs, .k = shape.leaf_k};
    Aligned<float> packed(weight.size_bytes() / 4);
    PackFloat(values.data(), shape.leaf_k, weight, packed.data());
    weight.panels = packed.data();
    const std::vector<float> in = NormalFloats(random, shape.num_rows * (shape.leaf_k + 1));
    for (const auto& [begin, end] : PanelRanges(weight.num_panels())) {
      Outputs<float> a(shape.num_rows, shape.num_outputs, 4.25f), b = a;
      Reference().gemm_float(in.data(), shape.leaf_k + 1, weight, shape.num_rows, begin, end, a.data(),
                             a.stride);
      kernels().gemm_float(in.data(), shape.leaf_k + 1, weight, shape.num_rows, begin, end, b.data(),
                           b.stride);
      ExpectSame(a, b);
    }
  }
}

}  // namespace
}  // namespace tessera::kernels
