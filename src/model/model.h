// THE FACE of model/: (weights, step) -> logits, by the canonical numerics. No requests, no sampling, no sockets.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/threads.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/step.h"
#include "model/weights.h"

namespace tessera {

struct ForwardOutput {
  std::vector<float> logits;          // [rows][vocab_size], one row per LogitRow of the step
  std::vector<std::string> failures;  // per sequence: empty, or layer and operation that was not finite
};

// One rank's model. Everything it is given outlives it. One thread calls Forward.
class Model {
 public:
  // `max_model_len` sizes the rotary tables.
  Model(const ModelConfig& config, const Weights& weights, int max_model_len, const kernels::Kernels& kernels,
        ThreadPool& threads);
  ~Model();

  // Writes the step's positions into `cache` and fills `output`. The step is trusted: the brain made it.
  void Forward(const GroupStep& step, KvCache& cache, ForwardOutput& output);

 private:
  struct Buffers;
  const ModelConfig& config_;
  const Weights& weights_;
  const kernels::Kernels& kernels_;
  ThreadPool& threads_;
  std::vector<float> cos_, sin_;  // [max_model_len][rope / 2]
  float softmax_scale_ = 0;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace tessera
