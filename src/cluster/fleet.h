// The brain's side of a world of rank processes: brings them up over one node or several, carries steps to
// them, and notices when one ends. The executors `mp` and `ray`, which differ in who brings the nodes.
//
// Bringing up: nodes join and are checked; every rank says where it listens, learns where the others do,
// loads its share and reports it; then Begin gives the size of the cache, and steps may run.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/net.h"
#include "cluster/messages.h"
#include "engine/executor.h"

namespace tessera {

// Ranks of one node; consecutive, and whole groups or parts of one.
struct NodeRanks {
  int first = 0, count = 0;
};

struct FleetOptions {
  RankSetup setup;           // what all ranks share; the rest is filled in
  NodeRanks local;           // of this node; may be none
  Endpoint control;          // where nodes join; unused when `local` is the world
  std::string secret;        // of the cluster
  std::string data_address;  // of this node's ranks
  Agreement agreement;       // what nodes must agree on
  // Called once nodes may join `endpoint` (the free port where control's is 0): brings them there.
  std::function<Status(const Endpoint& endpoint)> on_listening = {};
  std::chrono::milliseconds join_limit{std::chrono::minutes(5)};
  std::chrono::milliseconds load_limit{std::chrono::hours(2)};
};

class Fleet : public Executor {
 public:
  // Returns when all ranks have loaded their weights. An error names who could not, or what differed; no
  // process is left then. `cancelled` is asked while waiting. `on_failure`: called once, on any thread, when
  // a rank or node is gone later.
  static Result<std::unique_ptr<Fleet>> Start(const FleetOptions& options,
                                              const std::function<bool()>& cancelled,
                                              std::function<void(const Error&)> on_failure);
  ~Fleet() override;

  const std::vector<RankLoaded>& loaded() const;  // [world]
  // The ranks make their caches; afterwards steps may run.
  Status Begin(int num_blocks);
  Result<StepOutput> Run(const Step& step) override;
  std::vector<RankStatus> Ranks() const override;
  // Ends all ranks in order; kills those that do not leave in time.
  void Stop();

 private:
  struct Content;
  explicit Fleet(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

// Threads of each of `num_local` ranks of one host; threads_flag 0: their share of its cores, at least 1.
int ThreadsPerRank(int threads_flag, int num_local);
// The pieces of a setup that depend on the node: shares its cores and threads among its ranks.
void SetLocalPart(RankSetup& setup, int local_rank, int num_local, int threads_flag);

}  // namespace tessera
