// The choice of a table, packing and bf16 rounding. The kernels themselves: the other *_test.cc of this room.
#include <cmath>

#include "kernels/kernels_testing.h"

namespace tessera::kernels {
namespace {

TEST(Choice, EmptyTakesTheBestOfThisCpu) {
  const auto best = Choose("");
  ASSERT_TRUE(best);
  for (const Isa isa : VectorIsas()) EXPECT_LE(isa, (*best)->isa);
}

TEST(Choice, EveryTableThatRunsIsCompleteAndNamed) {
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    const auto table = Choose(IsaName(isa));
    if (!table) continue;
    EXPECT_EQ((*table)->isa, isa);
    // Every member after `isa` is a function pointer; none may be missing.
    const auto* pointers = reinterpret_cast<const void* const*>(*table);
    for (size_t i = 1; i < sizeof(Kernels) / sizeof(void*); ++i) EXPECT_NE(pointers[i], nullptr) << i;
  }
}

TEST(Choice, UnknownNameIsRefusedWithTheNames) {
  const auto table = Choose("sse9");
  ASSERT_FALSE(table);
  EXPECT_EQ(table.error().kind, ErrorKind::kInvalid);
  EXPECT_NE(table.error().message.find("sse9"), std::string::npos);
  EXPECT_NE(table.error().message.find("avx512bf16"), std::string::npos);
}

TEST(Choice, WhatTheCpuLacksIsRefusedByName) {
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    const auto table = Choose(IsaName(isa));
    if (table) continue;
    EXPECT_EQ(table.error().kind, ErrorKind::kInvalid);
    EXPECT_NE(table.error().message.find(IsaName(isa)), std::string::npos);
    EXPECT_NE(table.error().message.find("lacks"), std::string::npos);
  }
}

TEST(ToBf16, RoundsToNearestEven) {
  EXPECT_EQ(ToBf16(1.0f).bits, 0x3f80);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80);  // tie, to even
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82);  // tie, to even
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x7f7fffffu)).bits, 0x7f80);  // overflows to infinity
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0xff800000u)).bits, 0xff80);
}

TEST(ToBf16, NanStaysNanAndDenormalsFlush) {
  EXPECT_TRUE(std::isnan(ToFloat(ToBf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0xff800001u)).bits, 0xffc0);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x007fffffu)).bits, 0x0000);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x80700000u)).bits, 0x8000);
  EXPECT_EQ(ToBf16(std::bit_cast<float>(0x00800000u)).bits, 0x0080);
}

TEST(Pack, Int8PanelsHoldBiasedQuadsOfEachLeaf) {
  const int num_outputs = 35;
  const int leaf_k = 5;
  RandomStream random(1);
  Int8Weight weight(random, num_outputs, 2, leaf_k);
  ASSERT_EQ(weight.shape.num_panels(), 2);
  ASSERT_EQ(weight.shape.size_bytes(), 2 * 2 * 2 * 128);
  for (int output = 0; output < 64; ++output) {
    for (int leaf = 0; leaf < 2; ++leaf) {
      for (int k = 0; k < 8; ++k) {
        const bool inside = output < num_outputs && k < leaf_k;
        const int expected = inside ? weight.values[output * 10 + leaf * 5 + k] + 128 : 128;
        const size_t at = output / 32 * 512 + leaf * 256 + k / 4 * 128 + output % 32 * 4 + k % 4;
        EXPECT_EQ(weight.packed[at], expected) << output << " " << leaf << " " << k;
      }
    }
  }
}

TEST(Pack, Bf16AndFloatPanels) {
  RandomStream random(2);
  Bf16Weight weight(random, 17, 2, 3);
  ASSERT_EQ(weight.shape.size_bytes(), 2 * 2 * 2 * 32 * 2);
  for (int output = 0; output < 32; ++output) {
    for (int leaf = 0; leaf < 2; ++leaf) {
      for (int k = 0; k < 4; ++k) {
        const bool inside = output < 17 && k < 3;
        const uint16_t expected = inside ? weight.values[output * 6 + leaf * 3 + k].bits : 0;
        EXPECT_EQ(weight.packed[output / 16 * 128 + leaf * 64 + k / 2 * 32 + output % 16 * 2 + k % 2].bits,
                  expected);
      }
    }
  }
  const std::vector<float> values = NormalFloats(random, 17 * 3);
  PackedFloat shape{.num_outputs = 17, .k = 3};
  Aligned<float> packed(shape.size_bytes() / 4);
  PackFloat(values.data(), 3, shape, packed.data());
  for (int output = 0; output < 32; ++output) {
    for (int k = 0; k < 3; ++k) {
      EXPECT_EQ(packed[output / 16 * 48 + k * 16 + output % 16], output < 17 ? values[output * 3 + k] : 0.0f);
    }
  }
}

// Blocks, tails of blocks and of words, partial panels, rows that lie apart: all by the definition.
TEST(Pack, EveryShapeFollowsTheDefinition) {
  RandomStream random(3);
  for (const int leaf_k : {1, 31, 32, 63, 64, 67, 128, 202}) {
    for (const int num_outputs : {16, 32, 33, 80}) {
      const int num_leaves = leaf_k % 3 + 1;
      const int stride = num_leaves * leaf_k + 5;
      std::vector<int8_t> bytes(num_outputs * stride);
      std::vector<Bf16> pairs(bytes.size());
      for (size_t i = 0; i < bytes.size(); ++i) {
        bytes[i] = static_cast<int8_t>(random.Next32());
        pairs[i].bits = static_cast<uint16_t>(random.Next32());
      }
      const PackedInt8 int8{.num_outputs = num_outputs, .num_leaves = num_leaves, .leaf_k = leaf_k};
      const PackedBf16 bf16{.num_outputs = num_outputs, .num_leaves = num_leaves, .leaf_k = leaf_k};
      Aligned<uint8_t> packed_int8(int8.size_bytes());
      Aligned<Bf16> packed_bf16(bf16.size_bytes() / 2);
      PackInt8(bytes.data(), stride, int8, 0, int8.num_panels(), packed_int8.data());
      PackBf16(pairs.data(), stride, bf16, 0, bf16.num_panels(), packed_bf16.data());
      // Value k of a leaf of an output; zero beyond the edges.
      const auto value = [&](const auto& values, auto zero, int output, int leaf, int k) {
        return output < num_outputs && k < leaf_k ? values[output * stride + leaf * leaf_k + k] : zero;
      };
      size_t at = 0;
      for (int panel = 0; panel < int8.num_panels(); ++panel) {
        for (int i = 0; i < num_leaves * int8.leaf_pad() * kInt8Panel; ++i, ++at) {
          const int word = i / 4 / kInt8Panel;
          const int k = word % int8.leaf_quads() * 4 + i % 4;
          const int8_t expected =
              value(bytes, int8_t{0}, panel * kInt8Panel + i / 4 % kInt8Panel, word / int8.leaf_quads(), k);
          ASSERT_EQ(packed_int8[at], expected + 128) << leaf_k << " " << num_outputs << " " << at;
        }
      }
      at = 0;
      for (int panel = 0; panel < bf16.num_panels(); ++panel) {
        for (int i = 0; i < num_leaves * bf16.leaf_pad() * kFloatPanel; ++i, ++at) {
          const int word = i / 2 / kFloatPanel;
          const int k = word % bf16.leaf_pairs() * 2 + i % 2;
          const Bf16 expected =
              value(pairs, Bf16{}, panel * kFloatPanel + i / 2 % kFloatPanel, word / bf16.leaf_pairs(), k);
          ASSERT_EQ(packed_bf16[at].bits, expected.bits) << leaf_k << " " << num_outputs << " " << at;
        }
      }
    }
  }
}

TEST(Pack, TransposedBf16) {
  RandomStream random(4);
  for (const int k : {1, 6, 7}) {
    for (const int num_outputs : {5, 16, 35}) {
      const int stride = num_outputs + 3;
      const std::vector<Bf16> columns = NormalBf16(random, k * stride);
      std::vector<Bf16> rows(num_outputs * k);
      for (int output = 0; output < num_outputs; ++output) {
        for (int i = 0; i < k; ++i) rows[output * k + i] = columns[i * stride + output];
      }
      const PackedBf16 shape{.num_outputs = num_outputs, .leaf_k = k};
      const auto count = static_cast<size_t>(shape.size_bytes() / 2);
      Aligned<Bf16> expected(count), packed(count);
      PackBf16(rows.data(), k, shape, 0, shape.num_panels(), expected.data());
      PackBf16Transposed(columns.data(), stride, shape, packed.data());
      EXPECT_EQ(std::memcmp(packed.data(), expected.data(), count * sizeof(Bf16)), 0) << k << num_outputs;
    }
  }
}

TEST(Pack, WritesOnlyThePanelsAskedFor) {
  PackedInt8 shape{.num_outputs = 96, .leaf_k = 4};
  const std::vector<int8_t> values(96 * 4, 1);
  std::vector<uint8_t> target(shape.size_bytes(), 0xee);
  PackInt8(values.data(), 4, shape, 1, 2, target.data());
  for (size_t i = 0; i < target.size(); ++i) EXPECT_EQ(target[i], i / 128 == 1 ? 129 : 0xee) << i;
}

}  // namespace
}  // namespace tessera::kernels
