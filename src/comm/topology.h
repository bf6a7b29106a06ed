// Who is who and who holds what: the arithmetic of ranks (docs/parallel.md). A world is dp groups of tp
// ranks; experts are spread over ep sets of moe_tp ranks. Pure; knows numbers, not tensors.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"

namespace tessera {

// Units [begin, end) of something that is cut.
struct Slice {
  int begin = 0, end = 0;
  int size() const { return end - begin; }
  bool operator==(const Slice&) const = default;
};
// Slice `index` of `units` over `parts`: [floor(index * units / parts), floor((index + 1) * units / parts)).
Slice SliceOf(int units, int parts, int index);

struct Degrees {
  int dp = 1;  // data-parallel groups
  int tp = 1;  // ranks of a group
  int ep = 1;  // sets of ranks that hold different experts; divides dp * tp
  int world() const { return dp * tp; }
  int moe_tp() const { return world() / ep; }
  bool operator==(const Degrees&) const = default;
};
std::string DegreesText(const Degrees& degrees);  // "tp 4, dp 4, ep 4"

// How a mixture-of-experts layer moves tokens (docs/parallel.md, "Modes").
enum class MoeMode {
  kReduce,    // dp 1: every rank has every token; one sum over the world (A)
  kGather,    // dp > 1, moe_tp > 1: every rank gets every token; sums return to the owners (C, E)
  kExchange,  // dp > 1, ep == world: a token travels to the ranks that hold its experts (B, D)
};

// One rank's place. tp runs fastest: rank = dp_rank * tp + tp_rank.
class Topology {
 public:
  Topology() = default;  // a world of one
  // REQUIRES: CheckDegrees holds, 0 <= rank < world.
  Topology(const Degrees& degrees, int rank);

  const Degrees& degrees() const { return degrees_; }
  int rank() const { return rank_; }
  int world() const { return degrees_.world(); }
  int dp_rank() const { return rank_ / degrees_.tp; }
  int tp_rank() const { return rank_ % degrees_.tp; }
  int moe_ep_rank() const { return rank_ / degrees_.moe_tp(); }
  int moe_tp_rank() const { return rank_ % degrees_.moe_tp(); }
  MoeMode mode() const;

  Slice Heads(int num_heads) const { return SliceOf(num_heads, degrees_.tp, tp_rank()); }
  // Of the 16 leaves of a row-parallel linear, those of this rank.
  Slice TensorLeaves(int num_leaves) const { return SliceOf(num_leaves, degrees_.tp, tp_rank()); }
  Slice ExpertLeaves(int num_leaves) const { return SliceOf(num_leaves, degrees_.moe_tp(), moe_tp_rank()); }
  // The shared expert: cut over the world, but whole on every rank where tokens travel.
  Slice SharedLeaves(int num_leaves) const;
  Slice Experts(int num_experts) const { return SliceOf(num_experts, degrees_.ep, moe_ep_rank()); }
  Slice Vocabulary(int vocab_size) const { return SliceOf(vocab_size, degrees_.tp, tp_rank()); }
  // Of its group's tokens, those whose experts this rank is responsible for (dp > 1).
  Slice Tokens(int num_tokens) const { return SliceOf(num_tokens, degrees_.tp, tp_rank()); }
  int ExpertOwnerSet(int expert, int num_experts) const;  // moe_ep_rank that holds `expert`

 private:
  Degrees degrees_;
  int rank_ = 0;
};

// The parts of a model that layouts cut.
struct LayoutShape {
  int num_heads = 0;
  int num_experts = 0;
  int num_leaves = 16;
};
// kInvalid, naming both numbers: a degree below 1, heads or leaves that tp does not divide, a world or
// experts that ep does not divide.
Status CheckDegrees(const Degrees& degrees, const LayoutShape& shape);

}  // namespace tessera
