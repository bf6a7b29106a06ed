// The port between the brain and the hands: whoever can carry out a Step.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/error.h"
#include "model/step.h"

namespace tessera {

// One rank as the metrics show it.
struct RankStatus {
  int rank = 0, dp = 0, tp = 0, ep = 0;
  int process = 0;
  std::string node;
  bool up = false;
  uint64_t weight_bytes = 0;
  struct Exchange {
    std::string collective;
    uint64_t calls = 0, bytes = 0, wire_bytes = 0;
  };
  std::vector<Exchange> exchanges;  // since the start; wire_bytes: of the bytes, what went between hosts
};

class Executor {
 public:
  virtual ~Executor() = default;
  // Runs one step on all ranks and waits for it. kUnavailable when a rank is gone. Called by the engine
  // thread.
  virtual Result<StepOutput> Run(const Step& step) = 0;
  // Any thread.
  virtual std::vector<RankStatus> Ranks() const { return {}; }
};

}  // namespace tessera
