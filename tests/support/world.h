// One loaded checkpoint and, on demand, a whole engine over it in this process: what the exactness tests
// drive. Answers are collected as flat values, so that they can be compared and hashed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cluster/local_executor.h"
#include "cluster/rank.h"
#include "engine/engine.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/random_checkpoint.h"
#include "model/weights.h"
#include "support/rank_threads.h"

namespace tessera::test {

struct LoadedModel {
  ModelConfig config;
  Checkpoint checkpoint;
  Weights weights;     // all of them
  int num_tokens = 0;  // ids that may be sampled
};
// Ends the test program with the loader's message when the folder does not load.
std::unique_ptr<LoadedModel> LoadModel(const std::string& folder, int num_tokens);
// The random checkpoint "odd": 6 heads, two shared experts, no dimension that a vector width divides.
std::unique_ptr<LoadedModel> MakeOddModel(RandomFormat format);
// A relative of it: three dense layers, 12 heads, which 1, 2 and 4 ranks can share.
std::unique_ptr<LoadedModel> MakeTwelveHeadModel(RandomFormat format, int num_experts);
std::string TinyR1Folder();
inline constexpr int kTinyR1Tokens = 1794;

struct Answer {
  std::vector<RowOutput> prompt;
  std::vector<RowOutput> tokens;
  FinishReason finish = FinishReason::kNone;
  Error error;
};
bool SameBits(const Answer& a, const Answer& b);
std::string HashAnswers(const std::vector<Answer>& answers);  // SHA-256, hex

struct WorldOptions {
  kernels::Isa isa = kernels::Isa::kScalar;
  bool mixed_isas = false;  // rank r has the r-th of those that this CPU has, in turn
  int num_threads = 1;      // of each rank
  int decode_threads = 0;
  Layout layout;
  EngineOptions engine;
};

// An engine on one rank or several. Answers do not depend on anything in WorldOptions: that is what the tests
// say.
class World {
 public:
  World(const LoadedModel& model, const WorldOptions& options);
  // Submits all at once and waits for all; one Answer per sequence, in order of request and choice.
  std::vector<Answer> Run(const std::vector<Request>& requests);
  Engine& engine() { return *engine_; }

 private:
  ThreadPool threads_;
  SteadyClock clock_;
  std::unique_ptr<Communicator> alone_ = Communicator::Alone();
  std::unique_ptr<Rank> rank_;  // where there is one
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Engine> engine_;
  int num_runs_ = 0;
};

}  // namespace tessera::test
