// The contract of one forward pass: what the brain asks of every rank (Step) and what comes back
// (StepOutput). Flat values that can be copied to another process. engine/ builds it, cluster/ carries it,
// model/ and the sampler execute it. Ranks keep no state but cache pages, so a step can be replayed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tessera {

// Of a prompt, so many whole units of tokens are computed in the expanded form (docs/numerics.md, "form").
inline constexpr int kExpandedUnit = 256;
inline int32_t NumExpanded(int32_t num_prompt) {
  return num_prompt / kExpandedUnit * kExpandedUnit;
}

// A run of consecutive tokens of one sequence.
struct SequenceSlice {
  int32_t first_token = 0;  // index into GroupStep::tokens
  int32_t num_tokens = 0;   // at least 1
  int32_t num_computed =
      0;  // position of the first token; positions below are in the cache, or are written by an
          // earlier slice of this step (a shared prefix): write a layer's rows, then attend
  int32_t num_expanded = 0;  // tokens at positions below are computed in the expanded form, the others in
                             // the absorbed form; the same for all slices of a sequence
  int32_t first_block = 0;   // index into GroupStep::block_ids
  int32_t num_blocks = 0;    // enough for num_computed + num_tokens positions
};

// Where logits are wanted: the prediction made at one token of the step.
struct LogitRow {
  int32_t token = 0;      // index into GroupStep::tokens
  int32_t sampling = -1;  // index into GroupStep::sampling: draw a token; -1: none drawn
  int32_t target = -1;    // prompt logprobs: give the logprob of this token; -1: none
  int32_t num_logprobs =
      -1;  // how many of the likeliest tokens to report; 0: the drawn or target one only; -1: none
};

// Everything that decides one draw, by numerics.md "sampling". Ranges are [begin, end) into the GroupStep's
// arrays.
struct SamplingRow {
  float temperature = 1;  // 0: the likeliest
  float top_p = 1;
  int32_t top_k = 0;  // 0: off
  float min_p = 0;
  float repetition_penalty = 1;
  float frequency_penalty = 0;
  float presence_penalty = 0;
  uint32_t position = 0;  // absolute position of the new token
  uint64_t seed = 0;
  uint32_t choice = 0;                             // index of the answer (n > 1)
  int32_t counts_begin = 0, counts_end = 0;        // TokenCount: penalty state; empty when no penalty is set
  int32_t bias_begin = 0, bias_end = 0;            // TokenBias
  int32_t forbidden_begin = 0, forbidden_end = 0;  // token ids that get -inf (bad words, min_tokens)
  int32_t allowed_begin = -1, allowed_end = -1;    // token ids; begin >= 0: all others get -inf
  int32_t mask_begin = -1;                         // >= 0: ceil(vocab / 32) words in masks, bit set = allowed
};

static_assert(sizeof(SamplingRow) == 80, "no padding: rows travel as bytes");

struct TokenCount {
  int32_t token = 0;
  int32_t in_output = 0;  // times generated
  int32_t in_prompt = 0;  // 1 if it occurs in the prompt
};
struct TokenBias {
  int32_t token = 0;
  float bias = 0;
};

// The part of one data-parallel group. Idle groups have no tokens.
struct GroupStep {
  std::vector<int32_t> zero_blocks;  // cache pages to clear before anything is written
  std::vector<int32_t> tokens;
  std::vector<SequenceSlice> sequences;  // cover tokens exactly, in order
  std::vector<int32_t> block_ids;
  std::vector<LogitRow> rows;  // ascending by token
  std::vector<SamplingRow> sampling;
  std::vector<TokenCount> counts;
  std::vector<TokenBias> biases;
  std::vector<int32_t> token_lists;  // forbidden and allowed ids
  std::vector<uint32_t> masks;
};

struct Step {
  uint64_t number = 0;
  std::vector<GroupStep> groups;
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
};

// Answer to one LogitRow. Without num_logprobs (-1) there is no logprob and no top.
struct RowOutput {
  int32_t token = -1;             // the drawn token, or the row's target
  float logprob = 0;              // of `token`, raw: before penalties and temperature
  std::vector<TokenLogprob> top;  // num_logprobs likeliest, by (value descending, id ascending)
};

struct GroupOutput {
  std::vector<RowOutput> rows;  // one per LogitRow
  // Per sequence of the step: empty, or why its values are not finite, naming layer and operation. Rows of
  // such a sequence hold nothing.
  std::vector<std::string> failures;
};
struct StepOutput {
  std::vector<GroupOutput> groups;
};

}  // namespace tessera
