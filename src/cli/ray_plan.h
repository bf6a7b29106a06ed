// What `serve` asks of Ray, and what the nodes are told: the flags and variables of `tessera serve
// --headless` there. The wish is made here, pure; cluster/ray.h carries it out.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/net.h"
#include "cli/options.h"
#include "cluster/ray.h"
#include "comm/topology.h"

namespace tessera::cli {

struct RayPlan {
  std::string python;  // as --ray-python, may be empty
  RayRequest request;
  // Of every node's `serve`; its ranks and the head's address come later.
  std::vector<std::string> node_flags;
  // As RayCluster::Start: variables that are the head's, and those that a node may lack.
  std::map<std::string, std::optional<std::string>> set;
  std::map<std::string, std::string> defaults;
};

// kInvalid is a usage error. Paths become absolute; `current`: the working directory.
Result<RayPlan> PlanRay(const ServeOptions& options, const Degrees& degrees, const Variable& variable,
                        const std::string& current);

// The arguments of the node that holds `ranks`: `serve --headless ...`.
std::vector<std::string> NodeCommand(const RayPlan& plan, const NodeRanks& ranks, const Endpoint& head);

// "dp 1 spans 10.0.0.1 and 10.0.0.2": groups whose ranks are on several nodes, one text each.
std::vector<std::string> SpannedGroups(const std::vector<RayNode>& nodes, const Degrees& degrees);

}  // namespace tessera::cli
