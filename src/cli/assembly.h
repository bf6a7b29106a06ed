// From a folder to a running engine: config, checkpoint, weights, cache, rank, executor, engine, in that
// order. Shared by serve and the benchmarks that run in this process. No HTTP.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "base/threads.h"
#include "cli/options.h"
#include "cluster/local_executor.h"
#include "cluster/rank.h"
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

// Upper bound for the work buffers of one step, plus the logits of every running sequence.
uint64_t WorkspaceBytes(const ModelConfig& config, const EngineFlags& flags, int64_t max_model_len);

// Everything between the flags and the engine, in order of construction; the engine goes first at the end.
struct Assembly {
  ModelConfig config;
  std::unique_ptr<Tokenizer> tokenizer;
  const kernels::Kernels* kernels = nullptr;
  std::unique_ptr<ThreadPool> threads;
  std::string checkpoint_form;  // "W8A8 (ModelSlim)"
  Weights weights;
  int max_model_len = 0;
  CacheSize cache;
  std::unique_ptr<Communicator> alone = Communicator::Alone();
  std::unique_ptr<Rank> rank;
  std::unique_ptr<LocalExecutor> executor;
  SteadyClock clock;
  std::unique_ptr<Engine> engine;

  // Loads `flags.model`, runs one step and starts the engine. TESSERA_ISA chooses the instruction set.
  static Result<std::unique_ptr<Assembly>> Build(const EngineFlags& flags, int64_t max_queued_requests);

 private:
  Status Load(const EngineFlags& flags);
  Status Fit(const EngineFlags& flags);
  Status WarmUp();
};

// "1.5 GiB"
std::string BytesText(uint64_t bytes);

}  // namespace tessera::cli
