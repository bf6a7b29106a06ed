// Adding and packing against plain loops, and packed forms that are broken.
#include "comm/sums.h"

#include <gtest/gtest.h>

#include <limits>

#include "base/random.h"

namespace tessera {
namespace {

std::vector<std::byte> Packed(const std::vector<int64_t>& values) {
  std::vector<std::byte> packed;
  PackInt64(values, packed);
  return packed;
}

TEST(Sums, RowsAreAdded) {
  for (const size_t size : {0, 1, 7, 1024, 1025, 5000}) {
    std::vector<std::vector<int64_t>> rows(3, std::vector<int64_t>(size));
    std::vector<int64_t> expected(size);
    std::vector<const int64_t*> pointers;
    RandomStream random(size);
    for (auto& row : rows) {
      for (size_t i = 0; i < size; ++i) expected[i] += row[i] = static_cast<int64_t>(random.Next64()) >> 2;
      pointers.push_back(row.data());
    }
    std::vector<int64_t> sum(size, 5);
    SumRows(sum, pointers);
    EXPECT_EQ(sum, expected);
    SumRows(sum, std::span(pointers).first(1));
    EXPECT_EQ(sum, rows[0]);
    SumRows(rows[0], pointers);
    EXPECT_EQ(rows[0], expected);
  }
}

TEST(Sums, PackingLosesNothing) {
  RandomStream random(1);
  for (int round = 0; round < 300; ++round) {
    std::vector<int64_t> values(random.Below(200));
    const uint32_t shift = random.Below(64);
    for (int64_t& value : values) value = static_cast<int64_t>(random.Next64()) >> shift;
    std::vector<int64_t> sum(values.size(), 11);
    const auto packed = Packed(values);
    ASSERT_LE(packed.size(), MaxPackedBytes(values.size()));
    ASSERT_TRUE(UnpackAddInt64(packed, sum));
    for (size_t i = 0; i < values.size(); ++i) ASSERT_EQ(sum[i] - 11, values[i]);
  }
}

TEST(Sums, EveryWidthAtItsBorders) {
  const auto size_of = [](int64_t value) { return Packed({value}).size() - 1; };
  EXPECT_EQ(size_of(0), 0u);
  for (size_t width = 1; width <= 8; ++width) {
    const auto largest = static_cast<int64_t>((uint64_t{1} << (8 * width - 1)) - 1);
    for (const int64_t value : {largest, -largest - 1}) {
      EXPECT_EQ(size_of(value), width) << value;
      std::vector<int64_t> sum = {0};
      ASSERT_TRUE(UnpackAddInt64(Packed({value}), sum));
      EXPECT_EQ(sum[0], value);
    }
    if (width < 8) {
      EXPECT_EQ(size_of(largest + 1), width + 1);
    }
  }
  EXPECT_EQ(size_of(-1), 1u);
}

TEST(Sums, BrokenFormsAreRefused) {
  std::vector<int64_t> values(100);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int64_t>(i) << 20;
  const auto packed = Packed(values);
  std::vector<int64_t> sum(values.size());
  // Cut anywhere: copied, so that a sanitizer sees a read beyond the end.
  for (size_t size = 0; size < packed.size(); ++size)
    EXPECT_FALSE(
        UnpackAddInt64(std::vector(packed.begin(), packed.begin() + static_cast<int64_t>(size)), sum));
  auto longer = packed;
  longer.push_back(std::byte{0});
  EXPECT_FALSE(UnpackAddInt64(longer, sum));
  auto wide = packed;
  wide[0] = std::byte{9};
  EXPECT_FALSE(UnpackAddInt64(wide, sum));
}

}  // namespace
}  // namespace tessera
