// Turns a sequence into its slice of a step.
#include "engine/step_writer.h"

#include <algorithm>
#include <span>

#include "base/check.h"

namespace tessera {
namespace {

int32_t Size(const auto& array) {
  return static_cast<int32_t>(array.size());
}

void Append(std::span<const int32_t> ids, std::vector<int32_t>& list) {
  list.insert(list.end(), ids.begin(), ids.end());
}

// Do the last known tokens, prompt included, spell `word` up to its last token?
bool EndsWithStartOf(const Sequence& sequence, std::span<const int32_t> word) {
  const int start = sequence.num_known() - static_cast<int>(word.size()) + 1;
  if (start < 0) return false;
  for (size_t i = 0; i + 1 < word.size(); ++i) {
    if (sequence.token(start + static_cast<int>(i)) != word[i]) return false;
  }
  return true;
}

void AppendForbidden(const Sequence& sequence, std::vector<int32_t>& list) {
  const SamplingParams& sampling = sequence.sampling();
  for (const auto& word : sampling.bad_words) {
    if (!word.empty() && EndsWithStartOf(sequence, word)) list.push_back(word.back());
  }
  if (sequence.num_generated() < sampling.min_tokens) {
    if (!sampling.ignore_eos) Append(sampling.eos_ids, list);
    Append(sampling.stop_token_ids, list);
  }
}

void AppendSampling(const Sequence& sequence, GroupStep& step) {
  const SamplingParams& sampling = sequence.sampling();
  SamplingRow row;
  row.temperature = sampling.temperature;
  row.top_p = sampling.top_p;
  row.top_k = sampling.top_k;
  row.min_p = sampling.min_p;
  row.repetition_penalty = sampling.repetition_penalty;
  row.frequency_penalty = sampling.frequency_penalty;
  row.presence_penalty = sampling.presence_penalty;
  row.seed = sampling.seed;
  row.position = static_cast<uint32_t>(sequence.num_known());
  row.choice = static_cast<uint32_t>(sequence.choice());

  row.counts_begin = Size(step.counts);
  step.counts.insert(step.counts.end(), sequence.counts().begin(), sequence.counts().end());
  row.counts_end = Size(step.counts);
  row.bias_begin = Size(step.biases);
  step.biases.insert(step.biases.end(), sampling.logit_bias.begin(), sampling.logit_bias.end());
  row.bias_end = Size(step.biases);
  row.forbidden_begin = Size(step.token_lists);
  AppendForbidden(sequence, step.token_lists);
  row.forbidden_end = Size(step.token_lists);
  if (!sampling.allowed_token_ids.empty()) {
    row.allowed_begin = Size(step.token_lists);
    Append(sampling.allowed_token_ids, step.token_lists);
    row.allowed_end = Size(step.token_lists);
  }
  step.sampling.push_back(row);
}

}  // namespace

void ClearGroupStep(GroupStep& step) {
  step.zero_blocks.clear();
  step.tokens.clear();
  step.sequences.clear();
  step.block_ids.clear();
  step.rows.clear();
  step.sampling.clear();
  step.counts.clear();
  step.biases.clear();
  step.token_lists.clear();
  step.masks.clear();
}

void AppendSlice(const Sequence& sequence, int num_tokens, GroupStep& step) {
  const int first_token = Size(step.tokens);
  const int begin = sequence.num_computed;
  const int end = begin + num_tokens;
  CHECK_GT(num_tokens, 0);
  step.sequences.push_back({.first_token = first_token,
                            .num_tokens = num_tokens,
                            .num_computed = begin,
                            .num_expanded = NumExpanded(sequence.num_prompt()),
                            .first_block = Size(step.block_ids),
                            .num_blocks = Size(sequence.blocks)});
  Append(sequence.blocks, step.block_ids);
  for (int position = begin; position < end; ++position) step.tokens.push_back(sequence.token(position));

  if (sequence.wants_prompt_rows()) {
    const int last = std::min(end, sequence.num_prompt() - 1);
    for (int position = std::max(begin, sequence.next_prompt_row()); position < last; ++position) {
      step.rows.push_back({.token = first_token + position - begin,
                           .sampling = -1,
                           .target = sequence.token(position + 1),
                           .num_logprobs = sequence.sampling().num_prompt_logprobs});
    }
  }
  if (end == sequence.num_known() && !sequence.prompt_only()) {
    step.rows.push_back({.token = first_token + num_tokens - 1,
                         .sampling = Size(step.sampling),
                         .target = -1,
                         .num_logprobs = sequence.sampling().num_logprobs});
    AppendSampling(sequence, step);
  }
}

}  // namespace tessera
