// Loads checkpoints and runs requests through a whole engine in this process.
#include "support/world.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>

#include "base/check.h"
#include "base/sha256.h"
#include "support/or_die.h"

namespace tessera::test {
namespace {

void Append(std::string& bytes, const auto& value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

std::string Bytes(const std::vector<RowOutput>& rows) {
  std::string bytes;
  for (const RowOutput& row : rows) {
    Append(bytes, row.token);
    Append(bytes, row.logprob);
    for (const TokenLogprob& top : row.top) {
      Append(bytes, top.token);
      Append(bytes, top.logprob);
    }
  }
  return bytes;
}

}  // namespace

std::string TinyR1Folder() {
  return std::string(TESSERA_SOURCE_DIR) + "/models/tiny-r1";
}

std::unique_ptr<LoadedModel> LoadModel(const std::string& folder, int num_tokens) {
  ModelConfig config = OrDie(LoadModelConfig(folder));
  Checkpoint checkpoint = OrDie(Checkpoint::Open(folder, config));
  ThreadPool threads(2);
  Weights weights = OrDie(Weights::Load(checkpoint, config, WholeShare(config), threads, {}));
  auto model = std::make_unique<LoadedModel>(
      LoadedModel{std::move(config), std::move(checkpoint), std::move(weights)});
  model->num_tokens = num_tokens;
  return model;
}

namespace {

std::unique_ptr<LoadedModel> MakeRandomModel(const RandomCheckpointOptions& options) {
  char folder[] = "/tmp/tessera_random_XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  OrDie(WriteRandomCheckpoint(folder, options, {}));
  auto model = LoadModel(folder, options.config.vocab_size);
  std::filesystem::remove_all(folder);
  return model;
}

}  // namespace

std::unique_ptr<LoadedModel> MakeOddModel(RandomFormat format) {
  RandomCheckpointOptions options = OrDie(RandomPreset("odd"));
  options.format = format;
  options.seed = 11;  // of tests/golden/make_bf16_golden.py
  return MakeRandomModel(options);
}

std::unique_ptr<LoadedModel> MakeTwelveHeadModel(RandomFormat format, int num_experts) {
  RandomCheckpointOptions options = OrDie(RandomPreset("odd"));
  options.format = format;
  options.config.num_layers = 5;
  options.config.first_k_dense_replace = 3;
  options.config.num_heads = 12;
  options.config.v_head_dim = 20;
  options.config.n_routed_experts = num_experts;
  options.config.n_group = 4;
  return MakeRandomModel(options);
}

bool SameBits(const Answer& a, const Answer& b) {
  return Bytes(a.prompt) == Bytes(b.prompt) && Bytes(a.tokens) == Bytes(b.tokens) && a.finish == b.finish;
}

std::string HashAnswers(const std::vector<Answer>& answers) {
  std::string bytes;
  for (const Answer& answer : answers) {
    bytes += Bytes(answer.prompt);
    Append(bytes, static_cast<int32_t>(answer.prompt.size()));
    bytes += Bytes(answer.tokens);
    Append(bytes, static_cast<int32_t>(answer.tokens.size()));
  }
  return Hex(HashSha256(std::as_bytes(std::span(bytes))));
}

World::World(const LoadedModel& model, const WorldOptions& options) : threads_(options.num_threads) {
  const kernels::Kernels* table = OrDie(kernels::ForIsa(options.isa));
  const RankOptions rank{.num_blocks = options.engine.num_blocks,
                         .block_size = options.engine.block_size,
                         .max_model_len = options.engine.max_model_len,
                         .num_tokens = model.num_tokens,
                         .decode_threads = options.decode_threads};
  if (options.layout.degrees.world() == 1) {
    rank_ = OrDie(
        Rank::Create(model.config, model.weights, {Topology(), *alone_, *alone_}, rank, *table, threads_));
    executor_ = std::make_unique<LocalExecutor>(*rank_);
  } else {
    const auto table_of = [table, mixed = options.mixed_isas](int number) {
      if (!mixed) return table;
      std::vector<const kernels::Kernels*> present;
      for (const kernels::Isa isa :
           {kernels::Isa::kScalar, kernels::Isa::kAvx2, kernels::Isa::kAvx512, kernels::Isa::kAvx512Bf16}) {
        if (const auto found = kernels::ForIsa(isa)) present.push_back(*found);
      }
      return present[static_cast<size_t>(number) % present.size()];
    };
    executor_ = std::make_unique<RankThreads>(model.checkpoint, model.config, options.layout, rank,
                                              options.num_threads, table_of);
  }
  EngineOptions engine = options.engine;
  engine.vocab_size = model.num_tokens;
  engine.num_groups = options.layout.degrees.dp;
  engine_ = std::make_unique<Engine>(engine, *executor_, clock_);
}

std::vector<Answer> World::Run(const std::vector<Request>& requests) {
  std::mutex mutex;
  std::condition_variable arrived;
  bool news = false;
  const auto notify = [&] {
    std::lock_guard lock(mutex);
    news = true;
    arrived.notify_one();
  };

  std::vector<Answer> answers;
  std::vector<std::shared_ptr<Outbox>> outboxes;
  std::vector<size_t> first_answer;
  const std::string run = Format("run-{}-", num_runs_++);
  for (const Request& request : requests) {
    first_answer.push_back(answers.size());
    answers.resize(answers.size() + request.num_choices);
    outboxes.push_back(std::make_shared<Outbox>(notify));
    Request numbered = request;
    numbered.id = run + request.id;
    const Status submitted =
        engine_->Submit(std::make_shared<const Request>(std::move(numbered)), outboxes.back());
    if (!submitted) {
      std::fprintf(stderr, "%s\n", submitted.error().message.c_str());
      std::abort();
    }
  }

  size_t open = answers.size();
  while (open > 0) {
    {
      std::unique_lock lock(mutex);
      arrived.wait(lock, [&] { return news; });
      news = false;
    }
    for (size_t r = 0; r < requests.size(); ++r) {
      for (TokenEvent& event : outboxes[r]->Take()) {
        Answer& answer = answers[first_answer[r] + event.choice];
        answer.prompt.insert(answer.prompt.end(), event.prompt.begin(), event.prompt.end());
        answer.tokens.insert(answer.tokens.end(), event.tokens.begin(), event.tokens.end());
        if (event.finish == FinishReason::kNone) continue;
        CHECK(answer.finish == FinishReason::kNone);
        answer.finish = event.finish;
        answer.error = event.error;
        --open;
      }
    }
  }
  return answers;
}

}  // namespace tessera::test
