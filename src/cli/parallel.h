// How a launch is spread: flags, environment, the MindFormers YAML and the machine become one plan, by the
// tables of docs/parallel.md. What contradicts is refused with both values and where they come from.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/net.h"
#include "cli/options.h"
#include "cli/ray_plan.h"
#include "cluster/fleet.h"
#include "comm/topology.h"
#include "model/config.h"

namespace tessera::cli {

// What is the same on all hosts: the degrees and how the checkpoint is read.
struct LayoutChoice {
  Degrees degrees;
  bool split_embedding = false;     // the YAML's vocab_emb_dp
  std::string quantization;         // --quantization, or what the YAML asks for; may be empty
  std::string quantization_source;  // who asked for it, for messages
  std::vector<std::string> notes;   // for the log: which source ruled
  std::vector<std::string> warnings;
};
// By the resolution table of docs/parallel.md. kInvalid is a usage error. Reads the YAML.
Result<LayoutChoice> ChooseLayout(const ServeOptions& options, const ModelConfig& config,
                                  const Variable& variable);

struct ParallelPlan {
  Degrees degrees;
  bool split_embedding = false;  // the YAML's vocab_emb_dp
  // Ranks of other hosts join `control`, or this host does so when it is headless.
  bool headless = false;
  bool processes = false;      // ranks are processes (mp); else the only one lives in this process (uni)
  std::optional<RayPlan> ray;  // Ray's nodes hold all ranks, and this host only as one of them
  NodeRanks local;             // ranks of this host
  Endpoint control;            // the head's; unused when all ranks are local
  std::string data_address;    // where this host's ranks listen for those of others; empty: by the route
  std::string source_address;  // where connections to the head come from; empty: any
  std::string secret;          // of the cluster; may be empty
  std::string quantization;    // as in LayoutChoice
  std::string quantization_source;
  std::vector<std::string> notes;  // for the log: which source ruled
  std::vector<std::string> warnings;

  bool spread() const { return headless || local.count < degrees.world(); }  // over several hosts
};

// `variable(name)`: the environment, null where unset. kInvalid is a usage error. Reads the YAML and the
// secret file; asks the machine for interface addresses.
Result<ParallelPlan> PlanParallel(const ServeOptions& options, const ModelConfig& config,
                                  const Variable& variable);

}  // namespace tessera::cli
