// What one rank gives back for a step, and how the outputs of all ranks become the step's.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "comm/topology.h"
#include "model/step.h"

namespace tessera {

// The ranks of a group share its logit rows; what failed in the forward pass all of them know.
struct RankOutput {
  struct Row {
    int32_t index = 0;  // into GroupStep::rows
    RowOutput output;
  };
  std::vector<Row> rows;
  std::vector<std::string> failures;  // one per sequence of the group, or none where it is idle
};

// The sequence of each logit row; rows and sequences both ascend by token.
std::vector<int32_t> SequencesOfRows(const GroupStep& step);

// `outputs`: one per rank, in their order. Rows of failed sequences are emptied. kInternal when rows or
// sequences are missing, doubled or out of range: a rank is not to be trusted with the shape of an answer.
Result<StepOutput> MergeOutputs(const Step& step, const Degrees& degrees, std::span<RankOutput> outputs);

}  // namespace tessera
