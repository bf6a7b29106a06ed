// From a folder to a running engine: config, then one rank in this process (uni) or a fleet of rank processes
// (mp, or ray over its nodes), the size of the cache, executor, engine, in that order. Shared by serve and
// the benchmarks. No HTTP.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/log.h"
#include "base/threads.h"
#include "cli/options.h"
#include "cli/parallel.h"
#include "cluster/fleet.h"
#include "cluster/local_executor.h"
#include "cluster/rank.h"
#include "cluster/ray.h"
#include "engine/engine.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/weights.h"
#include "text/tokenizer.h"

namespace tessera::cli {

// How large the cache becomes.
struct CacheSize {
  int num_blocks = 0;
  uint64_t block_bytes = 0;
  uint64_t total_bytes() const { return block_bytes * num_blocks; }
};

struct CacheDemand {
  uint64_t memory_limit_bytes = 0;  // of this process
  uint64_t weight_bytes = 0;
  uint64_t workspace_bytes = 0;  // of the largest step
  uint64_t block_bytes = 0;
  int64_t max_model_len = 0;
};
// Pure. Never more than max_num_seqs sequences of max_model_len need; kInvalid with the numbers when not one
// such sequence fits.
Result<CacheSize> SizeCache(const EngineFlags& flags, const CacheDemand& demand);

// Upper bound for a rank's work buffers of one step, plus the logits of every running sequence.
uint64_t WorkspaceBytes(const ModelConfig& config, const EngineFlags& flags, const Degrees& degrees,
                        int64_t max_model_len);

// What the hosts of one cluster must have in common.
Result<Agreement> MakeAgreement(const EngineFlags& flags, const ParallelPlan& plan, int max_model_len);
std::string ForcedIsa();  // TESSERA_ISA, or empty
Result<int> MaxModelLen(const EngineFlags& flags, const ModelConfig& config);

// Everything between the flags and the engine, in order of construction; the engine goes first at the end.
class Assembly {
 public:
  struct Wishes {
    int64_t max_queued_requests = 10000;
    std::chrono::milliseconds exchange_limit{std::chrono::minutes(5)};  // of every wait between ranks
    LogLevel log_level = LogLevel::kInfo;
    std::function<bool()> cancelled = [] { return false; };  // asked while nodes join and weights load
  };
  // Loads `flags.model`, runs one step and starts the engine. TESSERA_ISA chooses the instruction set.
  static Result<std::unique_ptr<Assembly>> Build(const EngineFlags& flags, const ModelConfig& config,
                                                 const ParallelPlan& plan, const Wishes& wishes);
  ~Assembly();

  // Runs one step past the engine, which has nothing to do meanwhile: no counter moves, and pages that nobody
  // holds are written. An error when a value is not finite.
  Status RunStep(const Step& step);

  const ModelConfig config;
  const ParallelPlan plan;
  std::unique_ptr<Tokenizer> tokenizer;
  int max_model_len = 0;
  CacheSize cache;                 // of each group
  std::string isa;                 // of the kernels, on rank 0
  int num_threads = 0;             // that compute, per rank
  std::vector<std::string> lines;  // what was built, for the log
  SteadyClock clock;
  std::unique_ptr<Engine> engine;

 private:
  // Whom a fleet tells that it has broken. The fleet's threads may be a moment later than the engine's end.
  struct Listener {
    std::mutex mutex;
    Engine* engine = nullptr;
    std::optional<Error> news;  // the first
    void Tell(const Error& error);
  };
  // One rank, in this process.
  struct Alone {
    std::unique_ptr<ThreadPool> threads;
    Weights weights;
    std::unique_ptr<Communicator> communicator = Communicator::Alone();
    std::unique_ptr<Rank> rank;
  };

  Assembly(const ModelConfig& model, const ParallelPlan& ranks) : config(model), plan(ranks) {}
  Status LoadAlone(const EngineFlags& flags);
  Status LoadFleet(const EngineFlags& flags, const Wishes& wishes);
  Status TakeRay(const Wishes& wishes, FleetOptions& options);
  Result<CacheSize> Fit(const EngineFlags& flags, uint64_t memory_bytes, uint64_t weight_bytes) const;
  RankOptions OptionsOfRank(const EngineFlags& flags) const;
  Status WarmUp();

  const std::shared_ptr<Listener> listener_ = std::make_shared<Listener>();
  Alone alone_;
  std::unique_ptr<RayCluster> ray_;  // outlives the executor: its nodes leave by themselves
  std::unique_ptr<Executor> executor_;
};

// "1.5 GiB"
std::string BytesText(uint64_t bytes);

}  // namespace tessera::cli
