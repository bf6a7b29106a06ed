// BlockPool against a naive model: lists and maps whose meaning is plain, driven by the same random calls.
#include "engine/block_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <deque>
#include <map>
#include <optional>

#include "base/random.h"

namespace tessera {
namespace {

BlockKey KeyOf(int content) {
  const int32_t tokens[] = {content};
  return ChildKey(RootKey(""), tokens, 0);
}

// The same contract, written for reading.
class NaivePool {
 public:
  explicit NaivePool(int num_blocks) : references_(num_blocks), dirty_(num_blocks), content_(num_blocks) {
    for (int block = 0; block < num_blocks; ++block) free_.push_back(block);
  }
  int num_free() const { return static_cast<int>(free_.size()); }
  int references(int block) const { return references_[block]; }
  bool published(int block) const { return content_[block].has_value(); }

  BlockPool::Allocation Allocate() {
    const int32_t block = free_.front();
    free_.pop_front();
    Forget(block);
    references_[block] = 1;
    const bool dirty = dirty_[block];
    dirty_[block] = false;
    return {block, dirty};
  }
  void Reference(int32_t block) {
    std::erase(free_, block);
    ++references_[block];
  }
  void Release(int32_t block) {
    if (--references_[block] > 0) return;
    published(block) ? free_.push_back(block) : free_.push_front(block);
  }
  void Publish(int32_t block, int content) {
    content_[block] = content;
    published_order_.push_back(block);
  }
  int32_t Find(int content) const {
    for (const int32_t block : published_order_) {
      if (content_[block] == content) return block;
    }
    return -1;
  }
  void Taint(int32_t block) {
    Forget(block);
    dirty_[block] = true;
  }

 private:
  void Forget(int32_t block) {
    content_[block].reset();
    std::erase(published_order_, block);
  }
  std::vector<int> references_;
  std::vector<bool> dirty_;
  std::vector<std::optional<int>> content_;
  std::deque<int32_t> published_order_;
  std::deque<int32_t> free_;
};

void RunAgainstModel(uint64_t seed) {
  RandomStream random(seed);
  const int num_blocks = 1 + static_cast<int>(random.Below(9));
  const int num_contents = 1 + static_cast<int>(random.Below(6));
  BlockPool pool(num_blocks);
  NaivePool model(num_blocks);
  std::vector<int32_t> held;  // one entry per reference
  const auto pick = [&] { return random.Below(static_cast<uint32_t>(held.size())); };
  for (int step = 0; step < 300; ++step) {
    switch (random.Below(6)) {
      case 0:
      case 1: {
        if (model.num_free() == 0) break;
        const auto got = pool.Allocate();
        const auto wanted = model.Allocate();
        ASSERT_EQ(got.block, wanted.block);
        ASSERT_EQ(got.dirty, wanted.dirty);
        held.push_back(got.block);
        break;
      }
      case 2: {
        const int content = static_cast<int>(random.Below(num_contents));
        const int32_t block = pool.Find(KeyOf(content));
        ASSERT_EQ(block, model.Find(content));
        if (block < 0) break;
        pool.Reference(block);
        model.Reference(block);
        held.push_back(block);
        break;
      }
      case 3: {
        if (held.empty()) break;
        const uint32_t place = pick();
        pool.Release(held[place]);
        model.Release(held[place]);
        held.erase(held.begin() + place);
        break;
      }
      case 4: {
        if (held.empty()) break;
        const int32_t block = held[pick()];
        if (model.published(block)) break;
        const int content = static_cast<int>(random.Below(num_contents));
        pool.Publish(block, KeyOf(content));
        model.Publish(block, content);
        break;
      }
      case 5: {
        if (held.empty() || random.Below(4) != 0) break;
        const int32_t block = held[pick()];
        pool.Taint(block);
        model.Taint(block);
        break;
      }
    }
    ASSERT_EQ(pool.num_free(), model.num_free());
    for (int block = 0; block < num_blocks; ++block) {
      ASSERT_EQ(pool.references(block), model.references(block));
      ASSERT_EQ(pool.published(block), model.published(block));
    }
    for (int content = 0; content < num_contents; ++content) {
      ASSERT_EQ(pool.Find(KeyOf(content)), model.Find(content));
    }
  }
}

TEST(BlockPool, BehavesLikeTheModel) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    RunAgainstModel(seed);
    if (HasFatalFailure()) return;
  }
}

TEST(BlockPool, EvictsTailsBeforeHeadsAndTheUnfindableFirst) {
  BlockPool pool(4);
  std::vector<int32_t> table;
  for (int i = 0; i < 4; ++i) table.push_back(pool.Allocate().block);
  for (int i = 0; i < 3; ++i) pool.Publish(table[i], KeyOf(i));
  for (int i = 3; i >= 0; --i) pool.Release(table[i]);
  EXPECT_EQ(pool.Allocate().block, table[3]);  // not full, never published
  EXPECT_EQ(pool.Allocate().block, table[2]);
  EXPECT_EQ(pool.Find(KeyOf(2)), -1);
  EXPECT_EQ(pool.Find(KeyOf(0)), table[0]);
  EXPECT_EQ(pool.Allocate().block, table[1]);
  EXPECT_EQ(pool.Allocate().block, table[0]);
  EXPECT_EQ(pool.num_free(), 0);
}

TEST(BlockPool, KeysDependOnParentTokensAndSalt) {
  const int32_t a[] = {1, 2}, b[] = {2, 1};
  EXPECT_NE(ChildKey(RootKey(""), a, 0), ChildKey(RootKey(""), b, 0));
  EXPECT_NE(ChildKey(RootKey(""), a, 0), ChildKey(RootKey("tenant"), a, 0));
  EXPECT_NE(ChildKey(ChildKey(RootKey(""), a, 0), a, 0), ChildKey(RootKey(""), a, 0));
  EXPECT_NE(ChildKey(RootKey(""), a, 1), ChildKey(RootKey(""), a, 0));
  EXPECT_EQ(ChildKey(RootKey("tenant"), a, 0), ChildKey(RootKey("tenant"), a, 0));
}

TEST(BlockPoolDeathTest, BlockFreedTwice) {
  BlockPool pool(2);
  const int32_t block = pool.Allocate().block;
  pool.Release(block);
  EXPECT_DEATH(pool.Release(block), "references > 0");
}

}  // namespace
}  // namespace tessera
