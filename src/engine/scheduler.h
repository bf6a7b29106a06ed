// Which sequences run next, and what their outputs mean. Pure: no clock, thread or socket; the same calls
// give the same steps and events. One owner thread (the engine's) calls Plan, carries the step out, and calls
// Commit.
//
// A step hands out one budget of tokens per group. Running sequences come first, in list order; if blocks run
// out the last of them is preempted: it gives its blocks back and goes to the front of the waiting list, to
// be recomputed. Then waiting sequences are admitted in order, nobody passes the head, unless one was
// preempted in this step; admission never preempts. Without chunked prefill a prompt runs whole, and steps
// that admit run nothing else (prefill first).
//
// Prefix cache: a block is published when it fills, in the plan of the very step that fills it, so that
// sequences later in the same step share it. The model writes all rows of a layer before it attends, and
// slices of a step lie in the order they were planned: who reads comes after who writes.
#pragma once

#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "engine/block_pool.h"
#include "engine/engine.h"
#include "engine/request.h"
#include "engine/sequence.h"
#include "model/step.h"

namespace tessera {

// kInvalid, with the numbers, when the request could never run under these options: ids outside the
// vocabulary, a prompt that leaves no room, a cache or a budget too small for it. Any thread.
Status CheckRequest(const EngineOptions& options, const Request& request);

struct SequenceEvent {
  uint64_t key = 0;  // of the request
  TokenEvent event;
};

class Scheduler {
 public:
  explicit Scheduler(const EngineOptions& options);
  ~Scheduler();
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Queues the request's sequences, each to the group that has its prompt in the cache or is least busy.
  // `key` names the request from now on. REQUIRES: CheckRequest passed, the key is new, and no plan is open.
  void Add(uint64_t key, std::shared_ptr<const Request> request);
  // Ends without an event; blocks are free at once. Unknown or ended ones are ignored. REQUIRES: no plan is
  // open.
  void Cancel(uint64_t key);
  void CancelChoice(uint64_t key, int choice);
  // Nothing waits or runs.
  bool idle() const { return requests_.empty(); }

  // The next step of all groups; valid until the next Plan. It is open until Commit, Abandon or EndAll.
  // Without tokens there is nothing to carry out: commit an empty StepOutput.
  const Step& Plan(TimeNs now);
  // kInternal when the output has not the shape the open step asks for.
  Status CheckOutput(const StepOutput& output) const;
  // Takes the open step's outputs. Appends at most one event per sequence.
  void Commit(StepOutput output, TimeNs now, std::vector<SequenceEvent>& events);
  // Ends every sequence with an event each; also when a plan is open.
  void EndAll(FinishReason reason, const Error& error, TimeNs now, std::vector<SequenceEvent>& events);

  // Without queue lengths outside the scheduler and times.
  EngineStats stats() const;
  // CHECKs that lists, tables and reference counts agree. O(blocks); for tests.
  void CheckInvariants() const;

 private:
  // What a sequence does in the open step.
  struct Slice {
    Sequence* sequence = nullptr;
    int num_tokens = 0;
    int first_row = 0, num_rows = 0;  // in the group's rows
  };
  struct Group {
    explicit Group(int num_blocks) : pool(num_blocks) {}
    BlockPool pool;
    std::list<Sequence*> waiting;
    std::vector<Sequence*> running;
    std::vector<Slice> slices;
    int budget = 0;      // tokens left in this step
    int row_budget = 0;  // prompt logprob rows left in this step
    bool preempted = false;
    GroupStats stats;  // the counters; levels are read off the lists
  };
  struct Choices {
    std::vector<std::unique_ptr<Sequence>> sequences;  // by choice; null once ended
    int num_open = 0;
  };

  int ChooseGroup(Sequence& sequence, int first_choice_group);
  void PlanRunning(Group& group, GroupStep& step);
  void PlanWaiting(Group& group, GroupStep& step, TimeNs now);
  bool MakeRoom(Group& group, const Sequence& sequence, int num_blocks);
  bool Admit(Group& group, GroupStep& step, TimeNs now);
  void FindCached(Group& group, Sequence& sequence);
  void Schedule(Group& group, GroupStep& step, Sequence& sequence, int num_tokens);
  int NumTokens(const Group& group, const Sequence& sequence, int rest) const;
  int NumBlocks(int num_tokens) const { return (num_tokens + options_.block_size - 1) / options_.block_size; }

  void CommitGroup(Group& group, const GroupStep& step, GroupOutput& output, TimeNs now,
                   std::vector<SequenceEvent>& events);
  void CommitSlice(const Slice& slice, const GroupStep& step, GroupOutput& output, TimeNs now,
                   std::vector<SequenceEvent>& events);
  std::vector<bool> TaintFailures(Group& group, const GroupOutput& output);
  TokenEvent MakeEvent(Sequence& sequence, TimeNs now);

  void ReleaseBlocks(Group& group, Sequence& sequence);
  void Preempt(Group& group, Sequence& sequence);
  void End(Sequence& sequence);
  void RemoveFromLists(Sequence& sequence);

  const EngineOptions options_;
  const int max_prompt_rows_;  // per group and step
  std::vector<Group> groups_;
  std::unordered_map<uint64_t, Choices> requests_;
  std::vector<Sequence*> workless_;  // end at the next commit
  std::vector<int32_t> cached_;      // FindCached's answer: the blocks of the longest cached prefix
  Step step_;
  bool open_ = false;
  uint64_t num_steps_ = 0;
  int last_group_ = -1;  // the last that a sequence was given to
};

}  // namespace tessera
