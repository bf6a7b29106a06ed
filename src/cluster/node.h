// A host that only lends its hands: `serve --headless`. Joins the head, starts its ranks, passes frames on
// between both, and ends with either.
#pragma once

#include <chrono>
#include <functional>
#include <string>

#include "base/error.h"
#include "base/net.h"
#include "cluster/fleet.h"
#include "cluster/messages.h"

namespace tessera {

struct NodeOptions {
  Endpoint head;
  std::string source;  // address to come from; empty: any
  std::string secret;  // of the cluster
  Degrees degrees;
  NodeRanks ranks;
  Agreement agreement;
  std::string model;         // as this host names the folder
  std::string data_address;  // where its ranks listen; empty: where the head sees this host
  std::string isa;
  int threads = 0;         // of each rank; 0: its share of the cores
  int decode_threads = 0;  // as RankOptions
  std::chrono::milliseconds join_limit{std::chrono::minutes(5)};
};

// Returns when the head has said stop, or `stopped`; an error when the head refuses or is gone, or a rank has
// ended. No process is left then.
Status RunNode(const NodeOptions& options, const std::function<bool()>& stopped);

}  // namespace tessera
