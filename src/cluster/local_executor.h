// Executor `uni`: the only rank lives in this process.
#pragma once

#include "cluster/rank.h"
#include "engine/executor.h"

namespace tessera {

class LocalExecutor : public Executor {
 public:
  explicit LocalExecutor(Rank& rank) : rank_(rank) {}  // outlives the executor
  Result<StepOutput> Run(const Step& step) override;

 private:
  Rank& rank_;
};

}  // namespace tessera
