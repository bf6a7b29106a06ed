// The engine's thread: everything that is asked of it from other threads, with hands that can be held.
#include "engine/engine.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>

#include "base/format.h"
#include "engine/fake_executor.h"

namespace tessera {
namespace {

using test::FakeExecutor;
using test::FakeExecutorOptions;

constexpr FakeExecutorOptions kCache = {.num_groups = 2, .num_blocks = 64, .block_size = 4, .vocab_size = 50};

// Room for answers that last longer than any test waits.
constexpr FakeExecutorOptions kLongCache = {
    .num_groups = 2, .num_blocks = 64, .block_size = 1024, .vocab_size = 50};
constexpr int kLong = 30000;

EngineOptions Options() {
  EngineOptions options;
  options.num_groups = kCache.num_groups;
  options.num_blocks = kCache.num_blocks;
  options.block_size = kCache.block_size;
  options.vocab_size = kCache.vocab_size;
  options.max_num_seqs = 4;
  options.max_model_len = 256;
  return options;
}

EngineOptions LongOptions() {
  EngineOptions options = Options();
  options.block_size = kLongCache.block_size;
  options.max_model_len = 2 * kLong;
  return options;
}

// Carries steps out only while the gate is open, and breaks when told.
class GatedExecutor : public Executor {
 public:
  explicit GatedExecutor(const FakeExecutorOptions& cache = kCache) : executor_(cache) {}
  Result<StepOutput> Run(const Step& step) override {
    std::unique_lock lock(mutex_);
    ++num_entered_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
    if (broken_) return Fail(ErrorKind::kUnavailable, "rank 1 is gone");
    return executor_.Run(step);
  }
  void SetOpen(bool open) {
    std::lock_guard lock(mutex_);
    open_ = open;
    changed_.notify_all();
  }
  void Break() {
    std::lock_guard lock(mutex_);
    broken_ = true;
  }
  // Until a step waits at the gate (or has run).
  void AwaitStep() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return num_entered_ > 0; });
  }
  std::vector<std::string> complaints() {
    std::lock_guard lock(mutex_);
    return executor_.complaints();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true, broken_ = false;
  int num_entered_ = 0;
  FakeExecutor executor_;
};

// A client: an outbox whose events can be awaited.
class Client {
 public:
  Client() {
    outbox = std::make_shared<Outbox>([this] {
      std::lock_guard lock(mutex_);
      ++num_notified_;
      changed_.notify_all();
    });
  }
  // Until `count` sequences have ended.
  std::vector<TokenEvent> AwaitEnds(int count) {
    std::vector<TokenEvent> all;
    int num_ends = 0, num_seen = 0;
    while (num_ends < count) {
      {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return num_notified_ > num_seen; });
        num_seen = num_notified_;
      }
      for (TokenEvent& event : outbox->Take()) {
        num_ends += event.finish != FinishReason::kNone;
        all.push_back(std::move(event));
      }
    }
    return all;
  }
  std::shared_ptr<Outbox> outbox;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int num_notified_ = 0;
};

std::shared_ptr<Request> Ask(const std::string& id, int max_tokens, int num_choices = 1) {
  auto request = std::make_shared<Request>();
  request->id = id;
  request->prompt = {1, 2, 3, 4, 5, 6};
  request->num_choices = num_choices;
  request->sampling.max_tokens = max_tokens;
  return request;
}

TEST(Outbox, NotifiesWhenItTurnsNotEmpty) {
  int num_notified = 0;
  Outbox outbox([&] { ++num_notified; });
  outbox.Put({.choice = 0});
  outbox.Put({.choice = 1});
  EXPECT_EQ(num_notified, 1);
  const auto events = outbox.Take();
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[1].choice, 1);
  EXPECT_TRUE(outbox.Take().empty());
  outbox.Put({});
  EXPECT_EQ(num_notified, 2);
}

class EngineTest : public testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(executor.complaints(), std::vector<std::string>{}); }
  SteadyClock clock;
  GatedExecutor executor;
};

TEST_F(EngineTest, AnswersEveryChoice) {
  Engine engine(Options(), executor, clock);
  Client client;
  ASSERT_TRUE(engine.Submit(Ask("a", 5, 3), client.outbox));
  std::vector<int> num_tokens(3), num_ends(3);
  for (const TokenEvent& event : client.AwaitEnds(3)) {
    num_tokens[event.choice] += static_cast<int>(event.tokens.size());
    num_ends[event.choice] += event.finish == FinishReason::kLength;
  }
  EXPECT_EQ(num_tokens, (std::vector<int>{5, 5, 5}));
  EXPECT_EQ(num_ends, (std::vector<int>{1, 1, 1}));
  EXPECT_EQ(engine.Stats().generation_tokens, 15u);
  EXPECT_EQ(engine.Stats().prompt_tokens, 18u);
  EXPECT_EQ(engine.Stats().num_blocks_used, 0);
  EXPECT_GT(engine.Stats().last_step_end, 0);
}

TEST_F(EngineTest, ManyThreadsSubmitAndCancel) {
  Engine engine(Options(), executor, clock);
  constexpr int kThreads = 4, kRequests = 60;
  std::vector<std::thread> threads;
  std::atomic<int> num_finished = 0;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = 0; i < kRequests; ++i) {
        Client client;
        const std::string id = Format("{}-{}", thread, i);
        ASSERT_TRUE(engine.Submit(Ask(id, 1 + i % 7, 1 + i % 3), client.outbox));
        if (i % 4 == 0) {
          engine.Cancel(id);
          client.outbox->Take();
          continue;
        }
        client.AwaitEnds(1 + i % 3);
        ++num_finished;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_finished, kThreads * kRequests * 3 / 4);
  engine.Drain(std::chrono::seconds(10));
}

TEST_F(EngineTest, CancelFreesBlocksAndSaysNothingMore) {
  Engine engine(Options(), executor, clock);
  executor.SetOpen(false);
  Client gone, next;
  ASSERT_TRUE(engine.Submit(Ask("gone", 200), gone.outbox));
  executor.AwaitStep();
  engine.Cancel("gone");
  ASSERT_TRUE(engine.Submit(Ask("gone", 1), next.outbox));  // the id is free at once
  executor.SetOpen(true);
  next.AwaitEnds(1);
  EXPECT_TRUE(gone.outbox->Take().empty());
  EXPECT_EQ(engine.Stats().num_blocks_used, 0);
  EXPECT_EQ(engine.Stats().num_running, 0);
}

TEST_F(EngineTest, CancelOfAnIdleEngineIsSeenInTheStats) {
  Engine engine(Options(), executor, clock);
  executor.SetOpen(false);
  Client client;
  ASSERT_TRUE(engine.Submit(Ask("a", 200, 2), client.outbox));
  executor.AwaitStep();
  engine.CancelChoice("a", 0);
  engine.CancelChoice("a", 1);
  engine.Cancel("a");  // unknown by now
  executor.SetOpen(true);
  while (engine.Stats().num_blocks_used > 0 || engine.Stats().num_running > 0) std::this_thread::yield();
  EXPECT_TRUE(client.outbox->Take().empty());
}

TEST_F(EngineTest, CancelledChoiceIsSilentTheOthersGoOn) {
  Engine engine(Options(), executor, clock);
  executor.SetOpen(false);
  Client client;
  ASSERT_TRUE(engine.Submit(Ask("a", 3, 2), client.outbox));
  engine.CancelChoice("a", 1);
  executor.SetOpen(true);
  for (const TokenEvent& event : client.AwaitEnds(1)) EXPECT_EQ(event.choice, 0);
}

TEST_F(EngineTest, RefusesDuplicatesAndOverflow) {
  EngineOptions options = Options();
  options.max_queued_requests = 2;
  Engine engine(options, executor, clock);
  executor.SetOpen(false);
  Client client;
  ASSERT_TRUE(engine.Submit(Ask("a", 200), client.outbox));
  executor.AwaitStep();
  EXPECT_EQ(engine.Submit(Ask("a", 1), client.outbox).error().kind, ErrorKind::kInvalid);
  auto foreign = Ask("foreign", 1);
  foreign->prompt[3] = kCache.vocab_size;
  EXPECT_EQ(engine.Submit(foreign, client.outbox).error().kind, ErrorKind::kInvalid);
  // What runs at the gate does not count.
  EXPECT_EQ(engine.Stats().num_running, 1);
  EXPECT_TRUE(engine.Submit(Ask("b", 1), client.outbox));
  EXPECT_TRUE(engine.Submit(Ask("c", 1), client.outbox));
  EXPECT_EQ(engine.Stats().num_waiting, 2);
  EXPECT_EQ(engine.Submit(Ask("d", 1), client.outbox).error().kind, ErrorKind::kExhausted);
  engine.Cancel("a");
  executor.SetOpen(true);
  client.AwaitEnds(2);
}

TEST_F(EngineTest, BrokenExecutorEndsEverything) {
  Engine engine(Options(), executor, clock);
  executor.SetOpen(false);
  executor.Break();
  Client client;
  ASSERT_TRUE(engine.Submit(Ask("a", 5, 2), client.outbox));
  executor.AwaitStep();
  ASSERT_TRUE(engine.Submit(Ask("b", 5), client.outbox));
  EXPECT_TRUE(engine.healthy());
  executor.SetOpen(true);
  for (const TokenEvent& event : client.AwaitEnds(3)) {
    EXPECT_EQ(event.finish, FinishReason::kError);
    EXPECT_EQ(event.error.message, "rank 1 is gone");
  }
  EXPECT_FALSE(engine.healthy());
  EXPECT_EQ(engine.fatal_error().message, "rank 1 is gone");
  EXPECT_EQ(engine.Submit(Ask("c", 5), client.outbox).error().kind, ErrorKind::kUnavailable);
  engine.Drain(std::chrono::seconds(10));
}

TEST_F(EngineTest, NewsOfABrokenWorldEndsAnIdleEngine) {
  Engine engine(Options(), executor, clock);
  EXPECT_TRUE(engine.healthy());
  engine.Break({ErrorKind::kUnavailable, "rank 2 was killed"});
  engine.Break({ErrorKind::kUnavailable, "and then another one"});
  while (engine.healthy()) std::this_thread::yield();
  EXPECT_EQ(engine.fatal_error().message, "rank 2 was killed");
  Client client;
  EXPECT_EQ(engine.Submit(Ask("a", 5), client.outbox).error().message, "rank 2 was killed");
}

TEST_F(EngineTest, DrainWaitsForTheRunningOnes) {
  Engine engine(Options(), executor, clock);
  Client client;
  ASSERT_TRUE(engine.Submit(Ask("a", 50, 4), client.outbox));
  engine.Drain(std::chrono::seconds(60));
  for (const TokenEvent& event : client.AwaitEnds(4)) EXPECT_NE(event.finish, FinishReason::kAbort);
  EXPECT_EQ(engine.Submit(Ask("b", 5), client.outbox).error().kind, ErrorKind::kUnavailable);
}

TEST_F(EngineTest, DrainAbortsAtItsLimit) {
  GatedExecutor long_executor(kLongCache);
  Engine engine(LongOptions(), long_executor, clock);
  Client client;
  ASSERT_TRUE(engine.Submit(Ask("a", kLong), client.outbox));
  long_executor.AwaitStep();
  engine.Drain(std::chrono::nanoseconds(0));
  EXPECT_EQ(client.AwaitEnds(1).back().finish, FinishReason::kAbort);
  EXPECT_EQ(engine.Stats().num_blocks_used, 0);
}

TEST_F(EngineTest, DestructionAborts) {
  GatedExecutor long_executor(kLongCache);
  Client client;
  {
    Engine engine(LongOptions(), long_executor, clock);
    ASSERT_TRUE(engine.Submit(Ask("a", kLong), client.outbox));
    ASSERT_TRUE(engine.Submit(Ask("b", kLong), client.outbox));
  }
  int num_aborted = 0;
  for (const TokenEvent& event : client.AwaitEnds(2)) num_aborted += event.finish == FinishReason::kAbort;
  EXPECT_EQ(num_aborted, 2);
}

}  // namespace
}  // namespace tessera
