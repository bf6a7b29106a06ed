// A step of one group, handed to the only rank.
#include "cluster/local_executor.h"

#include "base/check.h"

namespace tessera {

Result<StepOutput> LocalExecutor::Run(const Step& step) {
  CHECK_EQ(step.groups.size(), size_t{1});
  StepOutput output;
  output.groups.push_back(rank_.Run(step.groups[0]));
  return output;
}

}  // namespace tessera
