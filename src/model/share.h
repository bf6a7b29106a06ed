// What one rank holds of a model: its slices of every kind of tensor (docs/parallel.md). Pure.
#pragma once

#include "comm/topology.h"
#include "kernels/kernels.h"
#include "model/config.h"

namespace tessera {

struct RankShare {
  Slice heads;          // of q_b, kv_b and o_proj
  Slice tensor_leaves;  // of o_proj and the dense FFN
  Slice experts;
  Slice expert_leaves;  // of each of those experts; may be empty
  Slice shared_leaves;  // of the shared expert; may be empty
  Slice embedding;      // rows; the whole table unless the layout splits it
  Slice head;           // rows of lm_head: logits that are computed here

  bool operator==(const RankShare&) const = default;
};

// `split_embedding`: the YAML's vocab_emb_dp. It cuts the embedding over the group and holds lm_head whole;
// otherwise it is the other way round.
inline RankShare ShareOfRank(const ModelConfig& config, const Topology& topology, bool split_embedding) {
  const Slice rows = topology.Vocabulary(config.vocab_size);
  const Slice all = {0, config.vocab_size};
  return {.heads = topology.Heads(config.num_heads),
          .tensor_leaves = topology.TensorLeaves(kernels::kNumLeaves),
          .experts = topology.Experts(config.n_routed_experts),
          .expert_leaves = topology.ExpertLeaves(kernels::kNumLeaves),
          .shared_leaves = topology.SharedLeaves(kernels::kNumLeaves),
          .embedding = split_embedding ? rows : all,
          .head = split_embedding ? all : rows};
}
inline RankShare WholeShare(const ModelConfig& config) {
  return ShareOfRank(config, Topology(), false);
}

}  // namespace tessera
