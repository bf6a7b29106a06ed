// The hands: one rank's model, cache and sampler. Executes its group's part of a step. No requests, no clock.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/threads.h"
#include "engine/sampler.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/model.h"
#include "model/step.h"
#include "model/weights.h"

namespace tessera {

struct RankOptions {
  int num_blocks = 0;
  int block_size = 128;
  int max_model_len = 0;
  int num_tokens = 0;  // ids that may be sampled: the tokenizer's highest id + 1
};

class Rank {
 public:
  // `config`, `weights`, `kernels` and `threads` outlive the rank.
  static Result<std::unique_ptr<Rank>> Create(const ModelConfig& config, const Weights& weights,
                                              const RankOptions& options, const kernels::Kernels& kernels,
                                              ThreadPool& threads);
  // One thread.
  void Run(const GroupStep& step, GroupOutput& output);

 private:
  Rank(std::unique_ptr<Model> model, KvCache cache, const kernels::Kernels& kernels, int num_tokens,
       ThreadPool& threads);
  std::unique_ptr<Model> model_;
  KvCache cache_;
  std::vector<Sampler> samplers_;  // one per thread
  ThreadPool& threads_;
  ForwardOutput forward_;
};

}  // namespace tessera
