// THE FACE of engine/: takes requests, answers with events. One engine thread owns every mutable object
// behind it and loops Plan -> Run -> Commit. Everything here may be called from any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "engine/executor.h"
#include "engine/request.h"

namespace tessera {

// Of one data-parallel group, or of all. Requests = sequences here.
struct GroupStats {
  int64_t num_running = 0, num_waiting = 0;      // sequences
  int64_t num_blocks = 0, num_blocks_used = 0;   // used: referenced by a running sequence
  uint64_t prefix_queries = 0, prefix_hits = 0;  // tokens, counted once per sequence
  uint64_t num_preemptions = 0;
  uint64_t prompt_tokens = 0, generation_tokens = 0;
  void Add(const GroupStats& other);
};
struct EngineStats : GroupStats {  // the sum of all groups
  std::vector<GroupStats> groups;
  uint64_t num_steps = 0;
  TimeNs last_step_end = 0;  // engine clock; 0 before the first step
  TimeNs run_time = 0;       // spent in the executor: forward passes and draws
};

struct EngineOptions {
  int num_groups = 1;  // data-parallel groups
  int num_blocks = 0;  // per group
  int block_size = 128;
  int max_num_seqs = 256;             // running, per group
  int max_num_batched_tokens = 4096;  // per group and step; below max_num_seqs the last ones of them starve
  int max_model_len = 32768;
  int max_queued_requests = 10000;  // waiting sequences beyond which nothing is accepted
  bool enable_chunked_prefill = true;
  bool enable_prefix_caching = true;
  int vocab_size = 0;  // ids that may be sampled
};

class Engine {
 public:
  // `executor` and `clock` outlive the engine. Starts the engine thread.
  Engine(const EngineOptions& options, Executor& executor, const Clock& clock);
  ~Engine();  // aborts what is left

  // kExhausted when the queue is full, kUnavailable while draining or after a fatal error, kInvalid (with the
  // numbers) when the cache can never hold the request, an id is outside the vocabulary, or the request id is
  // in use. `outbox` gets num_choices sequences' events.
  Status Submit(std::shared_ptr<const Request> request, std::shared_ptr<Outbox> outbox);
  // Ends the request (or one of its sequences) without further events. Blocks are free before the next step
  // is planned. Unknown ids are ignored; the id may be used again at once.
  void Cancel(const std::string& request_id);
  void CancelChoice(const std::string& request_id, int choice);

  EngineStats Stats() const;
  std::vector<RankStatus> Ranks() const;  // what the executor says of them
  // The world is broken for good: what runs ends with this error, and nobody may come in.
  void Break(Error error);
  // A step has run, or can: nothing has failed for good.
  bool healthy() const;
  Error fatal_error() const;  // why not

  // No new requests from now on; waits until all are done or `limit` is over, then ends the rest with kAbort.
  void Drain(std::chrono::nanoseconds limit);

 private:
  struct Content;
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
