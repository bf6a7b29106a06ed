// One answer being written: a request's choice, how far it is computed, which blocks it holds and when it
// ends. It moves between three states by Advance and nowhere else. It decides nothing about others: that is
// the scheduler's.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

#include "engine/block_pool.h"
#include "engine/request.h"

namespace tessera {

enum class SequenceState {
  kWaiting,  // holds no blocks, nothing computed
  kRunning,  // takes part in steps
  kEnded,    // its last event is written; holds no blocks
};
enum class SequenceChange { kAdmit, kPreempt, kEnd };

class Sequence {
 public:
  Sequence(uint64_t key, std::shared_ptr<const Request> request, int choice, int max_model_len);

  // The only way to another state. kPreempt forgets what was computed, never what was generated.
  // REQUIRES: kPreempt, kEnd: `blocks` was emptied by the caller.
  void Advance(SequenceChange change);
  SequenceState state() const { return state_; }

  const Request& request() const { return *request_; }
  const SamplingParams& sampling() const { return request_->sampling; }
  uint64_t key() const { return key_; }  // of the request, given by the caller of Scheduler::Add
  int choice() const { return choice_; }
  int group() const { return group_; }
  void set_group(int group) { group_ = group; }  // before it is on a list

  int num_prompt() const { return static_cast<int>(request_->prompt.size()); }
  int num_generated() const { return static_cast<int>(output_.size()); }
  int num_known() const { return num_prompt() + num_generated(); }
  int32_t token(int position) const {
    return position < num_prompt() ? request_->prompt[position] : output_[position - num_prompt()];
  }
  // Tokens to compute before the sequence draws again or ends. Without generation the last prompt token is
  // not needed: the logprob of prompt token i comes from position i - 1.
  int num_wanted() const { return prompt_only() ? num_prompt() - 1 : num_known(); }
  bool prompt_only() const { return sampling().max_tokens == 0; }
  // Ends without any computation.
  bool has_no_work() const { return prompt_only() && (!wants_prompt_rows() || num_prompt() == 1); }

  bool wants_prompt_rows() const { return sampling().num_prompt_logprobs >= 0; }
  // The next position whose logits tell a prompt token's logprob; num_prompt() - 1 when all are there.
  int next_prompt_row() const { return next_prompt_row_; }
  bool owes_prompt_rows() const { return wants_prompt_rows() && next_prompt_row_ < num_prompt() - 1; }
  // Leading tokens that need not be computed again if their pages are found: at least one token of each
  // answer is, and every position whose prompt logprob is still owed.
  int max_cached() const;

  // The key of full block `index`. Computed once, when first asked for; REQUIRES: the block's tokens are
  // known.
  const BlockKey& block_key(int index, int block_size);

  // Appends the token just drawn and says whether it ends the sequence: EOS, then stop_token_ids, then
  // length.
  FinishReason Accept(int32_t token);
  int32_t stop_token() const { return stop_token_; }
  void AcceptPromptRow(RowOutput row);
  std::vector<RowOutput> TakePromptRows() { return std::move(prompt_rows_); }

  // Penalty state: one entry per token id that occurs, prompt tokens only where a repetition penalty asks for
  // them; empty without penalties. In order of first occurrence.
  const std::vector<TokenCount>& counts() const { return counts_; }

  // Owned by the scheduler, which keeps them in step with the block pool and its lists.
  std::vector<int32_t> blocks;
  int num_computed = 0;
  bool event_sent = false;
  bool was_admitted = false;
  int32_t num_cached = 0;  // prompt tokens found in the prefix cache at the first admission
  TimeNs first_scheduled = 0;
  std::list<Sequence*>::iterator waiting_place;  // valid while in a waiting list

 private:
  void Count(int32_t token, bool in_output);

  const uint64_t key_;
  const std::shared_ptr<const Request> request_;
  const int choice_;
  int group_ = 0;
  const int max_known_;  // tokens at which length ends it
  SequenceState state_ = SequenceState::kWaiting;
  std::vector<int32_t> output_;
  std::vector<BlockKey> keys_;
  std::vector<RowOutput> prompt_rows_;
  int next_prompt_row_ = 0;
  int32_t stop_token_ = -1;
  bool counted_prompt_ = false;
  std::vector<TokenCount> counts_;
  std::unordered_map<int32_t, int32_t> count_places_;  // token -> index into counts_
};

}  // namespace tessera
