// Attention of every instruction set against the reference: equal bits for any number of rows, head sizes,
// page sizes and visible positions, and rows that end in different blocks of one tile; as a whole and by
// blocks.
#include <algorithm>
#include <cmath>

#include "kernels/kernels_testing.h"

namespace tessera::kernels {
namespace {

class AttentionTest : public KernelTest {};
INSTANTIATE_TEST_SUITE_P(Isa, AttentionTest, ::testing::ValuesIn(VectorIsas()), IsaTestName);
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(AttentionTest);

// Where keys and values lie in a row of the cache.
struct Widths {
  int key_begin, key_width, value_width;
};
Widths Latent(int latent, int rope) {
  return {0, latent + rope, latent};
}
Widths Expanded(int key, int value) {
  return {(value + 15) / 16 * 16, key, value};
}

// A sequence's cache in shuffled pages, and query rows. Memory of exactly the pages that hold visible
// positions: reading beyond them is an error under a sanitizer.
struct Case {
  Case(RandomStream& random, int num_rows, Widths widths, int block_size, std::vector<int32_t> visible,
       float query_scale = 1.0f)
      : visible(std::move(visible)),
        queries(NormalBf16(random, num_rows * (widths.key_width + 3), query_scale)) {
    const int positions = *std::max_element(this->visible.begin(), this->visible.end());
    const int num_blocks = (positions + block_size - 1) / block_size;
    const int row_stride = (widths.key_begin + widths.key_width + 31) / 32 * 32;
    cache = NormalBf16(random, num_blocks * block_size * row_stride);
    block_ids.resize(num_blocks);
    for (int i = 0; i < num_blocks; ++i) block_ids[i] = i;
    for (int i = num_blocks - 1; i > 0; --i) std::swap(block_ids[i], block_ids[random.Below(i + 1)]);
    tile = {
        .queries = {queries.data(), widths.key_width + 3},
        .num_rows = num_rows,
        .num_visible = this->visible.data(),
        .pages = {cache.data(), block_ids.data(), block_size, int64_t{block_size} * row_stride, row_stride},
        .key_begin = widths.key_begin,
        .key_width = widths.key_width,
        .value_width = widths.value_width,
        .softmax_scale = 0.3f};
    if (widths.key_width % 2 == 0) return;
    for (int position = 0; position < positions; ++position) {
      At(position, widths.key_begin + widths.key_width) = {};
    }
  }
  Bf16& At(int position, int column) {
    const CachePages& pages = tile.pages;
    return cache[block_ids[position / pages.block_size] * pages.block_stride +
                 position % pages.block_size * pages.row_stride + column];
  }
  std::vector<int32_t> visible;
  std::vector<Bf16> queries;
  std::vector<Bf16> cache;
  std::vector<int32_t> block_ids;
  AttentionTile tile;
};

struct Answer {
  Answer(const Kernels& kernels, const AttentionTile& tile)
      : out(tile.num_rows * (tile.value_width + 5) + 5, Bf16{0x4321}),
        scratch(AttentionScratchBytes(tile.key_width, tile.value_width) + 64) {
    std::fill_n(scratch.data(), AttentionScratchBytes(tile.key_width, tile.value_width) + 64,
                std::byte{0x7f});
    fine = kernels.attention(tile, scratch.data(), out.data(), tile.value_width + 5, &bad_rows);
    for (int i = 0; i < 64; ++i) {
      EXPECT_EQ(scratch[AttentionScratchBytes(tile.key_width, tile.value_width) + i], std::byte{0x7f})
          << "beyond the scratch";
    }
  }
  std::vector<Bf16> out;
  Aligned<std::byte> scratch;
  bool fine = false;
  uint64_t bad_rows = ~uint64_t{0};
};

// The same answer by blocks, each on its own and last one first, merged a few rows at a time.
void ExpectSameByBlocks(const Kernels& kernels, const AttentionTile& tile, const Answer& whole) {
  const int64_t part_bytes = AttentionPartBytes(tile.value_width);
  Aligned<std::byte> parts(part_bytes * tile.num_blocks());
  Aligned<std::byte> scratch(AttentionScratchBytes(tile.key_width, tile.value_width));
  bool fine = true;
  for (int block = tile.num_blocks() - 1; block >= 0; --block) {
    std::fill_n(scratch.data(), AttentionScratchBytes(tile.key_width, tile.value_width), std::byte{0x7f});
    fine &= kernels.attention_block(tile, block, scratch.data(), parts.data() + block * part_bytes);
  }
  EXPECT_EQ(fine, whole.fine);
  if (!fine) return;
  std::vector<Bf16> out(whole.out.size(), Bf16{0x4321});
  for (int row = 0; row < tile.num_rows; row += 5) {
    const int end = std::min(row + 5, tile.num_rows);
    for (int block = 1; block < tile.num_blocks(); ++block) {
      kernels.attention_merge(tile, block, parts.data() + block * part_bytes, row, end, parts.data());
    }
    kernels.attention_finish(tile, parts.data(), row, end, out.data(), tile.value_width + 5);
  }
  for (size_t i = 0; i < out.size(); ++i) ASSERT_TRUE(SameBf16(out[i], whole.out[i])) << i;
}

void ExpectSame(const Kernels& kernels, const AttentionTile& tile) {
  const Answer a(Reference(), tile);
  const Answer b(kernels, tile);
  EXPECT_EQ(a.fine, b.fine);
  EXPECT_EQ(a.bad_rows, b.bad_rows);
  for (size_t i = 0; i < a.out.size(); ++i) {
    ASSERT_TRUE(SameBf16(a.out[i], b.out[i])) << i << ": " << a.out[i].bits << " " << b.out[i].bits;
  }
  ExpectSameByBlocks(kernels, tile, a);
  ExpectSameByBlocks(Reference(), tile, a);
}

std::vector<int32_t> Visible(RandomStream& random, int num_rows, int lowest, int highest) {
  std::vector<int32_t> visible(num_rows);
  for (int32_t& value : visible) value = lowest + static_cast<int32_t>(random.Below(highest - lowest + 1));
  return visible;
}

TEST_P(AttentionTest, OddRowsAndHeadSizes) {
  RandomStream random(40);
  for (const int num_rows : {1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 33, 48, 63, 64}) {
    const int latent = 2 * (1 + static_cast<int>(random.Below(60)));
    const int rope = 2 * static_cast<int>(random.Below(10));
    SCOPED_TRACE(Format("{} rows, {} + {}", num_rows, latent, rope));
    Case small(random, num_rows, Latent(latent, rope), 16, Visible(random, num_rows, 1, 70));
    ExpectSame(kernels(), small.tile);
    Case expanded(random, num_rows, Expanded(latent / 2 + rope, latent / 2), 512,
                  Visible(random, num_rows, 1, 70));
    ExpectSame(kernels(), expanded.tile);
  }
}

TEST_P(AttentionTest, EveryFewPositions) {
  RandomStream random(41);
  for (int positions = 1; positions <= 70; ++positions) {
    Case one(random, 5, Latent(32, 8), 16, Visible(random, 5, positions, positions));
    ExpectSame(kernels(), one.tile);
  }
}

TEST_P(AttentionTest, BlockBordersAndPageSizes) {
  RandomStream random(42);
  for (const int block_size : {16, 32, 48, 128, 512, 1024}) {
    for (const int positions : {511, 512, 513, 514, 1023, 1024, 1025, 1537}) {
      Case one(random, 4, Latent(16, 4), block_size, Visible(random, 4, positions, positions));
      ExpectSame(kernels(), one.tile);
    }
  }
}

TEST_P(AttentionTest, RowsEndInDifferentBlocks) {
  RandomStream random(43);
  for (int trial = 0; trial < 4; ++trial) {
    Case mixed(random, 21, Latent(48, 16), 64, Visible(random, 21, 1, 1600), trial < 2 ? 1.0f : 8.0f);
    mixed.visible[0] = 1;
    mixed.visible[1] = 512;
    mixed.visible[2] = 513;
    ExpectSame(kernels(), mixed.tile);
  }
}

TEST_P(AttentionTest, SizesOfR1) {
  RandomStream random(44);
  Case one(random, 16, Latent(512, 64), 128, Visible(random, 16, 590, 600));
  ExpectSame(kernels(), one.tile);
  Case expanded(random, 64, Expanded(192, 128), 512, Visible(random, 64, 590, 654));
  ExpectSame(kernels(), expanded.tile);
}

TEST_P(AttentionTest, LargeScoresUnderflowToZero) {
  RandomStream random(45);
  Case sharp(random, 10, Latent(24, 8), 16, Visible(random, 10, 1, 600), 60.0f);
  ExpectSame(kernels(), sharp.tile);
}

TEST_P(AttentionTest, DenormalsAndZerosInTheCache) {
  RandomStream random(46);
  Case one(random, 10, Latent(24, 8), 16, Visible(random, 10, 1, 100));
  for (Bf16& value : one.cache) {
    if (random.Below(3) == 0) value.bits = static_cast<uint16_t>(random.Below(128) | random.Below(2) << 15);
  }
  ExpectSame(kernels(), one.tile);
  for (Bf16& value : one.cache) value.bits &= 0x8000;
  ExpectSame(kernels(), one.tile);
}

TEST_P(AttentionTest, NonFiniteScoresMarkTheRowsThatSeeThem) {
  RandomStream random(47);
  for (const uint16_t bits : {0x7f80, 0xff80, 0x7fc0}) {
    std::vector<int32_t> visible = Visible(random, 12, 1, 600);
    visible[3] = 600;
    visible[5] = 40;
    Case one(random, 12, Latent(24, 8), 16, visible);
    one.At(50, 3).bits = bits;
    ExpectSame(kernels(), one.tile);
    const Answer answer(kernels(), one.tile);
    EXPECT_FALSE(answer.fine);
    EXPECT_NE(answer.bad_rows >> 3 & 1, 0u);
    EXPECT_EQ(answer.bad_rows >> 5 & 1, 0u);
    EXPECT_TRUE(std::isfinite(ToFloat(answer.out[5 * 29])));
  }
}

}  // namespace
}  // namespace tessera::kernels
