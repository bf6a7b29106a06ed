// The formulas of topology.h.
#include "comm/topology.h"

#include "base/check.h"

namespace tessera {

Slice SliceOf(int units, int parts, int index) {
  return {static_cast<int>(int64_t{units} * index / parts),
          static_cast<int>(int64_t{units} * (index + 1) / parts)};
}

std::string DegreesText(const Degrees& degrees) {
  return Format("tp {}, dp {}, ep {}", degrees.tp, degrees.dp, degrees.ep);
}

Topology::Topology(const Degrees& degrees, int rank) : degrees_(degrees), rank_(rank) {
  CHECK(rank >= 0 && rank < degrees.world());
}

MoeMode Topology::mode() const {
  if (degrees_.dp == 1) return MoeMode::kReduce;
  return degrees_.ep == world() ? MoeMode::kExchange : MoeMode::kGather;
}

Slice Topology::SharedLeaves(int num_leaves) const {
  if (mode() == MoeMode::kExchange) return {0, num_leaves};
  return SliceOf(num_leaves, world(), rank_);
}

int Topology::ExpertOwnerSet(int expert, int num_experts) const {
  return static_cast<int>(int64_t{expert} * degrees_.ep / num_experts);  // equal sets: ep divides the experts
}

Status CheckDegrees(const Degrees& degrees, const LayoutShape& shape) {
  for (const auto& [name, value] :
       {std::pair{"tensor", degrees.tp}, {"data", degrees.dp}, {"expert", degrees.ep}}) {
    if (value < 1) return Invalid("{} parallel size {}: at least 1 is wanted", name, value);
  }
  if (shape.num_heads % degrees.tp != 0) {
    return Invalid("total number of attention heads ({}) must be divisible by tensor parallel size ({})",
                   shape.num_heads, degrees.tp);
  }
  if (shape.num_leaves % degrees.tp != 0) {
    return Invalid(
        "tensor parallel size {}: it must divide {}, the parts that tessera-2 cuts every row-parallel linear "
        "into",
        degrees.tp, shape.num_leaves);
  }
  if (degrees.world() % degrees.ep != 0) {
    return Invalid("expert parallel size {} must divide the number of ranks, {} (tensor {} x data {})",
                   degrees.ep, degrees.world(), degrees.tp, degrees.dp);
  }
  if (shape.num_experts % degrees.ep != 0) {
    return Invalid("expert parallel size {} must divide the number of routed experts, {}", degrees.ep,
                   shape.num_experts);
  }
  return {};
}

}  // namespace tessera
