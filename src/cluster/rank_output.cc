// Outputs of the ranks of a group, row by row.
#include "cluster/rank_output.h"

#include "base/check.h"

namespace tessera {
namespace {

Status TakeRows(const GroupStep& step, int rank, RankOutput& from, GroupOutput& into,
                std::vector<bool>& filled) {
  if (from.failures.size() != step.sequences.size()) {
    return Fail(ErrorKind::kInternal, "rank {} answered for {} sequences, the step has {}", rank,
                from.failures.size(), step.sequences.size());
  }
  for (size_t s = 0; s < from.failures.size(); ++s) {
    if (into.failures[s].empty()) into.failures[s] = std::move(from.failures[s]);
  }
  for (RankOutput::Row& row : from.rows) {
    const auto index = static_cast<size_t>(row.index);
    if (row.index < 0 || index >= filled.size() || filled[index]) {
      return Fail(ErrorKind::kInternal, "rank {} answered row {}, which is {}", rank, row.index,
                  row.index < 0 || index >= filled.size() ? "not in the step" : "answered already");
    }
    filled[index] = true;
    into.rows[index] = std::move(row.output);
  }
  return {};
}

void EmptyFailedRows(const GroupStep& step, GroupOutput& output) {
  const std::vector<int32_t> sequences = SequencesOfRows(step);
  for (size_t row = 0; row < sequences.size(); ++row) {
    if (!output.failures[sequences[row]].empty()) output.rows[row] = {};
  }
}

}  // namespace

std::vector<int32_t> SequencesOfRows(const GroupStep& step) {
  std::vector<int32_t> sequences;
  int32_t sequence = 0;
  for (const LogitRow& row : step.rows) {
    const auto end = [&] {
      return step.sequences[sequence].first_token + step.sequences[sequence].num_tokens;
    };
    while (row.token >= end()) ++sequence;
    sequences.push_back(sequence);
  }
  return sequences;
}

Result<StepOutput> MergeOutputs(const Step& step, const Degrees& degrees, std::span<RankOutput> outputs) {
  CHECK_EQ(step.groups.size(), static_cast<size_t>(degrees.dp));
  CHECK_EQ(outputs.size(), static_cast<size_t>(degrees.world()));
  StepOutput merged;
  merged.groups.resize(step.groups.size());
  for (size_t g = 0; g < step.groups.size(); ++g) {
    const GroupStep& group = step.groups[g];
    GroupOutput& output = merged.groups[g];
    if (group.tokens.empty()) continue;
    output.rows.resize(group.rows.size());
    output.failures.resize(group.sequences.size());
    std::vector<bool> filled(group.rows.size());
    for (int tp = 0; tp < degrees.tp; ++tp) {
      const int rank = static_cast<int>(g) * degrees.tp + tp;
      RETURN_IF_ERROR(TakeRows(group, rank, outputs[static_cast<size_t>(rank)], output, filled));
    }
    for (size_t row = 0; row < filled.size(); ++row) {
      if (!filled[row]) return Fail(ErrorKind::kInternal, "no rank of group {} answered row {}", g, row);
    }
    EmptyFailedRows(group, output);
  }
  return merged;
}

}  // namespace tessera
