// THE FACE of model/: (weights, step) -> logits, by the canonical numerics. No requests, no sampling, no
// sockets: ranks that compute together meet in the communicators of `Peers`.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/threads.h"
#include "kernels/kernels.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/peers.h"
#include "model/step.h"
#include "model/weights.h"

namespace tessera {

// One rank's model. Everything it is given outlives it. One thread calls. Every rank of the world makes the
// same calls with the same step; an error is one of the communicators, after which the model is of no use.
class Model {
 public:
  // `max_model_len` sizes the rotary tables, which rank 0 computes for all: collective.
  static Result<std::unique_ptr<Model>> Create(const ModelConfig& config, const Weights& weights,
                                               int max_model_len, const Peers& peers,
                                               const kernels::Kernels& kernels, ThreadPool& threads);
  ~Model();

  // Clears and writes pages of `cache` as this rank's group of the step says. Gives per sequence of the
  // group: empty, or layer and operation whose values were not finite. The step is trusted: the brain made
  // it.
  Result<std::vector<std::string>> Forward(const Step& step, KvCache& cache);
  // Of `num_rows` LogitRows, those whose logits this rank gets; the group's ranks share them.
  Slice LogitShare(int num_rows) const;
  // Logits [share][vocab_size] of that share of rows first_row .. first_row + num_rows - 1 of the group's
  // last step: asked for in pieces, since those of a long prompt would not fit. Rows of failed sequences hold
  // anything.
  Status Logits(int first_row, int num_rows, float* logits);
  // About how many multiplications one layer of a step costs this rank: how many threads it is worth.
  int64_t LayerMacs(const GroupStep& step) const;

 private:
  struct Content;
  explicit Model(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
