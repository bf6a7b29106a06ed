// What goes wrong between ranks is an error on every rank, in time: disagreement, absence, abort, death,
// strangers.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include <atomic>
#include <latch>
#include <thread>
#include <vector>

#include "comm/thread_world.h"

namespace tessera {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr milliseconds kLong = seconds(20);  // no test here waits for it

testing::AssertionResult Says(const Status& status, ErrorKind kind, std::string_view text) {
  if (status) return testing::AssertionFailure() << "no error";
  if (status.error().kind == kind && status.error().message.find(text) != std::string::npos)
    return testing::AssertionSuccess();
  return testing::AssertionFailure() << "kind " << static_cast<int>(status.error().kind) << ": "
                                     << status.error().message;
}

template <typename T>
Status StatusOf(const Result<T>& result) {
  return result ? Status() : Status(std::unexpected(result.error()));
}

const std::vector<std::vector<int>> kWorlds = {{0, 0, 0, 0}, {0, 1, 2, 3}, {0, 0, 1, 1}, {0, 0, 0, 1}};

class BrokenWorlds : public testing::TestWithParam<size_t> {
 protected:
  const std::vector<int>& nodes() const { return kWorlds[GetParam()]; }
  bool one_node() const { return GetParam() == 0; }
};
INSTANTIATE_TEST_SUITE_P(All, BrokenWorlds, testing::Range<size_t>(0, kWorlds.size()));

// Rank 2 does one thing and the others another. All get an error; those that see both name both.
void ExpectDisagreement(const std::vector<int>& nodes, const std::function<Status(Communicator&)>& odd,
                        const std::function<Status(Communicator&)>& others, const std::string& text) {
  ThreadWorld world(nodes, kLong);
  std::vector<Status> results(nodes.size());
  world.Run([&](Communicator& group) {
    results[group.rank()] = group.rank() == 2 ? odd(group) : others(group);
    // Who was done before it could see: the next call tells.
    if (results[group.rank()]) results[group.rank()] = group.Barrier();
  });
  int num_telling = 0;
  for (const Status& status : results) {
    ASSERT_FALSE(status);
    num_telling += status.error().message.find(text) != std::string::npos;
  }
  EXPECT_GE(num_telling, 2) << results[0].error().message;
}

TEST_P(BrokenWorlds, AnotherOperationIsAnErrorWithBoth) {
  ExpectDisagreement(
      nodes(),
      [](Communicator& group) {
        std::vector<int64_t> values(64);
        return group.AllReduce(values);
      },
      [](Communicator& group) {
        std::vector<std::byte> all(400);
        return group.AllGather(std::span(all).first(100), std::vector<int64_t>(4, 100), all);
      },
      "all_reduce #2 of 512 bytes");
}

TEST_P(BrokenWorlds, AnotherSizeIsAnErrorWithBoth) {
  ExpectDisagreement(
      nodes(),
      [](Communicator& group) {
        std::vector<int64_t> values(64);
        return group.AllReduce(values);
      },
      [](Communicator& group) {
        std::vector<int64_t> values(65);
        return group.AllReduce(values);
      },
      "all_reduce #2 of 520 bytes");
}

TEST_P(BrokenWorlds, AnotherCutOfTheSameSizeIsAnError) {
  const auto reduce = [](Communicator& group, std::vector<int64_t> counts) {
    std::vector<int64_t> values(40), own(counts[group.rank()]);
    return group.ReduceScatter(values, counts, own);
  };
  ExpectDisagreement(
      nodes(), [&](Communicator& group) { return reduce(group, {10, 11, 9, 10}); },
      [&](Communicator& group) { return reduce(group, {10, 10, 10, 10}); }, "sizes of its parts differ");
}

TEST_P(BrokenWorlds, AnotherRootIsAnErrorWithBoth) {
  const auto from = [](Communicator& group, int root) {
    std::vector<std::byte> bytes(5);
    return group.Broadcast(bytes, root);
  };
  ExpectDisagreement(
      nodes(), [&](Communicator& group) { return from(group, 0); },
      [&](Communicator& group) { return from(group, 1); }, "from member 0");
}

TEST_P(BrokenWorlds, AReceiverThatExpectsAnotherSize) {
  ThreadWorld world(nodes(), kLong);
  std::vector<Status> results(4);
  world.Run([&](Communicator& group) {
    std::vector<int64_t> sizes(4, 12), expected(4, 12);
    if (group.rank() == 3) expected[1] = 13;
    std::vector<std::byte> send(48), receive(group.rank() == 3 ? 49 : 48);
    results[group.rank()] = group.AllToAll(send, sizes, receive, expected);
    if (results[group.rank()]) results[group.rank()] = group.Barrier();
  });
  EXPECT_TRUE(Says(results[3], ErrorKind::kInvalid, "12 bytes")) << results[3].error().message;
  EXPECT_NE(results[3].error().message.find("13"), std::string::npos);
  for (int rank = 0; rank < 4; ++rank) EXPECT_FALSE(results[rank]) << rank;
}

TEST_P(BrokenWorlds, ARankThatNeverComesIsADeadlineAndNamed) {
  ThreadWorld world(nodes(), milliseconds(300));
  std::vector<Status> results(4);
  std::latch done(3);
  world.Run([&](Communicator& group) {
    if (group.rank() == 2) return done.wait();  // its links stay open
    std::vector<int64_t> values(64);
    results[group.rank()] = group.AllReduce(values);
    done.count_down();
  });
  int num_deadlines = 0;
  for (const int rank : {0, 1, 3}) {
    ASSERT_FALSE(results[rank]);
    num_deadlines += results[rank].error().kind == ErrorKind::kDeadline;
    if (one_node()) {
      EXPECT_NE(results[rank].error().message.find("rank 2"), std::string::npos);
    }
  }
  EXPECT_GE(num_deadlines, 1);
}

TEST_P(BrokenWorlds, AfterAnErrorEveryCallFails) {
  ThreadWorld world(nodes(), kLong);
  world.Run([&](Communicator& group) {
    std::vector<std::byte> bytes(static_cast<size_t>(group.rank()) + 1);
    Status status = group.Broadcast(bytes, 0);
    if (status) status = group.Barrier();
    EXPECT_FALSE(status);
    EXPECT_TRUE(Says(group.Barrier(), ErrorKind::kUnavailable, "broke before"));
    EXPECT_FALSE(group.Split(0, 0));
  });
}

TEST_P(BrokenWorlds, AbortWakesAllWhoWait) {
  ThreadWorld world(nodes(), kLong);
  std::latch joined(4);
  std::vector<Status> results(4);
  world.Run([&](Communicator& group) {
    joined.arrive_and_wait();
    if (group.rank() == 3) {
      for (int rank = 0; rank < 4; ++rank) {
        if (world.memory(rank) != nullptr) world.memory(rank)->Abort("rank 3 was shot");
        if (world.mesh(rank) != nullptr) world.mesh(rank)->Abort();
      }
      return;
    }
    results[group.rank()] = group.Barrier();
  });
  for (const int rank : {0, 1, 2}) {
    EXPECT_FALSE(results[rank]);
    EXPECT_EQ(results[rank].error().kind, ErrorKind::kUnavailable);
    if (one_node()) {
      EXPECT_TRUE(Says(results[rank], ErrorKind::kUnavailable, "rank 3 was shot"));
    }
  }
}

// Words that a test and its forked ranks share.
struct Board {
  std::atomic<int> rounds;                   // of the rank that is to die
  std::array<std::atomic<int>, 16> outcome;  // 1 + ErrorKind
};

// Ranks as processes, one of which is killed while all reduce without end.
void KillOne(const std::vector<int>& nodes, int victim) {
  auto* board = static_cast<Board*>(
      mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  ASSERT_NE(board, MAP_FAILED);
  ThreadWorld world(nodes, kLong);
  std::vector<pid_t> children;
  for (int rank = 0; rank < world.size(); ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      auto group = world.Join(rank);
      if (!group) _exit(9);
      std::vector<int64_t> values(5000);
      Status status;
      while (status) {
        status = (*group)->AllReduce(values);
        if (rank == victim) board->rounds.fetch_add(1);
      }
      board->outcome[rank] = 1 + static_cast<int>(status.error().kind);
      _exit(0);
    }
    ASSERT_GT(pid, 0);
    children.push_back(pid);
  }
  while (board->rounds.load() < 20) std::this_thread::yield();
  kill(children[victim], SIGKILL);
  int status = 0;
  ASSERT_EQ(waitpid(children[victim], &status, 0), children[victim]);
  EXPECT_TRUE(WIFSIGNALED(status));
  // The node agent of the dead rank sees it first.
  if (world.memory(victim) != nullptr) world.memory(victim)->Abort("a rank was killed");
  for (int rank = 0; rank < world.size(); ++rank) {
    if (rank == victim) continue;
    ASSERT_EQ(waitpid(children[rank], &status, 0), children[rank]);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << rank;
    EXPECT_EQ(board->outcome[rank], 1 + static_cast<int>(ErrorKind::kUnavailable)) << rank;
  }
  munmap(board, sizeof(Board));
}

TEST_P(BrokenWorlds, AKilledRankIsAnErrorOnAllOthers) {
  KillOne(nodes(), 0);
  KillOne(nodes(), 3);
}

TEST(SharedMemory, RefusesWhatIsNone) {
  const int plain = memfd_create("plain", MFD_ALLOW_SEALING);
  EXPECT_EQ(SharedMemory::Attach(plain, 0, false).error().kind, ErrorKind::kInvalid);
  ASSERT_EQ(ftruncate(plain, 1 << 20), 0);
  ASSERT_EQ(fcntl(plain, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW), 0);
  EXPECT_NE(SharedMemory::Attach(plain, 0, false).error().message.find("no such mark"), std::string::npos);
  close(plain);
  EXPECT_FALSE(SharedMemory::Attach(-1, 0, false));
  EXPECT_FALSE(SharedMemory::Create(0));
  EXPECT_FALSE(SharedMemory::Create(SharedMemory::kMaxRanks + 1));
  const int memory = SharedMemory::Create(3).value();
  EXPECT_NE(ftruncate(memory, 0), 0);  // sealed
  EXPECT_NE(SharedMemory::Attach(memory, 3, false).error().message.find("3"), std::string::npos);
  EXPECT_EQ(SharedMemory::Attach(memory, 2, false).value()->num_ranks(), 3);
  close(memory);
}

TEST(SharedMemory, AnotherMappingOfTheSameMemory) {
  const int descriptor = SharedMemory::Create(2).value();
  std::vector<std::jthread> threads;
  for (int rank = 0; rank < 2; ++rank) {
    threads.emplace_back([rank, descriptor] {
      const auto memory = SharedMemory::Attach(descriptor, rank, true).value();
      const auto group =
          Communicator::Create({.rank = rank, .node_of_rank = {0, 0}, .memory = memory.get()}).value();
      std::vector<int64_t> values(100'000, rank + 1);
      ASSERT_TRUE(group->AllReduce(values));
      EXPECT_EQ(values, std::vector<int64_t>(100'000, 3));
    });
  }
  threads.clear();
  close(descriptor);
}

// Two ranks on two nodes, each with options of its own.
struct TwoRanks {
  std::vector<Socket> listeners;
  std::vector<MeshOptions> options;
  std::vector<Status> results = std::vector<Status>(2);
  TwoRanks() {
    std::vector<std::string> addresses;
    for (int rank = 0; rank < 2; ++rank) {
      listeners.push_back(Listen({"127.0.0.1", 0}).value());
      addresses.push_back(LocalEndpoint(listeners.back())->Text());
    }
    for (int rank = 0; rank < 2; ++rank)
      options.push_back(
          {.rank = rank, .node_of_rank = {0, 1}, .addresses = addresses, .secret = "s", .epoch = 7});
  }
  void Connect(milliseconds time) {
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < 2; ++rank)
      threads.emplace_back([this, rank, time] {
        auto mesh = TcpMesh::Connect(listeners[rank], options[rank], After(time));
        if (!mesh) results[rank] = std::unexpected(mesh.error());
      });
  }
};

TEST(TcpMesh, AnotherSecretIsRefused) {
  TwoRanks ranks;
  ranks.options[1].secret = "t";
  ranks.Connect(milliseconds(300));
  EXPECT_TRUE(Says(ranks.results[1], ErrorKind::kUnavailable, "another cluster secret"));
  EXPECT_TRUE(Says(ranks.results[0], ErrorKind::kDeadline, "rank 1 did not connect in time"));
  EXPECT_TRUE(Says(ranks.results[0], ErrorKind::kDeadline, "another cluster secret"));
}

TEST(TcpMesh, AnotherEpochIsRefusedWithBoth) {
  TwoRanks ranks;
  ranks.options[1].epoch = 6;
  ranks.Connect(milliseconds(300));
  EXPECT_TRUE(Says(ranks.results[1], ErrorKind::kInvalid, "rank 0 is in epoch 7, rank 1 in epoch 6"));
  EXPECT_TRUE(Says(ranks.results[0], ErrorKind::kDeadline, "rank 1 is in epoch 6, rank 0 in epoch 7"));
}

TEST(TcpMesh, AnotherWorldOrRankIsRefusedWithBoth) {
  TwoRanks ranks;
  ranks.options[1].node_of_rank = {0, 1, 1};
  ranks.options[1].addresses.push_back("");
  ranks.Connect(milliseconds(300));
  EXPECT_TRUE(Says(ranks.results[1], ErrorKind::kInvalid, "rank 0 is in a world of 2 ranks"));
}

TEST(TcpMesh, AnAddressOfAnotherRankIsRefusedWithBoth) {
  const Socket listener = Listen({"127.0.0.1", 0}).value();
  const std::string address = LocalEndpoint(listener)->Text();
  MeshOptions options{.rank = 1, .node_of_rank = {0, 0, 1}, .addresses = {"", "", ""}, .epoch = 7};
  std::jthread rank_1([&listener, options] {
    EXPECT_TRUE(Says(StatusOf(TcpMesh::Connect(listener, options, After(milliseconds(300)))),
                     ErrorKind::kDeadline, "rank 2 looks for rank 0, here is rank 1"));
  });
  options.rank = 2;
  options.addresses = {address, address, ""};
  EXPECT_TRUE(Says(StatusOf(TcpMesh::Connect(listener, options, After(milliseconds(300)))),
                   ErrorKind::kInvalid, "is rank 1"));
}

TEST(TcpMesh, SilentAndTalkingStrangersBlockNobody) {
  TwoRanks ranks;
  const Endpoint endpoint = LocalEndpoint(ranks.listeners[0]).value();
  std::vector<Socket> strangers;
  for (int i = 0; i < 30; ++i) strangers.push_back(tessera::Connect(endpoint, After(seconds(1))).value());
  const std::string request = "GET / HTTP/1.1\r\nHost: a stranger that talks at some length\r\n\r\n";
  ASSERT_TRUE(WriteAll(strangers[3], std::as_bytes(std::span(request)), After(seconds(1))));
  ranks.Connect(seconds(20));
  for (const Status& status : ranks.results) EXPECT_TRUE(status) << status.error().message;
}

TEST(TcpMesh, APeerThatListensLaterIsFound) {
  TwoRanks ranks;
  const Endpoint endpoint = LocalEndpoint(ranks.listeners[0]).value();
  ranks.listeners[0] = Socket();
  std::jthread late([&] {
    std::this_thread::sleep_for(milliseconds(60));  // the moment itself is under test
    const Socket listener = Listen(endpoint).value();
    EXPECT_TRUE(TcpMesh::Connect(listener, ranks.options[0], After(seconds(10))));
  });
  EXPECT_TRUE(TcpMesh::Connect(ranks.listeners[1], ranks.options[1], After(seconds(10))));
}

TEST(TcpMesh, NobodyThereIsADeadline) {
  TwoRanks ranks;
  ranks.listeners[0] = Socket();
  const auto mesh = TcpMesh::Connect(ranks.listeners[1], ranks.options[1], After(milliseconds(100)));
  ASSERT_FALSE(mesh);
  EXPECT_EQ(mesh.error().kind, ErrorKind::kDeadline);
  EXPECT_NE(mesh.error().message.find("rank 0"), std::string::npos) << mesh.error().message;
}

}  // namespace
}  // namespace tessera
