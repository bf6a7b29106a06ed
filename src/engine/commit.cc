// What a step's outputs mean for its sequences, and which requests are refused before they can trouble a
// step.
//
// Non-finite values. A failed sequence ends with an error. Only the blocks it wrote in the failed step are
// tainted: what it wrote before was checked in the step that wrote it, so published blocks of earlier steps
// stay good, and whoever shares those is not concerned. A block of the failed step may have been published in
// its plan and be shared by sequences later in the same step; nobody else can hold it, because it was new in
// this step. Their outputs are not to be trusted (a failed row may have left finite nonsense or nothing at
// all in the page), so they are discarded: these sequences are preempted and computed again without the
// tainted block, and what they wrote is tainted too. Slices lie in planned order and a reader comes after its
// writer, so one pass finds them all. A sequence whose own tokens fail will fail again by itself; each round
// ends one sequence, so it comes to an end. Tainted blocks lose their keys at once and are cleared
// (zero_blocks) when they are next allocated: a masked position has the weight 0, and 0 times a stale
// infinity would poison the next holder. Finite leftovers are harmless, so no other block is ever cleared:
// fresh pages are zero.
#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/scheduler.h"

namespace tessera {
namespace {

Status CheckIds(const EngineOptions& options, const char* name, const std::vector<int32_t>& ids) {
  for (const int32_t id : ids) {
    if (id < 0 || id >= options.vocab_size) {
      return Invalid("{} holds token id {}, ids are 0 .. {}", name, id, options.vocab_size - 1);
    }
  }
  return {};
}

}  // namespace

Status CheckRequest(const EngineOptions& options, const Request& request) {
  const SamplingParams& sampling = request.sampling;
  const auto num_prompt = static_cast<int64_t>(request.prompt.size());
  if (num_prompt == 0) return Invalid("the prompt has 0 tokens, at least 1 is wanted");
  if (request.num_choices < 1) return Invalid("n is {}, at least 1 is wanted", request.num_choices);
  if (sampling.max_tokens < 0) return Invalid("max_tokens is {}, at least 0 is wanted", sampling.max_tokens);
  RETURN_IF_ERROR(CheckIds(options, "prompt", request.prompt));
  RETURN_IF_ERROR(CheckIds(options, "allowed_token_ids", sampling.allowed_token_ids));
  RETURN_IF_ERROR(CheckIds(options, "stop_token_ids", sampling.stop_token_ids));
  for (const auto& word : sampling.bad_words) RETURN_IF_ERROR(CheckIds(options, "bad_words", word));
  for (const TokenBias& bias : sampling.logit_bias)
    RETURN_IF_ERROR(CheckIds(options, "logit_bias", {bias.token}));

  const int64_t room = options.max_model_len - (sampling.max_tokens > 0 ? 1 : 0);
  if (num_prompt > room) {
    return Invalid(
        "the prompt has {} tokens, this model's maximum context length is {} tokens and at least {} must "
        "be left for the answer",
        num_prompt, options.max_model_len, options.max_model_len - room);
  }
  if (!options.enable_chunked_prefill && num_prompt > options.max_num_batched_tokens) {
    return Invalid(
        "the prompt has {} tokens, but without chunked prefill a step holds at most {} "
        "(max_num_batched_tokens)",
        num_prompt, options.max_num_batched_tokens);
  }
  // The last generated token is never computed: it needs no place in the cache.
  const int64_t num_positions =
      std::min<int64_t>(num_prompt + sampling.max_tokens, options.max_model_len) - 1;
  const int64_t num_blocks = (num_positions + options.block_size - 1) / options.block_size;
  if (num_blocks > options.num_blocks) {
    return Invalid(
        "prompt ({} tokens) and max_tokens ({}) need {} cache blocks of {} tokens, the cache has {}",
        num_prompt, sampling.max_tokens, num_blocks, options.block_size, options.num_blocks);
  }
  return {};
}

Status Scheduler::CheckOutput(const StepOutput& output) const {
  if (output.groups.size() != groups_.size()) {
    return Fail(ErrorKind::kInternal, "step {} came back with {} groups, {} wanted", step_.number,
                output.groups.size(), groups_.size());
  }
  for (size_t i = 0; i < groups_.size(); ++i) {
    const GroupStep& step = step_.groups[i];
    const GroupOutput& group = output.groups[i];
    // No failures at all may be left out.
    const bool failures_fit = group.failures.empty() || group.failures.size() == step.sequences.size();
    if (group.rows.size() != step.rows.size() || !failures_fit) {
      return Fail(ErrorKind::kInternal,
                  "step {}, group {} came back with {} rows and {} failures, {} and {} wanted", step_.number,
                  i, group.rows.size(), group.failures.size(), step.rows.size(), step.sequences.size());
    }
    for (const Slice& slice : groups_[i].slices) {
      const size_t place = static_cast<size_t>(&slice - groups_[i].slices.data());
      if (!group.failures.empty() && !group.failures[place].empty()) continue;
      for (int row = slice.first_row; row < slice.first_row + slice.num_rows; ++row) {
        const int32_t token = group.rows[row].token;
        if (token < 0 || token >= options_.vocab_size) {
          return Fail(ErrorKind::kInternal,
                      "step {}, group {}, row {} came back with token {}, ids are 0 .. {}", step_.number, i,
                      row, token, options_.vocab_size - 1);
        }
      }
    }
  }
  return {};
}

void Scheduler::Commit(StepOutput output, TimeNs now, std::vector<SequenceEvent>& events) {
  CHECK(open_);
  open_ = false;
  bool has_tokens = false;
  output.groups.resize(groups_.size());
  for (size_t i = 0; i < groups_.size(); ++i) {
    has_tokens |= !groups_[i].slices.empty();
    CommitGroup(groups_[i], step_.groups[i], output.groups[i], now, events);
  }
  if (has_tokens) ++num_steps_;
  for (Sequence* sequence : std::exchange(workless_, {})) {
    TokenEvent event = MakeEvent(*sequence, now);
    event.first_scheduled = now;
    event.finish = FinishReason::kLength;
    groups_[sequence->group()].stats.prompt_tokens += sequence->num_prompt();
    events.push_back({sequence->key(), std::move(event)});
    End(*sequence);
  }
}

void Scheduler::CommitGroup(Group& group, const GroupStep& step, GroupOutput& output, TimeNs now,
                            std::vector<SequenceEvent>& events) {
  const bool any_failure = std::ranges::any_of(output.failures, [](const auto& why) { return !why.empty(); });
  std::vector<bool> discarded;
  if (any_failure) discarded = TaintFailures(group, output);
  const size_t first_event = events.size();
  std::vector<Sequence*> ended;
  for (size_t i = 0; i < group.slices.size(); ++i) {
    if (any_failure && discarded[i]) continue;
    Sequence& sequence = *group.slices[i].sequence;
    const size_t num_events = events.size();
    if (any_failure && !output.failures[i].empty()) {
      TokenEvent event = MakeEvent(sequence, now);
      event.finish = FinishReason::kError;
      event.error = {ErrorKind::kInternal, std::move(output.failures[i])};
      events.push_back({sequence.key(), std::move(event)});
    } else {
      CommitSlice(group.slices[i], step, output, now, events);
    }
    if (events.size() > num_events && events.back().event.finish != FinishReason::kNone)
      ended.push_back(&sequence);
  }
  if (any_failure) {
    // Backwards, so that the front of the waiting list keeps their order.
    for (size_t i = group.slices.size(); i-- > 0;) {
      if (!discarded[i]) continue;
      std::erase(group.running, group.slices[i].sequence);
      Preempt(group, *group.slices[i].sequence);
      ++group.stats.num_preemptions;
    }
  }
  CHECK_LE(events.size() - first_event, group.slices.size());
  for (Sequence* sequence : ended) {
    std::erase(group.running, sequence);
    End(*sequence);
  }
}

// Says which slices read a block that another one spoilt in this step, and taints what must not be read
// again.
std::vector<bool> Scheduler::TaintFailures(Group& group, const GroupOutput& output) {
  std::vector<bool> discarded(group.slices.size());
  std::vector<bool> tainted(group.pool.num_blocks());
  for (size_t i = 0; i < group.slices.size(); ++i) {
    const Sequence& sequence = *group.slices[i].sequence;
    const int first_written = sequence.num_computed / options_.block_size;
    for (int place = 0; place < first_written; ++place) {
      if (tainted[sequence.blocks[place]]) discarded[i] = true;
    }
    if (!discarded[i] && output.failures[i].empty()) continue;
    for (size_t place = first_written; place < sequence.blocks.size(); ++place) {
      tainted[sequence.blocks[place]] = true;
      group.pool.Taint(sequence.blocks[place]);
    }
  }
  return discarded;
}

void Scheduler::CommitSlice(const Slice& slice, const GroupStep& step, GroupOutput& output, TimeNs now,
                            std::vector<SequenceEvent>& events) {
  Sequence& sequence = *slice.sequence;
  sequence.num_computed += slice.num_tokens;
  RowOutput* drawn = nullptr;
  for (int row = slice.first_row; row < slice.first_row + slice.num_rows; ++row) {
    if (step.rows[row].sampling >= 0) {
      drawn = &output.rows[row];
    } else {
      sequence.AcceptPromptRow(std::move(output.rows[row]));
    }
  }
  if (sequence.num_computed < sequence.num_wanted()) return;
  TokenEvent event = MakeEvent(sequence, now);
  if (sequence.num_generated() == 0) {
    groups_[sequence.group()].stats.prompt_tokens += sequence.num_prompt();
    event.prompt = sequence.TakePromptRows();
  }
  if (sequence.prompt_only()) {
    event.finish = FinishReason::kLength;
  } else {
    CHECK(drawn != nullptr);
    ++groups_[sequence.group()].stats.generation_tokens;
    event.finish = sequence.Accept(drawn->token);
    event.stop_token = sequence.stop_token();
    event.tokens.push_back(std::move(*drawn));
  }
  events.push_back({sequence.key(), std::move(event)});
}

TokenEvent Scheduler::MakeEvent(Sequence& sequence, TimeNs now) {
  TokenEvent event;
  event.choice = sequence.choice();
  event.time = now;
  if (!sequence.event_sent) {
    sequence.event_sent = true;
    event.num_cached_tokens = sequence.num_cached;
    event.first_scheduled = sequence.first_scheduled;
  }
  return event;
}

void Scheduler::EndAll(FinishReason reason, const Error& error, TimeNs now,
                       std::vector<SequenceEvent>& events) {
  open_ = false;
  std::vector<Sequence*> all;
  for (const auto& [key, choices] : requests_) {
    for (const auto& sequence : choices.sequences) {
      if (sequence != nullptr) all.push_back(sequence.get());
    }
  }
  std::ranges::sort(all, {},
                    [](const Sequence* sequence) { return std::pair(sequence->key(), sequence->choice()); });
  for (Sequence* sequence : all) {
    TokenEvent event = MakeEvent(*sequence, now);
    event.finish = reason;
    event.error = error;
    events.push_back({sequence->key(), std::move(event)});
    RemoveFromLists(*sequence);
    End(*sequence);
  }
}

}  // namespace tessera
