// The hands: one rank's model, cache and sampler. Executes its part of a step. No requests, no clock.
#pragma once

#include <memory>
#include <vector>

#include "base/error.h"
#include "base/threads.h"
#include "cluster/rank_output.h"
#include "engine/sampler.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/model.h"
#include "model/peers.h"
#include "model/step.h"
#include "model/weights.h"

namespace tessera {

struct RankOptions {
  int num_blocks = 0;
  int block_size = 128;
  int max_model_len = 0;
  int num_tokens = 0;  // ids that may be sampled: the tokenizer's highest id + 1
  // Threads in steps that only generate, which are bound by memory; 0: all. No result depends on it.
  int decode_threads = 0;
};

class Rank {
 public:
  // `config`, `weights`, `kernels`, `threads` and the communicators outlive the rank. kExhausted when the
  // cache cannot be reserved. Collective.
  static Result<std::unique_ptr<Rank>> Create(const ModelConfig& config, const Weights& weights,
                                              const Peers& peers, const RankOptions& options,
                                              const kernels::Kernels& kernels, ThreadPool& threads);
  // One thread; all ranks with the same step. An error is one of the communicators. CHECKs that the step's
  // block and token ids are in range.
  Result<RankOutput> Run(const Step& step);

 private:
  Rank(const ModelConfig& config, const Topology& topology, const RankOptions& options,
       const kernels::Kernels& kernels, ThreadPool& threads, KvCache cache, std::unique_ptr<Model> model);
  void CheckStep(const GroupStep& step) const;
  int NumThreads(const Step& step) const;

  const ModelConfig& config_;
  const Topology topology_;
  const int decode_threads_;
  ThreadPool& threads_;
  KvCache cache_;
  std::unique_ptr<Model> model_;
  std::vector<Sampler> samplers_;  // one per thread
  std::vector<float> logits_;
};

}  // namespace tessera
