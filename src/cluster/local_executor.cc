// A step of one group, handed to the only rank.
#include "cluster/local_executor.h"

namespace tessera {

Result<StepOutput> LocalExecutor::Run(const Step& step) {
  ASSIGN_OR_RETURN(RankOutput output, rank_.Run(step));
  return MergeOutputs(step, Degrees(), {&output, 1});
}

}  // namespace tessera
