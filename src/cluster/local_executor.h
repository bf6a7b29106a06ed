// Executor `uni`: the only rank lives in this process.
#pragma once

#include "cluster/rank.h"
#include "engine/executor.h"

namespace tessera {

class LocalExecutor : public Executor {
 public:
  // `rank` outlives the executor.
  explicit LocalExecutor(Rank& rank, uint64_t weight_bytes = 0) : rank_(rank), weight_bytes_(weight_bytes) {}
  Result<StepOutput> Run(const Step& step) override;
  std::vector<RankStatus> Ranks() const override;

 private:
  Rank& rank_;
  const uint64_t weight_bytes_;
};

}  // namespace tessera
