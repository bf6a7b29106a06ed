// THE FACE of model/: (weights, step) -> logits, by the canonical numerics. No requests, no sampling, no
// sockets.
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

// One rank's model. Everything it is given outlives it. One thread calls Forward.
class Model {
 public:
  // `max_model_len` sizes the rotary tables.
  Model(const ModelConfig& config, const Weights& weights, int max_model_len, const kernels::Kernels& kernels,
        ThreadPool& threads);
  ~Model();

  // Clears and writes pages of `cache` as the step says. Gives per sequence: empty, or layer and operation
  // whose values were not finite. The step is trusted: the brain made it.
  std::vector<std::string> Forward(const GroupStep& step, KvCache& cache);
  // Logits [num_rows][vocab_size] of LogitRows first_row .. of the last step: asked for in pieces, since
  // those of a long prompt would not fit. Rows of failed sequences hold anything.
  void Logits(int first_row, int num_rows, float* logits);

  // About the working memory of steps of `num_tokens` tokens, logits not counted.
  static int64_t WorkspaceBytes(const ModelConfig& config, int num_tokens, int num_threads);

 private:
  struct Content;
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
