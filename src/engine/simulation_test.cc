// The scheduler in a virtual world: seeded arrivals, cancels, tiny pools, every option, failing sequences, on
// a virtual clock with hands that check every page they read. Whatever happens around a request, it ends
// exactly once and with exactly what it answers when it runs alone.
//
// TESSERA_SIMULATION_SEEDS=n runs n seeds, TESSERA_SIMULATION_SEED=s replays one.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <optional>

#include "base/clock.h"
#include "base/format.h"
#include "base/random.h"
#include "engine/fake_executor.h"
#include "engine/scheduler.h"

namespace tessera {
namespace {

using test::FakeExecutor;

// About two seconds; sanitizers make it ten times slower.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TESSERA_UNDER_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TESSERA_UNDER_SANITIZER 1
#endif
#endif
#ifdef TESSERA_UNDER_SANITIZER
constexpr int kDefaultSeeds = 1000;
#else
constexpr int kDefaultSeeds = 5000;
#endif
constexpr int kVocabSize = 40;
constexpr int32_t kEos = 0, kPoison = 39;

// All that a sequence ever said.
struct Answer {
  std::string text;  // tokens and logprobs, in order
  std::string prompt;
  FinishReason finish = FinishReason::kNone;
  int32_t stop_token = -1;
  std::string error;
  int num_ends = 0;
};

std::string Print(const RowOutput& row) {
  std::string text = Format("{}:{}", row.token, row.logprob);
  for (const TokenLogprob& top : row.top) text += Format(",{}", top.token);
  return text + " ";
}

void Take(const TokenEvent& event, Answer& answer) {
  if (answer.num_ends > 0) ADD_FAILURE() << "an event after the end";
  for (const RowOutput& row : event.tokens) answer.text += Print(row);
  if (!event.prompt.empty() && !answer.prompt.empty()) ADD_FAILURE() << "prompt rows came twice";
  for (const RowOutput& row : event.prompt) answer.prompt += Print(row);
  if (event.finish == FinishReason::kNone) return;
  ++answer.num_ends;
  answer.finish = event.finish;
  answer.stop_token = event.stop_token;
  answer.error = event.error.message;
}

using Answers = std::map<std::pair<uint64_t, int>, Answer>;  // by (key, choice)

EngineOptions RandomOptions(RandomStream& random) {
  EngineOptions options;
  options.num_groups = 1 + static_cast<int>(random.Below(4));
  options.block_size = 1 << random.Below(4);
  options.max_model_len = 40;
  options.num_blocks =
      40 / options.block_size + 1 + static_cast<int>(random.Below(60 / options.block_size + 1));
  options.max_num_seqs = 1 + static_cast<int>(random.Below(6));
  options.max_num_batched_tokens =
      random.Below(4) == 0 ? 200 : options.max_num_seqs + static_cast<int>(random.Below(30));
  options.enable_chunked_prefill = random.Below(4) != 0;
  options.enable_prefix_caching = random.Below(4) != 0;
  options.vocab_size = kVocabSize;
  return options;
}

Request RandomRequest(RandomStream& random, uint64_t key, bool allow_poison) {
  Request request;
  request.id = Format("{}", key);
  // Prompts branch off few shared beginnings, so that prefixes meet in the cache.
  RandomStream shared(random.Below(2), 1);
  const int num_shared = static_cast<int>(random.Below(20));
  for (int i = 0; i < num_shared; ++i)
    request.prompt.push_back(1 + static_cast<int32_t>(shared.Below(kVocabSize - 2)));
  const int num_own = static_cast<int>(random.Below(8)) + (num_shared == 0);
  for (int i = 0; i < num_own; ++i)
    request.prompt.push_back(1 + static_cast<int32_t>(random.Below(kVocabSize - 2)));
  if (allow_poison && random.Below(6) == 0) request.prompt[random.Below(request.prompt.size())] = kPoison;
  if (random.Below(5) == 0) request.cache_salt = "salt";
  request.num_choices = random.Below(4) == 0 ? 1 + static_cast<int>(random.Below(4)) : 1;
  SamplingParams& sampling = request.sampling;
  sampling.seed = random.Below(3);
  sampling.max_tokens = static_cast<int32_t>(random.Below(25));
  sampling.eos_ids = {kEos};
  sampling.ignore_eos = random.Below(4) == 0;
  if (random.Below(3) == 0) sampling.min_tokens = static_cast<int32_t>(random.Below(5));
  if (random.Below(4) == 0) sampling.stop_token_ids = {3, 4};
  if (random.Below(4) == 0) sampling.repetition_penalty = 1.1f;
  if (random.Below(4) == 0) sampling.frequency_penalty = 0.5f;
  if (random.Below(6) == 0) sampling.bad_words = {{7}, {8, 9}, {10, 11, 12}};
  if (random.Below(8) == 0) sampling.allowed_token_ids = {0, 1, 2, 3, 5, 8, 13};
  if (random.Below(3) == 0) sampling.num_logprobs = static_cast<int32_t>(random.Below(3));
  if (random.Below(4) == 0) sampling.num_prompt_logprobs = static_cast<int32_t>(random.Below(3));
  if (!allow_poison) sampling.logit_bias = {{kPoison, -100.0f}};
  return request;
}

FakeExecutor MakeExecutor(const EngineOptions& options, bool poison) {
  return FakeExecutor({.num_groups = options.num_groups,
                       .num_blocks = options.num_blocks,
                       .block_size = options.block_size,
                       .vocab_size = kVocabSize,
                       .poison_token = poison ? kPoison : -1});
}

// One step. Nothing may be lost between the pool and the tables.
void RunStep(Scheduler& scheduler, FakeExecutor& executor, VirtualClock& clock, Answers& answers) {
  std::vector<SequenceEvent> events;
  const Step& step = scheduler.Plan(clock.Now());
  clock.Advance(1000);
  StepOutput output = executor.Run(step).value();
  const Status shape = scheduler.CheckOutput(output);
  ASSERT_TRUE(shape) << shape.error().message;
  scheduler.Commit(std::move(output), clock.Now(), events);
  for (const SequenceEvent& event : events) {
    ASSERT_EQ(event.event.time, clock.Now());
    Take(event.event, answers[{event.key, event.event.choice}]);
  }
  ASSERT_EQ(executor.complaints(), std::vector<std::string>{});
}

// What the request answers with the world to itself: a roomy pool, whole prompts, no cache.
void RunAlone(uint64_t key, const Request& request, bool poison, Answers& answers) {
  EngineOptions options;
  options.block_size = 8;
  options.num_blocks = 64;
  options.max_model_len = 40;
  options.enable_prefix_caching = false;
  options.vocab_size = kVocabSize;
  FakeExecutor executor = MakeExecutor(options, poison);
  Scheduler scheduler(options);
  VirtualClock clock;
  scheduler.Add(key, std::make_shared<Request>(request));
  while (!scheduler.idle()) {
    ASSERT_NO_FATAL_FAILURE(RunStep(scheduler, executor, clock, answers));
  }
}

class World {
 public:
  explicit World(uint64_t seed)
      : random_(seed),
        poison_(random_.Below(3) == 0),
        options_(RandomOptions(random_)),
        executor_(MakeExecutor(options_, poison_)),
        scheduler_(options_) {}

  void Run() {
    const uint64_t num_requests = 1 + random_.Below(14);
    const uint32_t burst = 1 + random_.Below(8);
    const bool cancels = random_.Below(2) == 0;
    for (int step = 0; requests_.size() < num_requests || !scheduler_.idle(); ++step) {
      ASSERT_LT(step, 5000) << "no progress";
      if (requests_.size() < num_requests && (scheduler_.idle() || random_.Below(burst) == 0)) Arrive();
      if (cancels && !requests_.empty() && random_.Below(12) == 0) Cancel();
      scheduler_.CheckInvariants();
      ASSERT_NO_FATAL_FAILURE(RunStep(scheduler_, executor_, clock_, answers_));
      scheduler_.CheckInvariants();
    }
    const EngineStats stats = scheduler_.stats();
    EXPECT_EQ(stats.num_blocks_used, 0);
    EXPECT_EQ(stats.num_running + stats.num_waiting, 0);
    EXPECT_LE(stats.prefix_hits, stats.prefix_queries);
    for (const auto& [key, request] : requests_) ASSERT_NO_FATAL_FAILURE(Compare(key, request));
  }

  const EngineStats stats() const { return scheduler_.stats(); }

 private:
  void Arrive() {
    const uint64_t key = 1 + requests_.size();
    Request request = RandomRequest(random_, key, poison_);
    if (!CheckRequest(options_, request)) request.prompt.resize(1);
    requests_[key] = request;
    scheduler_.Add(key, std::make_shared<Request>(request));
  }

  void Cancel() {
    const uint64_t key = 1 + random_.Below(static_cast<uint32_t>(requests_.size()));
    const int num_choices = requests_[key].num_choices;
    if (random_.Below(2) == 0) {
      for (int choice = 0; choice < num_choices; ++choice) Silence(key, choice);
      scheduler_.Cancel(key);
    } else {
      const int choice = static_cast<int>(random_.Below(num_choices));
      Silence(key, choice);
      scheduler_.CancelChoice(key, choice);
    }
  }

  void Silence(uint64_t key, int choice) {
    const Answer& so_far = answers_[{key, choice}];
    if (so_far.num_ends == 0) cancelled_.try_emplace({key, choice}, so_far.text);
  }

  void Compare(uint64_t key, const Request& request) {
    Answers alone;
    ASSERT_NO_FATAL_FAILURE(RunAlone(key, request, poison_, alone));
    for (int choice = 0; choice < request.num_choices; ++choice) {
      SCOPED_TRACE(Format("request {} choice {}", key, choice));
      const Answer& seen = answers_[{key, choice}];
      const Answer& wanted = alone[{key, choice}];
      ASSERT_EQ(wanted.num_ends, 1);
      if (const auto silenced = cancelled_.find({key, choice}); silenced != cancelled_.end()) {
        EXPECT_EQ(seen.text, silenced->second) << "an event after the cancel";
        EXPECT_TRUE(wanted.text.starts_with(seen.text)) << seen.text << " against " << wanted.text;
        EXPECT_EQ(seen.num_ends, 0);
        continue;
      }
      EXPECT_EQ(seen.num_ends, 1);
      EXPECT_EQ(seen.text, wanted.text);
      EXPECT_EQ(seen.prompt, wanted.prompt);
      EXPECT_EQ(seen.finish, wanted.finish);
      EXPECT_EQ(seen.stop_token, wanted.stop_token);
      EXPECT_EQ(seen.error, wanted.error);
    }
  }

  RandomStream random_;
  const bool poison_;
  const EngineOptions options_;
  FakeExecutor executor_;
  Scheduler scheduler_;
  VirtualClock clock_;
  std::map<uint64_t, Request> requests_;
  Answers answers_;
  std::map<std::pair<uint64_t, int>, std::string> cancelled_;  // what was said before
};

std::optional<uint64_t> Setting(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? std::nullopt : std::optional(std::strtoull(text, nullptr, 10));
}

TEST(Simulation, EveryRequestAnswersAsIfAlone) {
  const auto one = Setting("TESSERA_SIMULATION_SEED");
  const uint64_t first = one.value_or(0);
  const uint64_t count = one ? 1 : Setting("TESSERA_SIMULATION_SEEDS").value_or(kDefaultSeeds);
  uint64_t num_preemptions = 0, num_hits = 0;
  for (uint64_t seed = first; seed < first + count; ++seed) {
    SCOPED_TRACE(Format("replay with TESSERA_SIMULATION_SEED={}", seed));
    World world(seed);
    world.Run();
    if (HasFailure()) return;
    num_preemptions += world.stats().num_preemptions;
    num_hits += world.stats().prefix_hits;
  }
  // A world in which these never happen would prove little.
  if (one || count < 200) return;
  EXPECT_GT(num_preemptions, count / 4);
  EXPECT_GT(num_hits, count);
}

}  // namespace
}  // namespace tessera
