// The port between the brain and the hands: whoever can carry out a Step.
#pragma once

#include "base/error.h"
#include "model/step.h"

namespace tessera {

class Executor {
 public:
  virtual ~Executor() = default;
  // Runs one step on all ranks and waits for it. kUnavailable when a rank is gone. Called by the engine
  // thread.
  virtual Result<StepOutput> Run(const Step& step) = 0;
};

}  // namespace tessera
