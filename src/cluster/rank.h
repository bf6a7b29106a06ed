// The hands: one rank's model, cache and sampler. Executes its group's part of a step. No requests, no clock.
#pragma once

#include <memory>
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
  // `config`, `weights`, `kernels` and `threads` outlive the rank. kExhausted when the cache cannot be
  // reserved.
  static Result<std::unique_ptr<Rank>> Create(const ModelConfig& config, const Weights& weights,
                                              const RankOptions& options, const kernels::Kernels& kernels,
                                              ThreadPool& threads);
  // One thread. CHECKs that the step's block and token ids are in range.
  GroupOutput Run(const GroupStep& step);

 private:
  Rank(const ModelConfig& config, const Weights& weights, const RankOptions& options,
       const kernels::Kernels& kernels, ThreadPool& threads, KvCache cache);
  void CheckStep(const GroupStep& step) const;

  const ModelConfig& config_;
  ThreadPool& threads_;
  Model model_;
  KvCache cache_;
  std::vector<Sampler> samplers_;  // one per thread
  std::vector<float> logits_;
};

}  // namespace tessera
