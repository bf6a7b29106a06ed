// Starts, watches and stops the ranks of one host: the parent of their processes. It makes the memory that
// they share, reads what they write to stderr, and sees each of them end. Knows no model and no step.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "cluster/frame.h"
#include "comm/topology.h"

namespace tessera {

struct NodeAgentOptions {
  Degrees degrees;
  int first_rank = 0;
  int num_ranks = 0;  // consecutive; may be 0
};

class NodeAgent {
 public:
  // How a rank ended: "rank 3 (dp 0, tp 3, process 4711) was killed by signal 9 (Killed); its last words:
  // ...".
  using OnExit = std::function<void(const std::string& text)>;

  // Starts the processes, `tessera rank R dp D tp T` of this very binary. `on_exit` is called on the agent's
  // own thread, for ends that Stop did not ask for.
  static Result<std::unique_ptr<NodeAgent>> Start(const NodeAgentOptions& options, OnExit on_exit);
  ~NodeAgent();  // kills what is left

  int num_ranks() const;
  FrameLink& link(int local_rank);  // to the process; frames carry its rank
  pid_t process(int local_rank) const;
  // Waits `grace` for all processes to end by themselves, then kills them. No on_exit any more.
  void Stop(std::chrono::milliseconds grace);

 private:
  struct Content;
  explicit NodeAgent(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

// Where a rank process finds what it inherits.
inline constexpr int kRankLinkDescriptor = 3;
inline constexpr int kRankMemoryDescriptor = 4;

}  // namespace tessera
