// The state machine of one sequence, its stop rules and its penalty counts.
#include "engine/sequence.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace tessera {
namespace {

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::ranges::find(ids, id) != ids.end();
}

bool HasPenalty(const SamplingParams& sampling) {
  return sampling.repetition_penalty != 1 || sampling.frequency_penalty != 0 ||
         sampling.presence_penalty != 0;
}

}  // namespace

Sequence::Sequence(uint64_t key, std::shared_ptr<const Request> request, int choice, int max_model_len)
    : key_(key),
      request_(std::move(request)),
      choice_(choice),
      max_known_(
          static_cast<int>(std::min<int64_t>(int64_t{num_prompt()} + sampling().max_tokens, max_model_len))) {
}

void Sequence::Advance(SequenceChange change) {
  switch (change) {
    case SequenceChange::kAdmit:
      CHECK(state_ == SequenceState::kWaiting);
      state_ = SequenceState::kRunning;
      if (!counted_prompt_ && sampling().repetition_penalty != 1) {
        for (const int32_t token : request_->prompt) Count(token, /*in_output=*/false);
      }
      counted_prompt_ = true;
      return;
    case SequenceChange::kPreempt:
      CHECK(state_ == SequenceState::kRunning);
      CHECK(blocks.empty());
      state_ = SequenceState::kWaiting;
      num_computed = 0;
      return;
    case SequenceChange::kEnd:
      CHECK(state_ != SequenceState::kEnded);
      CHECK(blocks.empty());
      state_ = SequenceState::kEnded;
      return;
  }
}

int Sequence::max_cached() const {
  return owes_prompt_rows() ? std::min(num_wanted() - 1, next_prompt_row_) : num_wanted() - 1;
}

const BlockKey& Sequence::block_key(int index, int block_size) {
  while (static_cast<int>(keys_.size()) <= index) {
    const int first = static_cast<int>(keys_.size()) * block_size;
    CHECK_LE(first + block_size, num_known());
    const int num_expanded = std::clamp(NumExpanded(num_prompt()) - first, 0, block_size);
    const BlockKey parent = keys_.empty() ? RootKey(request_->cache_salt) : keys_.back();
    if (first + block_size <= num_prompt()) {
      keys_.push_back(ChildKey(parent, std::span(request_->prompt).subspan(first, block_size), num_expanded));
      continue;
    }
    std::vector<int32_t> tokens(block_size);
    for (int i = 0; i < block_size; ++i) tokens[i] = token(first + i);
    keys_.push_back(ChildKey(parent, tokens, num_expanded));
  }
  return keys_[index];
}

FinishReason Sequence::Accept(int32_t token) {
  output_.push_back(token);
  if (HasPenalty(sampling())) Count(token, /*in_output=*/true);
  if (num_generated() > sampling().min_tokens) {
    // A token drawn while fewer than min_tokens were there was masked if it could end the sequence.
    if (!sampling().ignore_eos && Contains(sampling().eos_ids, token)) return FinishReason::kStop;
    if (Contains(sampling().stop_token_ids, token)) {
      stop_token_ = token;
      return FinishReason::kStop;
    }
  }
  return num_known() >= max_known_ ? FinishReason::kLength : FinishReason::kNone;
}

void Sequence::AcceptPromptRow(RowOutput row) {
  CHECK_LT(next_prompt_row_, num_prompt() - 1);
  if (prompt_rows_.empty()) prompt_rows_.reserve(num_prompt() - 1);
  prompt_rows_.push_back(std::move(row));
  ++next_prompt_row_;
}

void Sequence::Count(int32_t token, bool in_output) {
  const auto [place, is_new] = count_places_.try_emplace(token, static_cast<int32_t>(counts_.size()));
  if (is_new) counts_.push_back({.token = token, .in_output = 0, .in_prompt = 0});
  TokenCount& count = counts_[place->second];
  if (in_output) {
    ++count.in_output;
  } else {
    count.in_prompt = 1;
  }
}

}  // namespace tessera
