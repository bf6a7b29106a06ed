// Multi-head latent attention: x += o_proj(attention(norm(x))), for all tokens of a batch, each in its form
// (docs/numerics.md, "form"). The ranks of a group hold different heads and the same cache; they add their
// parts of o_proj. Internal to model/. One thread calls Run.
#pragma once

#include <vector>

#include "model/attention.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/expanded_attention.h"
#include "model/kv_cache.h"
#include "model/linear.h"
#include "model/peers.h"
#include "model/rope.h"
#include "model/weights.h"

namespace tessera {

class Mla {
 public:
  // Everything outlives the object.
  Mla(const ModelConfig& config, const Peers& peers, const RotaryTables& rotary,
      const kernels::Kernels& kernels, ThreadPool& threads);

  // Writes the batch's latents into `cache` and updates residual [token][hidden]: of all tokens, or, where
  // `scatter`, of topology.Tokens alone (the sums are scattered over the group instead of repeated).
  Status Run(int layer, const LayerWeights& weights, const Batch& batch, bool scatter, KvCache& cache,
             float* residual, RowFailures& failures);

 private:
  void ProjectInputs(int layer, const LayerWeights& weights, int num_tokens, const float* residual,
                     RowFailures& failures);
  void WriteCache(int layer, const LayerWeights& weights, const Batch& batch, KvCache& cache,
                  RowFailures& failures);
  // The rest works on runs of tokens of one form, so that memory stays bounded for long prompts.
  void ProjectQueries(const LayerWeights& weights, int first, int count);
  // Both give values_ and return the tokens, counted from `first`, that see a score which is not finite.
  std::vector<int> AttendExpanded(int layer, const LayerWeights& weights, const Batch& batch,
                                  const KvCache& cache, int first, int count);
  std::vector<int> AttendAbsorbed(int layer, const LayerWeights& weights, const Batch& batch,
                                  const KvCache& cache, int first, int count);
  void AbsorbQueries(const LayerWeights& weights, const Batch& batch, int first, int count);
  void ProjectOutputs(const LayerWeights& weights, Slice tokens, const std::vector<int>& bad_scores);
  Status AddOutputs(int layer, const Batch& batch, bool scatter, int first, int count, float* residual,
                    RowFailures& failures);
  float* Scratch(int thread) { return scratch_.data() + static_cast<size_t>(thread) * scratch_width_; }

  const ModelConfig& config_;
  const Peers& peers_;
  const int heads_;  // of this rank
  const RotaryTables& rotary_;
  const kernels::Kernels& kernels_;
  ThreadPool& threads_;
  const size_t scratch_width_;  // floats per thread: two rows of the widest input

  LinearInput q_a_input_, kv_a_input_, q_b_input_, o_input_;
  std::vector<kernels::Bf16> q_a_, kv_a_;  // [token][q_lora_rank], [token][latent + rope]
  std::vector<kernels::Bf16> q_;           // [token of run][head][nope | rope]
  std::vector<kernels::Bf16> queries_;     // [token of run][head][latent | rope]: absorbed
  std::vector<kernels::Bf16> mixed_;       // [token of run][head][latent]
  std::vector<kernels::Bf16> values_;      // [token of run][head][v]
  FixedSums sums_;
  LatentAttention absorbed_;
  ExpandedAttention expanded_;
  std::vector<float> scratch_;
};

}  // namespace tessera
