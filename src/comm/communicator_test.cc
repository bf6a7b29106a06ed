// Every collective against a plain computation, over worlds of threads with all kinds of nodes.
#include "comm/communicator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/random.h"
#include "comm/thread_world.h"

namespace tessera {
namespace {

using Bytes = std::vector<std::byte>;

// A number per (operation, rank, place), cheap: most of a sanitizer's time would go here.
uint64_t Noise(int number, int rank, uint64_t place) {
  return (place + 1) * 0x9E3779B97F4A7C15 ^ static_cast<uint64_t>(number * 1000 + rank) * 0xD6E8FEB86659FD93;
}

// What rank `rank` contributes to operation `number`: every member can compute everybody's. Numbers of all
// widths, so that the packing meets every case.
std::vector<int64_t> Values(int number, int rank, size_t count) {
  std::vector<int64_t> values(count);
  int64_t* value = values.data();
  for (size_t i = 0; i < count; ++i) {
    const auto shift = static_cast<int>((i / 61 * 7 + static_cast<size_t>(number)) % 58);
    *value++ = static_cast<int64_t>(Noise(number, rank, i)) >> (5 + shift);
  }
  return values;
}
Bytes Text(int number, int rank, size_t size, int to = 0) {
  Bytes bytes(size);
  for (size_t i = 0; i < size; i += 8) {
    const uint64_t word = Noise(number, 20 * rank + to, i);
    std::memcpy(bytes.data() + i, &word, std::min<size_t>(8, size - i));
  }
  return bytes;
}
// Small ones mostly, sometimes 0, rarely beyond a buffer.
int64_t RandomSize(RandomStream& random, int64_t large) {
  switch (random.Below(8)) {
    case 0:
      return 0;
    case 1:
      return random.Below(static_cast<uint32_t>(large));
    case 2:
      return 1;
    default:
      return random.Below(1000);
  }
}
std::vector<int64_t> RandomSizes(RandomStream& random, int count, int64_t large) {
  std::vector<int64_t> sizes(count);
  for (int64_t& size : sizes) size = RandomSize(random, large);
  return sizes;
}
template <typename Sizes>
int64_t Total(const Sizes& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
}

std::vector<int64_t> SumOfAll(int number, int size, size_t count) {
  std::vector<int64_t> sum(count);
  for (int rank = 0; rank < size; ++rank) {
    const auto values = Values(number, rank, count);
    for (size_t i = 0; i < count; ++i) sum.data()[i] += values.data()[i];
  }
  return sum;
}

void TestAllReduce(Communicator& group, int number, RandomStream& random, int64_t large) {
  const auto count = static_cast<size_t>(RandomSize(random, large / 8));
  auto values = Values(number, group.rank(), count);
  ASSERT_TRUE(group.AllReduce(values));
  EXPECT_EQ(values, SumOfAll(number, group.size(), count));
}

void TestReduceScatter(Communicator& group, int number, RandomStream& random, int64_t large) {
  const auto counts = RandomSizes(random, group.size(), large / 8);
  auto values = Values(number, group.rank(), Total(counts));
  const auto sum = SumOfAll(number, group.size(), values.size());
  const int64_t begin = Total(std::span(counts).first(group.rank())), count = counts[group.rank()];
  const std::vector<int64_t> expected(sum.begin() + begin, sum.begin() + begin + count);
  std::vector<int64_t> apart(count);
  std::span<int64_t> own = apart;
  const uint32_t where = random.Below(3);  // elsewhere, in its place, or over other parts
  if (where == 1) own = std::span(values).subspan(begin, count);
  if (where == 2) own = std::span(values).first(count);
  ASSERT_TRUE(group.ReduceScatter(values, counts, own));
  EXPECT_TRUE(std::ranges::equal(own, expected));
}

void TestAllGather(Communicator& group, int number, RandomStream& random, int64_t large) {
  const auto sizes = RandomSizes(random, group.size(), large);
  Bytes expected, all(Total(sizes));
  for (int rank = 0; rank < group.size(); ++rank) {
    const Bytes part = Text(number, rank, sizes[rank]);
    expected.insert(expected.end(), part.begin(), part.end());
  }
  Bytes own = Text(number, group.rank(), sizes[group.rank()]);
  if (random.Below(2) == 0) {  // in its place
    const auto place = std::span(all).subspan(Total(std::span(sizes).first(group.rank())), own.size());
    std::ranges::copy(own, place.begin());
    ASSERT_TRUE(group.AllGather(place, sizes, all));
  } else {
    ASSERT_TRUE(group.AllGather(own, sizes, all));
  }
  EXPECT_TRUE(all == expected);
}

void TestAllToAll(Communicator& group, int number, RandomStream& random, int64_t large) {
  std::vector<std::vector<int64_t>> sizes;  // [from][to]
  for (int rank = 0; rank < group.size(); ++rank) sizes.push_back(RandomSizes(random, group.size(), large));
  Bytes send, expected;
  std::vector<int64_t> receive_sizes;
  for (int other = 0; other < group.size(); ++other) {
    const Bytes there = Text(number, group.rank(), sizes[group.rank()][other], other);
    send.insert(send.end(), there.begin(), there.end());
    const Bytes here = Text(number, other, sizes[other][group.rank()], group.rank());
    expected.insert(expected.end(), here.begin(), here.end());
    receive_sizes.push_back(sizes[other][group.rank()]);
  }
  Bytes receive(expected.size());
  ASSERT_TRUE(group.AllToAll(send, sizes[group.rank()], receive, receive_sizes));
  EXPECT_TRUE(receive == expected);
}

void TestBroadcast(Communicator& group, int number, RandomStream& random, int64_t large) {
  const auto size = static_cast<size_t>(RandomSize(random, large));
  const int root = static_cast<int>(random.Below(static_cast<uint32_t>(group.size())));
  Bytes bytes = Text(number, group.rank(), size);
  ASSERT_TRUE(group.Broadcast(bytes, root));
  EXPECT_TRUE(bytes == Text(number, root, size));
}

// The same random operations on every member: `seed` is the group's.
void TestAll(Communicator& group, uint64_t seed, int num_operations, int64_t large) {
  RandomStream random(seed);
  for (int number = 0; number < num_operations && !testing::Test::HasFatalFailure(); ++number) {
    switch (random.Below(6)) {
      case 0:
        TestAllReduce(group, number, random, large);
        break;
      case 1:
        TestReduceScatter(group, number, random, large);
        break;
      case 2:
        TestAllGather(group, number, random, large);
        break;
      case 3:
        TestAllToAll(group, number, random, large);
        break;
      case 4:
        TestBroadcast(group, number, random, large);
        break;
      default:
        ASSERT_TRUE(group.Barrier());
    }
  }
}

const std::vector<std::vector<int>> kWorlds = {
    {0},
    {0, 0},
    {0, 1},
    {0, 0, 0},
    {5, 3, 5},
    {0, 0, 0, 1},
    {0, 1, 2, 3},
    {0, 0, 1, 1},
    {0, 1, 0, 1},
    {0, 0, 0, 0, 0},
    {0, 0, 0, 1, 1, 2},
    {0, 0, 0, 0, 1, 1, 1, 1},
    {0, 1, 1, 1, 1, 1, 1, 1, 1},
    {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0},
    {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 3},
};

class CommunicatorWorlds : public testing::TestWithParam<size_t> {};
INSTANTIATE_TEST_SUITE_P(All, CommunicatorWorlds, testing::Range<size_t>(0, kWorlds.size()));

TEST_P(CommunicatorWorlds, EveryCollectiveEqualsThePlainComputation) {
  ThreadWorld world(kWorlds[GetParam()]);
  const int num_operations = world.size() > 8 ? 20 : 60;
  const auto joined =
      world.Run([&](Communicator& group) { TestAll(group, 100 + GetParam(), num_operations, 40'000); });
  for (const Status& status : joined) EXPECT_TRUE(status) << status.error().message;
}

TEST_P(CommunicatorWorlds, SplitGroupsTakeTurns) {
  ThreadWorld world(kWorlds[GetParam()]);
  world.Run([&](Communicator& all) {
    const int color = all.rank() % 3 == 1 ? 1 : 0;
    auto part = all.Split(color, -all.rank());
    ASSERT_TRUE(part) << part.error().message;
    auto pair = (*part)->Split((*part)->rank() / 2, (*part)->rank());
    ASSERT_TRUE(pair) << pair.error().message;
    // Keys turn the order round.
    const int members_above = (all.size() - 1 - all.rank());
    int before = 0;
    for (int rank = all.rank() + 1; rank <= all.rank() + members_above; ++rank)
      before += (rank % 3 == 1) == color;
    EXPECT_EQ((*part)->rank(), before);
    for (uint64_t turn = 0; turn < 3; ++turn) {
      TestAll(all, 10 * turn, 2, 3000);
      TestAll(**pair, 10 * turn + 1, 3, 3000);
      TestAll(**part, 10 * turn + 2, 2, 3000);
    }
  });
}

TEST(Communicator, ArraysLargerThanTheBuffers) {
  for (const std::vector<int>& nodes : {std::vector<int>{0, 0, 0}, {0, 0, 1}}) {
    ThreadWorld world(nodes);
    world.Run([](Communicator& group) {
      constexpr size_t kCount = 280'001;
      auto values = Values(1, group.rank(), kCount);
      ASSERT_TRUE(group.AllReduce(values));
      EXPECT_TRUE(values == SumOfAll(1, 3, kCount));
      TestAll(group, 5, 6, 2'500'000);
    });
  }
}

TEST(Communicator, AGroupOfOneNeedsNobody) {
  const auto alone = Communicator::Alone();
  EXPECT_EQ(alone->size(), 1);
  TestAll(*alone, 3, 30, 10'000);
  EXPECT_EQ(alone->Counts()[0].calls, 0u);
}

TEST(Communicator, ChannelsRunOutWithAnError) {
  ThreadWorld world({0, 0});
  world.Run([](Communicator& group) {
    std::vector<std::unique_ptr<Communicator>> groups;
    while (true) {
      auto next = group.Split(0, 0);
      if (!next) {
        EXPECT_EQ(next.error().kind, ErrorKind::kExhausted);
        break;
      }
      groups.push_back(std::move(*next));
    }
    EXPECT_EQ(groups.size(), static_cast<size_t>(SharedMemory::kNumChannels - 1));
    EXPECT_TRUE(group.Barrier());
  });
}

TEST(Communicator, CountsCallsAndBytes) {
  ThreadWorld world({0, 0, 1});  // rank 0 speaks for its node
  world.Run([](Communicator& group) {
    const auto half = group.Split(0, 0);
    std::vector<int64_t> values(300, 1);
    ASSERT_TRUE((*half)->AllReduce(values));
    ASSERT_TRUE(group.Barrier());
    const CommunicatorCounts counts = group.Counts();
    const CollectiveCounts& reduce = counts[static_cast<int>(Collective::kAllReduce)];
    EXPECT_EQ(reduce.calls, 1u);
    EXPECT_GE(reduce.bytes, 800u);
    // Ones and threes take a byte each, not eight.
    EXPECT_EQ(reduce.wire_bytes > 0, group.rank() != 1);
    EXPECT_LT(reduce.wire_bytes, reduce.bytes);
    EXPECT_EQ(counts[static_cast<int>(Collective::kBarrier)].calls, 1u);
    EXPECT_EQ(counts[static_cast<int>(Collective::kAllGather)].calls, 0u);
  });
}

}  // namespace
}  // namespace tessera
