// Planning and the life of sequences. What outputs mean is in commit.cc.
#include "engine/scheduler.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "engine/step_writer.h"

namespace tessera {
namespace {

// What one more sequence in a group weighs, in prompt tokens to compute: about what it will delay others.
constexpr double kTokensPerSequence = 256;
// Logits of one group and step that prompt logprobs may ask for: 256 MiB of them. Larger prompts are cut.
constexpr int64_t kMaxPromptLogits = int64_t{64} << 20;

}  // namespace

Scheduler::Scheduler(const EngineOptions& options)
    : options_(options),
      max_prompt_rows_(static_cast<int>(std::clamp<int64_t>(
          kMaxPromptLogits / std::max(options.vocab_size, 1), 1, options.max_num_batched_tokens))) {
  CHECK_GT(options.num_groups, 0);
  CHECK_GT(options.block_size, 0);
  CHECK_GT(options.max_num_seqs, 0);
  CHECK_GT(options.vocab_size, 0);
  CHECK_GT(options.max_num_batched_tokens, 0);
  groups_.reserve(options.num_groups);
  for (int group = 0; group < options.num_groups; ++group) groups_.emplace_back(options.num_blocks);
  step_.groups.resize(options.num_groups);
}

Scheduler::~Scheduler() = default;

void Scheduler::Add(uint64_t key, std::shared_ptr<const Request> request) {
  CHECK(!open_);
  const auto [place, is_new] = requests_.try_emplace(key);
  CHECK(is_new);
  Choices& choices = place->second;
  choices.num_open = request->num_choices;
  choices.sequences.reserve(request->num_choices);
  for (int choice = 0; choice < request->num_choices; ++choice) {
    choices.sequences.push_back(std::make_unique<Sequence>(key, request, choice, options_.max_model_len));
    Sequence* sequence = choices.sequences.back().get();
    sequence->set_group(ChooseGroup(*sequence, choices.sequences.front()->group()));
    Group& group = groups_[sequence->group()];
    if (sequence->has_no_work()) {
      workless_.push_back(sequence);
    } else {
      sequence->waiting_place = group.waiting.insert(group.waiting.end(), sequence);
    }
  }
}

// The group that costs least: prompt tokens that its cache does not hold, and company. Further answers of a
// request find its prompt in the group of the first. The search starts behind the last choice, so that equals
// take turns.
int Scheduler::ChooseGroup(Sequence& sequence, int first_choice_group) {
  const int num_groups = static_cast<int>(groups_.size());
  if (num_groups == 1) return 0;
  int best = -1;
  double best_cost = 0;
  for (int i = 1; i <= num_groups; ++i) {
    const int index = (last_group_ + i) % num_groups;
    Group& group = groups_[index];
    FindCached(group, sequence);
    int num_cached = static_cast<int>(cached_.size()) * options_.block_size;
    if (sequence.choice() > 0 && index == first_choice_group && options_.enable_prefix_caching)
      num_cached = std::max(sequence.max_cached(), 0) / options_.block_size * options_.block_size;
    const auto num_waiting = static_cast<double>(group.waiting.size());
    const double used = 1 - static_cast<double>(group.pool.num_free()) / std::max(group.pool.num_blocks(), 1);
    // A full cache makes those who wait wait longer (the weights of vLLM's balancer).
    const double company =
        static_cast<double>(group.running.size()) + num_waiting * (1 + 6 * std::max(0.0, used - 0.5));
    const double cost = sequence.num_wanted() - num_cached + kTokensPerSequence * company;
    if (best < 0 || cost < best_cost) {
      best = index;
      best_cost = cost;
    }
  }
  last_group_ = best;
  return best;
}

void Scheduler::Cancel(uint64_t key) {
  const auto found = requests_.find(key);
  if (found == requests_.end()) return;
  const int num_choices = static_cast<int>(found->second.sequences.size());
  for (int choice = 0; choice < num_choices; ++choice) CancelChoice(key, choice);
}

void Scheduler::CancelChoice(uint64_t key, int choice) {
  CHECK(!open_);
  const auto found = requests_.find(key);
  if (found == requests_.end() || choice < 0) return;
  if (choice >= static_cast<int>(found->second.sequences.size())) return;
  Sequence* sequence = found->second.sequences[choice].get();
  if (sequence == nullptr) return;
  RemoveFromLists(*sequence);
  End(*sequence);
}

const Step& Scheduler::Plan(TimeNs now) {
  CHECK(!open_);
  open_ = true;
  ++step_.number;
  for (size_t i = 0; i < groups_.size(); ++i) {
    Group& group = groups_[i];
    GroupStep& step = step_.groups[i];
    ClearGroupStep(step);
    group.slices.clear();
    group.budget = options_.max_num_batched_tokens;
    group.row_budget = max_prompt_rows_;
    group.preempted = false;
    if (options_.enable_chunked_prefill) {
      PlanRunning(group, step);
      if (!group.preempted) PlanWaiting(group, step, now);
    } else {
      PlanWaiting(group, step, now);
      if (group.slices.empty()) PlanRunning(group, step);
    }
    // A group with work always moves: the first running sequence finds blocks by preempting the others, and
    // the head of the waiting list fits an empty pool (CheckRequest).
    CHECK(!group.slices.empty() || (group.running.empty() && group.waiting.empty()));
  }
  return step_;
}

void Scheduler::PlanRunning(Group& group, GroupStep& step) {
  // MakeRoom shortens the list behind the sequence at hand.
  for (size_t i = 0; i < group.running.size() && group.budget > 0; ++i) {
    Sequence& sequence = *group.running[i];
    const int num_tokens = NumTokens(group, sequence, sequence.num_wanted() - sequence.num_computed);
    if (num_tokens == 0) continue;
    const int num_blocks =
        NumBlocks(sequence.num_computed + num_tokens) - static_cast<int>(sequence.blocks.size());
    if (!MakeRoom(group, sequence, num_blocks)) return;
    Schedule(group, step, sequence, num_tokens);
  }
}

// Preempts from the end of the running list until `num_blocks` are free. False when `sequence` itself had to
// go. Sequences behind it have no slice in this step yet, so no planned work is lost.
bool Scheduler::MakeRoom(Group& group, const Sequence& sequence, int num_blocks) {
  while (group.pool.num_free() < num_blocks) {
    Sequence& last = *group.running.back();
    group.running.pop_back();
    Preempt(group, last);
    ++group.stats.num_preemptions;
    group.preempted = true;
    if (&last == &sequence) return false;
  }
  return true;
}

void Scheduler::PlanWaiting(Group& group, GroupStep& step, TimeNs now) {
  // Every admission needs a new block, because at least one token is computed behind the cached full blocks.
  while (!group.waiting.empty() && group.budget > 0 && group.pool.num_free() > 0 &&
         static_cast<int>(group.running.size()) < options_.max_num_seqs) {
    if (!Admit(group, step, now)) return;
  }
}

// Admits the head of the waiting list, or returns false: it must wait, and so must all behind it.
bool Scheduler::Admit(Group& group, GroupStep& step, TimeNs now) {
  Sequence& sequence = *group.waiting.front();
  FindCached(group, sequence);
  const int num_hits = static_cast<int>(cached_.size());
  const int num_cached = num_hits * options_.block_size;
  const int rest = sequence.num_wanted() - num_cached;
  // Without chunked prefill the rest runs whole. Only a preempted sequence may have grown beyond any budget
  // (CheckRequest refuses such prompts): it is cut after all, or it would never run again.
  const bool fits_whole = rest <= group.budget;
  const bool never_fits = rest > options_.max_num_batched_tokens && group.slices.empty();
  if (!options_.enable_chunked_prefill && !fits_whole && !never_fits) return false;
  const int num_tokens = NumTokens(group, sequence, rest);
  if (num_tokens == 0) return false;
  // All blocks of the known tokens must be free, not just those of this chunk: a sequence that cannot be
  // finished would only be preempted again.
  const auto is_free = [&](int32_t block) { return group.pool.references(block) == 0; };
  const int num_free = group.pool.num_free() - static_cast<int>(std::ranges::count_if(cached_, is_free));
  if (NumBlocks(sequence.num_wanted()) - num_hits > num_free) return false;

  group.waiting.pop_front();
  for (const int32_t block : cached_) group.pool.Reference(block);
  sequence.blocks.assign(cached_.begin(), cached_.end());
  sequence.num_computed = num_cached;
  sequence.Advance(SequenceChange::kAdmit);
  if (!sequence.was_admitted) {
    sequence.was_admitted = true;
    sequence.first_scheduled = now;
    sequence.num_cached = num_cached;
    if (options_.enable_prefix_caching && !sequence.wants_prompt_rows()) {
      group.stats.prefix_queries += sequence.num_prompt();
      group.stats.prefix_hits += num_cached;
    }
  }
  group.running.push_back(&sequence);
  Schedule(group, step, sequence, num_tokens);
  return true;
}

void Scheduler::FindCached(Group& group, Sequence& sequence) {
  cached_.clear();
  if (!options_.enable_prefix_caching) return;
  const int max_hits = std::max(sequence.max_cached(), 0) / options_.block_size;
  for (int i = 0; i < max_hits; ++i) {
    const int32_t block = group.pool.Find(sequence.block_key(i, options_.block_size));
    if (block < 0) return;
    cached_.push_back(block);
  }
}

int Scheduler::NumTokens(const Group& group, const Sequence& sequence, int rest) const {
  const int num_tokens = std::min(rest, group.budget);
  return sequence.owes_prompt_rows() ? std::min(num_tokens, group.row_budget) : num_tokens;
}

// Gives the sequence its blocks and its place in the step. REQUIRES: the blocks are free.
void Scheduler::Schedule(Group& group, GroupStep& step, Sequence& sequence, int num_tokens) {
  const int end = sequence.num_computed + num_tokens;
  for (int num = NumBlocks(end); static_cast<int>(sequence.blocks.size()) < num;) {
    const auto [block, dirty] = group.pool.Allocate();
    sequence.blocks.push_back(block);
    if (dirty) step.zero_blocks.push_back(block);
  }
  const int first_row = static_cast<int>(step.rows.size());
  AppendSlice(sequence, num_tokens, step);
  const int num_rows = static_cast<int>(step.rows.size()) - first_row;
  group.slices.push_back(
      {.sequence = &sequence, .num_tokens = num_tokens, .first_row = first_row, .num_rows = num_rows});
  group.budget -= num_tokens;
  if (sequence.owes_prompt_rows()) group.row_budget = std::max(group.row_budget - num_rows, 0);
  if (!options_.enable_prefix_caching) return;
  for (int i = sequence.num_computed / options_.block_size; i < end / options_.block_size; ++i) {
    group.pool.Publish(sequence.blocks[i], sequence.block_key(i, options_.block_size));
  }
}

void Scheduler::ReleaseBlocks(Group& group, Sequence& sequence) {
  for (; !sequence.blocks.empty(); sequence.blocks.pop_back()) group.pool.Release(sequence.blocks.back());
}

// To the front of the waiting list. The caller takes it off the running list.
void Scheduler::Preempt(Group& group, Sequence& sequence) {
  ReleaseBlocks(group, sequence);
  sequence.Advance(SequenceChange::kPreempt);
  sequence.waiting_place = group.waiting.insert(group.waiting.begin(), &sequence);
}

void Scheduler::RemoveFromLists(Sequence& sequence) {
  Group& group = groups_[sequence.group()];
  if (sequence.has_no_work()) {
    std::erase(workless_, &sequence);
  } else if (sequence.state() == SequenceState::kWaiting) {
    group.waiting.erase(sequence.waiting_place);
  } else {
    std::erase(group.running, &sequence);
  }
}

// Destroys the sequence. The caller has taken it off its list.
void Scheduler::End(Sequence& sequence) {
  ReleaseBlocks(groups_[sequence.group()], sequence);
  sequence.Advance(SequenceChange::kEnd);
  const auto found = requests_.find(sequence.key());
  CHECK(found != requests_.end());
  Choices& choices = found->second;
  choices.sequences[sequence.choice()].reset();
  if (--choices.num_open == 0) requests_.erase(found);
}

void GroupStats::Add(const GroupStats& other) {
  num_running += other.num_running;
  num_waiting += other.num_waiting;
  num_blocks += other.num_blocks;
  num_blocks_used += other.num_blocks_used;
  prefix_queries += other.prefix_queries;
  prefix_hits += other.prefix_hits;
  num_preemptions += other.num_preemptions;
  prompt_tokens += other.prompt_tokens;
  generation_tokens += other.generation_tokens;
}

EngineStats Scheduler::stats() const {
  EngineStats stats;
  stats.num_steps = num_steps_;
  for (const Group& group : groups_) {
    GroupStats& part = stats.groups.emplace_back(group.stats);
    part.num_running = static_cast<int64_t>(group.running.size());
    part.num_waiting = static_cast<int64_t>(group.waiting.size());
    part.num_blocks = group.pool.num_blocks();
    part.num_blocks_used = group.pool.num_blocks() - group.pool.num_free();
  }
  for (const Sequence* sequence : workless_) ++stats.groups[sequence->group()].num_waiting;
  for (const GroupStats& part : stats.groups) stats.Add(part);
  return stats;
}

void Scheduler::CheckInvariants() const {
  size_t num_listed = workless_.size();
  for (const Group& group : groups_) {
    num_listed += group.waiting.size() + group.running.size();
    std::vector<int> holders(group.pool.num_blocks());
    for (const Sequence* sequence : group.running) {
      CHECK(sequence->state() == SequenceState::kRunning);
      CHECK_GE(static_cast<int>(sequence->blocks.size()), NumBlocks(sequence->num_computed));
      for (const int32_t block : sequence->blocks) ++holders[block];
    }
    int num_free = 0;
    for (int block = 0; block < group.pool.num_blocks(); ++block) {
      CHECK_EQ(group.pool.references(block), holders[block]);
      num_free += holders[block] == 0;
    }
    CHECK_EQ(group.pool.num_free(), num_free);
    CHECK_LE(static_cast<int>(group.running.size()), options_.max_num_seqs);
    for (const Sequence* sequence : group.waiting) {
      CHECK(sequence->state() == SequenceState::kWaiting);
      CHECK(sequence->blocks.empty());
      CHECK_EQ(sequence->num_computed, 0);
    }
  }
  size_t num_open = 0;
  for (const auto& [key, choices] : requests_) num_open += static_cast<size_t>(choices.num_open);
  CHECK_EQ(num_open, num_listed);
}

}  // namespace tessera
