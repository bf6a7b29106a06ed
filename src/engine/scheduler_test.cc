// What the scheduler plans, step by step, as tables; and what it says about outputs. The simulation has the
// rest.
#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include "base/format.h"
#include "engine/fake_executor.h"

namespace tessera {
namespace {

using test::FakeExecutor;

constexpr int kVocabSize = 2000;

EngineOptions Options() {
  EngineOptions options;
  options.num_blocks = 1000;
  options.block_size = 16;
  options.max_num_seqs = 256;
  options.max_num_batched_tokens = 1024;
  options.max_model_len = 1024;
  options.vocab_size = kVocabSize;
  return options;
}

std::shared_ptr<Request> Prompt(int first_token, int num_tokens, int max_tokens = 16) {
  auto request = std::make_shared<Request>();
  for (int i = 0; i < num_tokens; ++i) request->prompt.push_back((first_token + i) % kVocabSize);
  request->sampling.max_tokens = max_tokens;
  return request;
}

// A scheduler and its hands.
class Bench {
 public:
  explicit Bench(const EngineOptions& options)
      : scheduler(options),
        executor({.num_groups = options.num_groups,
                  .num_blocks = options.num_blocks,
                  .block_size = options.block_size,
                  .vocab_size = options.vocab_size}) {}

  void Add(std::shared_ptr<const Request> request) { scheduler.Add(++last_key, std::move(request)); }

  // Plans and carries out one step; says per group what it held: "<computed>+<tokens>", in order.
  std::string Run() {
    step = scheduler.Plan(++now);
    StepOutput output = executor.Run(step).value();
    std::string shape;
    for (const GroupStep& group : step.groups) {
      if (&group != step.groups.data()) shape += "| ";
      for (const SequenceSlice& slice : group.sequences) {
        shape += Format("{}+{} ", slice.num_computed, slice.num_tokens);
      }
    }
    events.clear();
    scheduler.Commit(std::move(output), ++now, events);
    scheduler.CheckInvariants();
    EXPECT_EQ(executor.complaints(), std::vector<std::string>{});
    return shape;
  }

  Scheduler scheduler;
  FakeExecutor executor;
  uint64_t last_key = 0;
  TimeNs now = 0;
  Step step;
  std::vector<SequenceEvent> events;
};

std::string Times(int count, const std::string& text) {
  std::string all;
  for (int i = 0; i < count; ++i) all += text;
  return all;
}

// model.md section 10, "scheduler": 15 requests of 100 tokens, budget 1024.
TEST(SchedulerTable, ChunkedPrefill) {
  EngineOptions options = Options();
  options.enable_prefix_caching = false;
  Bench bench(options);
  for (int i = 0; i < 15; ++i) bench.Add(Prompt(100 * i, 100));
  EXPECT_EQ(bench.Run(), Times(10, "0+100 ") + "0+24 ");
  EXPECT_EQ(bench.events.size(), 10u);
  // Ten decode, the eleventh goes on, four are new.
  EXPECT_EQ(bench.Run(), Times(10, "100+1 ") + "24+76 " + Times(4, "0+100 "));
  EXPECT_EQ(bench.events.size(), 15u);
}

TEST(SchedulerTable, PrefillFirstWithoutChunksAndCache) {
  EngineOptions options = Options();
  options.enable_prefix_caching = false;
  options.enable_chunked_prefill = false;
  Bench bench(options);
  for (int i = 0; i < 15; ++i) bench.Add(Prompt(100 * i, 100));
  EXPECT_EQ(bench.Run(), Times(10, "0+100 "));
  EXPECT_EQ(bench.Run(), Times(5, "0+100 "));
  EXPECT_EQ(bench.Run(), Times(15, "100+1 "));
}

TEST(SchedulerTable, HitsOfTheSameStepCostNoBudget) {
  EngineOptions options = Options();
  options.enable_chunked_prefill = false;
  Bench bench(options);
  for (int i = 0; i < 15; ++i) bench.Add(Prompt(0, 100));
  EXPECT_EQ(bench.Run(), "0+100 " + Times(14, "96+4 "));
  EXPECT_EQ(bench.scheduler.stats().prefix_queries, 1500u);
  EXPECT_EQ(bench.scheduler.stats().prefix_hits, 14u * 96);
  EXPECT_EQ(bench.events[1].event.num_cached_tokens, 96);
}

TEST(Scheduler, NeverCachesAWholePrompt) {
  Bench bench(Options());
  bench.Add(Prompt(0, 64, 1));
  EXPECT_EQ(bench.Run(), "0+64 ");
  bench.Add(Prompt(0, 64, 1));
  EXPECT_EQ(bench.Run(), "48+16 ");
}

// What a prompt token is computed in depends on the length of its prompt (numerics.md, "form"): blocks are
// shared where the forms agree.
TEST(Scheduler, FormsDoNotShareBlocks) {
  Bench bench(Options());
  bench.Add(Prompt(0, 250, 31));
  for (int i = 0; i < 31; ++i) bench.Run();
  auto follow_up = Prompt(0, 250, 1);  // as a chat goes on: its prompt holds the answer
  for (int i = 0; i < 50; ++i) follow_up->prompt.push_back(i);
  bench.Add(follow_up);
  EXPECT_EQ(bench.Run(), "0+300 ");  // 256 expanded: none of the first one's
  EXPECT_EQ(bench.step.groups[0].sequences[0].num_expanded, 256);
  bench.Add(Prompt(0, 250, 1));
  EXPECT_EQ(bench.Run(), "240+10 ");
  EXPECT_EQ(bench.step.groups[0].sequences[0].num_expanded, 0);
  bench.Add(Prompt(0, 540, 1));
  EXPECT_EQ(bench.Run(), "240+300 ");  // the follow-up's, whose tokens are equal up to 250
  bench.Add(Prompt(0, 600, 1));
  EXPECT_EQ(bench.Run(), "528+72 ");  // 512 are expanded in both, the next block in neither
}

TEST(Scheduler, SaltIsolatesAndPromptLogprobsDoNotRead) {
  Bench bench(Options());
  bench.Add(Prompt(0, 40, 1));
  bench.Run();
  auto salted = Prompt(0, 40, 1);
  salted->cache_salt = "tenant";
  auto with_rows = Prompt(0, 40, 1);
  with_rows->sampling.num_prompt_logprobs = 0;
  bench.Add(salted);
  bench.Add(with_rows);
  bench.Add(Prompt(0, 40, 1));
  EXPECT_EQ(bench.Run(), "0+40 0+40 32+8 ");
  EXPECT_EQ(bench.events[1].event.prompt.size(), 39u);
  EXPECT_EQ(bench.events[1].event.prompt[0].token, 1);
  EXPECT_EQ(bench.events[1].event.prompt[38].token, 39);
}

TEST(Scheduler, PreemptsTheLastAndAdmitsNobodyInThatStep) {
  EngineOptions options = Options();
  options.block_size = 4;
  options.num_blocks = 4;
  options.enable_prefix_caching = false;
  options.max_model_len = 16;
  Bench bench(options);
  bench.Add(Prompt(0, 7, 9));
  bench.Add(Prompt(50, 7, 9));
  bench.Add(Prompt(90, 1, 1));
  EXPECT_EQ(bench.Run(), "0+7 0+7 ");  // two blocks each: the pool is full
  EXPECT_EQ(bench.Run(), "7+1 7+1 ");
  EXPECT_EQ(bench.Run(), "8+1 ");  // the first needs a third block: the second is preempted
  EXPECT_EQ(bench.scheduler.stats().num_preemptions, 1u);
  EXPECT_EQ(bench.scheduler.stats().num_waiting, 2);
  EXPECT_EQ(bench.Run(), "9+1 ");  // the preempted one is the head; nobody passes it
  for (int i = 0; i < 5; ++i) bench.Run();
  EXPECT_EQ(bench.step.groups[0].sequences[0].num_computed, 14);
  EXPECT_EQ(bench.Run(), "0+9 0+1 ");  // prompt and both tokens again
}

TEST(Scheduler, GroupsTakeTurnsAndIdleGroupsAreEmpty) {
  EngineOptions options = Options();
  options.num_groups = 3;
  Bench bench(options);
  bench.Add(Prompt(0, 5));
  bench.Add(Prompt(10, 6));
  EXPECT_EQ(bench.Run(), "0+5 | 0+6 | ");
  EXPECT_TRUE(bench.step.groups[2].tokens.empty());
  auto four = Prompt(20, 7);
  four->num_choices = 4;
  bench.Add(four);
  EXPECT_EQ(bench.Run(), "5+1 0+7 | 6+1 0+7 | 0+7 0+7 ");
  // The idle group got the first choice, then the first of the least loaded ones in turn.
  const auto choice = [&](int group, int row) { return bench.step.groups[group].sampling[row].choice; };
  EXPECT_EQ(choice(2, 0), 0u);
  EXPECT_EQ(choice(0, 1), 1u);
  EXPECT_EQ(choice(1, 1), 2u);
  EXPECT_EQ(choice(2, 1), 3u);
}

TEST(Scheduler, APromptGoesWhereItsPrefixIs) {
  EngineOptions options = Options();
  options.num_groups = 3;
  Bench bench(options);
  bench.Add(Prompt(0, 800, 1));
  bench.Run();
  const std::vector<GroupStats> before = bench.scheduler.stats().groups;
  const auto home = std::ranges::find_if(before, [](const GroupStats& g) { return g.prompt_tokens > 0; });
  const auto index = static_cast<size_t>(home - before.begin());
  // The same beginning comes back to the same group, even as further answers of one request ...
  auto again = Prompt(0, 700, 1);
  again->num_choices = 3;
  bench.Add(again);
  bench.Run();
  EXPECT_EQ(bench.scheduler.stats().groups[index].prompt_tokens, 800U + 3 * 700U);
  EXPECT_GT(bench.scheduler.stats().groups[index].prefix_hits, 3 * 600U);
  // ... until others wait there for longer than computing it anew would take.
  for (int i = 0; i < 6; ++i) bench.Add(Prompt(0, 700, 1));
  const std::vector<GroupStats> after = bench.scheduler.stats().groups;
  EXPECT_GT(after[index].num_waiting, 0);
  EXPECT_LT(after[index].num_waiting, 6);
}

TEST(Scheduler, PromptAloneRunsOnlyWhatLogprobsNeed) {
  Bench bench(Options());
  auto with_rows = Prompt(0, 5, 0);
  with_rows->sampling.num_prompt_logprobs = 2;
  bench.Add(with_rows);
  bench.Add(Prompt(0, 5, 0));
  EXPECT_EQ(bench.Run(), "0+4 ");
  ASSERT_EQ(bench.events.size(), 2u);
  for (const SequenceEvent& event : bench.events) {
    EXPECT_EQ(event.event.finish, FinishReason::kLength);
    EXPECT_TRUE(event.event.tokens.empty());
    EXPECT_EQ(event.event.prompt.size(), event.key == 1 ? 4u : 0u);
  }
  EXPECT_TRUE(bench.scheduler.idle());
}

TEST(Scheduler, PromptLogprobsAreCutToALimitOfLogits) {
  EngineOptions options = Options();
  options.vocab_size = 1 << 20;  // 64 rows of it are the limit
  Bench bench(options);
  auto with_rows = Prompt(0, 150, 1);
  with_rows->sampling.num_prompt_logprobs = 0;
  bench.Add(with_rows);
  EXPECT_EQ(bench.Run(), "0+64 ");
  EXPECT_EQ(bench.Run(), "64+64 ");
  EXPECT_EQ(bench.Run(), "128+22 ");
  ASSERT_EQ(bench.events.size(), 1u);
  EXPECT_EQ(bench.events[0].event.prompt.size(), 149u);
}

// The row of the first sequence's next draw.
struct DrawState {
  std::vector<int32_t> forbidden, allowed;
  std::string counts;
};
DrawState NextDraw(const Step& step) {
  const GroupStep& group = step.groups[0];
  const SamplingRow& row = group.sampling[0];
  const auto list = [&](int begin, int end) {
    return begin < 0
               ? std::vector<int32_t>{}
               : std::vector<int32_t>(group.token_lists.begin() + begin, group.token_lists.begin() + end);
  };
  DrawState state{.forbidden = list(row.forbidden_begin, row.forbidden_end),
                  .allowed = list(row.allowed_begin, row.allowed_end),
                  .counts = ""};
  for (int i = row.counts_begin; i < row.counts_end; ++i) {
    const TokenCount& count = group.counts[i];
    state.counts += Format("{}:{}/{} ", count.token, count.in_output, count.in_prompt);
  }
  return state;
}

TEST(Scheduler, SamplingStateFollowsTheSequence) {
  Bench bench(Options());
  auto request = Prompt(5, 2, 6);
  request->prompt = {5, 6, 5};
  SamplingParams& sampling = request->sampling;
  sampling.repetition_penalty = 1.5f;
  sampling.allowed_token_ids = {8, 9, 10};
  sampling.eos_ids = {1};
  sampling.stop_token_ids = {2};
  sampling.min_tokens = 2;
  sampling.bad_words = {{3}, {5, 8}, {5, 6, 9}, {6, 5, 9}};
  bench.Add(request);
  bench.Run();
  DrawState state = NextDraw(bench.step);
  EXPECT_EQ(state.forbidden, (std::vector<int32_t>{3, 8, 9, 1, 2}));
  EXPECT_EQ(state.allowed, (std::vector<int32_t>{8, 9, 10}));
  EXPECT_EQ(state.counts, "5:0/1 6:0/1 ");
  EXPECT_EQ(bench.step.groups[0].sampling[0].position, 3u);
}

TEST(Scheduler, MinTokensMasksAndThenLetsGo) {
  Bench bench(Options());
  auto request = Prompt(5, 2, 9);
  request->sampling.eos_ids = {1};
  request->sampling.min_tokens = 2;
  request->sampling.presence_penalty = 1;
  bench.Add(request);
  bench.Run();
  EXPECT_EQ(NextDraw(bench.step).forbidden, std::vector<int32_t>{1});
  EXPECT_EQ(NextDraw(bench.step).counts, "");  // the prompt counts for repetition only
  const int32_t first = bench.events[0].event.tokens[0].token;
  bench.Run();
  EXPECT_EQ(NextDraw(bench.step).forbidden, std::vector<int32_t>{1});
  EXPECT_EQ(NextDraw(bench.step).counts, Format("{}:1/0 ", first));
  bench.Run();
  EXPECT_EQ(NextDraw(bench.step).forbidden, std::vector<int32_t>{});
}

// How the first token, the only allowed one, ends the sequence.
struct EndCase {
  const char* name;
  SamplingParams sampling;
  FinishReason finish;
  int32_t stop_token;
};

TEST(Scheduler, EndsInTheOrderEosStopLength) {
  const std::vector<EndCase> cases = {
      {"eos first", {.max_tokens = 1, .eos_ids = {7}, .stop_token_ids = {7}}, FinishReason::kStop, -1},
      {"stop before length", {.max_tokens = 1, .stop_token_ids = {7}}, FinishReason::kStop, 7},
      {"length", {.max_tokens = 1}, FinishReason::kLength, -1},
      {"ignored eos", {.max_tokens = 1, .ignore_eos = true, .eos_ids = {7}}, FinishReason::kLength, -1},
      {"ignored eos still stops by id",
       {.max_tokens = 9, .ignore_eos = true, .eos_ids = {7}, .stop_token_ids = {7}},
       FinishReason::kStop,
       7},
      {"goes on", {.max_tokens = 2}, FinishReason::kNone, -1},
      {"not before min_tokens", {.max_tokens = 3, .min_tokens = 1, .eos_ids = {8}}, FinishReason::kNone, -1},
  };
  for (const EndCase& end : cases) {
    SCOPED_TRACE(end.name);
    Bench bench(Options());
    auto request = Prompt(0, 3);
    request->sampling = end.sampling;
    request->sampling.allowed_token_ids = {7};
    bench.Add(request);
    bench.Run();
    ASSERT_EQ(bench.events.size(), 1u);
    EXPECT_EQ(bench.events[0].event.finish, end.finish);
    EXPECT_EQ(bench.events[0].event.stop_token, end.stop_token);
  }
}

TEST(Scheduler, EndsAtTheModelLength) {
  EngineOptions options = Options();
  options.max_model_len = 5;
  Bench bench(options);
  bench.Add(Prompt(0, 3, 100));
  bench.Run();
  EXPECT_EQ(bench.events[0].event.finish, FinishReason::kNone);
  bench.Run();
  EXPECT_EQ(bench.events[0].event.finish, FinishReason::kLength);
}

TEST(Scheduler, RefusesWhatCanNeverRun) {
  EngineOptions options = Options();
  options.num_blocks = 4;
  const auto why = [&](const std::shared_ptr<Request>& request) {
    const Status status = CheckRequest(options, *request);
    return status ? std::string() : status.error().message;
  };
  EXPECT_EQ(why(Prompt(0, 60, 5)), "");  // 64 positions: the last token needs none
  EXPECT_EQ(why(Prompt(0, 60, 6)),
            "prompt (60 tokens) and max_tokens (6) need 5 cache blocks of 16 tokens, the cache has 4");
  EXPECT_NE(why(Prompt(0, 1024, 1)).find("maximum context length is 1024"), std::string::npos);
  auto foreign = Prompt(0, 3);
  foreign->prompt[1] = kVocabSize;
  EXPECT_EQ(why(foreign), "prompt holds token id 2000, ids are 0 .. 1999");
  foreign = Prompt(0, 3);
  foreign->sampling.bad_words = {{1, -1}};
  EXPECT_NE(why(foreign), "");
  options.enable_chunked_prefill = false;
  options.max_num_batched_tokens = 32;
  EXPECT_NE(why(Prompt(0, 33, 1)), "");
  EXPECT_EQ(why(Prompt(0, 32, 1)), "");
}

TEST(Scheduler, RefusesOutputsOfAnotherShape) {
  Bench bench(Options());
  bench.Add(Prompt(0, 3));
  const Step& step = bench.scheduler.Plan(1);
  StepOutput output = bench.executor.Run(step).value();
  EXPECT_TRUE(bench.scheduler.CheckOutput(output));
  output.groups[0].rows[0].token = kVocabSize;
  EXPECT_FALSE(bench.scheduler.CheckOutput(output));
  output.groups[0].rows.clear();
  EXPECT_FALSE(bench.scheduler.CheckOutput(output));
  output.groups.clear();
  EXPECT_FALSE(bench.scheduler.CheckOutput(output));
}

TEST(Scheduler, EndAllEndsWhatRunsAndWaitsOnce) {
  EngineOptions options = Options();
  options.max_num_seqs = 1;
  Bench bench(options);
  bench.Add(Prompt(0, 3));
  bench.Add(Prompt(0, 3));
  bench.Add(Prompt(0, 3, 0));
  bench.scheduler.Plan(1);  // still open
  std::vector<SequenceEvent> events;
  bench.scheduler.EndAll(FinishReason::kAbort, {ErrorKind::kUnavailable, "over"}, 2, events);
  ASSERT_EQ(events.size(), 3u);
  for (const SequenceEvent& event : events) EXPECT_EQ(event.event.finish, FinishReason::kAbort);
  EXPECT_TRUE(bench.scheduler.idle());
  bench.scheduler.CheckInvariants();
}

}  // namespace
}  // namespace tessera
