// Ray as a placer: which of its nodes hold which ranks, and an agent on each that starts `tessera serve
// --headless` there, which joins the head like any host's. No token and no tensor passes through Ray. It is
// reached by a Python program that this file's code runs as a child (python/tessera_ray/driver.py, kept in
// the binary); both speak JSON lines over a socket. When this process ends, however it does, so do the
// driver, the agents and what they started.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "cluster/fleet.h"

namespace tessera {

struct RayRequest {
  int groups = 1, ranks_per_group = 1;
  int local_groups = 0;               // data-parallel groups of a node; 0: as many as fit
  std::string strategy = "pack";      // pack: groups may span nodes; strict, fill: whole groups on nodes
  std::string resource;               // what a rank takes; empty: NPU where there is enough of it, else CPU
  int cores_per_rank = 0;             // where that is CPU; 0: an even share of the cluster
  std::chrono::seconds timeout{600};  // of the wait for room
  std::string model;                  // absolute, as every node names it
};

// A node of Ray that holds ranks; they are consecutive, in the order of the nodes.
struct RayNode {
  std::string address, host;
  NodeRanks ranks;
  int cores = 0;
  uint64_t memory_bytes = 0;
};

class RayCluster {
 public:
  // Starts the driver and connects. `python` (may be empty): an interpreter that imports ray; else the first
  // on PATH that does, else that of `./dev deps --ray`. An error says what is missing and how to get it.
  // `cancelled` is asked during every wait from here on.
  static Result<std::unique_ptr<RayCluster>> Connect(const std::string& python,
                                                     std::function<bool()> cancelled);
  ~RayCluster();  // Stop

  const std::string& address() const;  // of the node of Ray that this host is
  // Waits for room, reserves it, and checks that every node has this binary, the model and like machines.
  Result<std::vector<RayNode>> Reserve(const RayRequest& request);
  // Runs `commands[i]` on node i. Of a node's environment, `set` is replaced (no value: removed) and
  // `defaults` added where it has nothing. `on_loss`: called on the driver's thread, once, when a node's
  // command, agent or the driver has ended without being told to; not before `patience`, since the ranks' own
  // sockets know more of the cause and sooner.
  Status Start(const std::vector<std::vector<std::string>>& commands,
               const std::map<std::string, std::optional<std::string>>& set,
               const std::map<std::string, std::string>& defaults, std::chrono::milliseconds patience,
               std::function<void(const Error&)> on_loss);
  // What has been lost so far; any thread.
  std::optional<Error> loss() const;
  // Ends what is left on the nodes, gives the room back, ends the driver.
  void Stop();

 private:
  struct Content;
  explicit RayCluster(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
