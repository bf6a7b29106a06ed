// What a user asked (Request, immutable) and what comes back while it is answered (TokenEvent, Outbox).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/error.h"
#include "model/step.h"

namespace tessera {

struct SamplingParams {
  float temperature = 1;  // 0: greedy
  float top_p = 1;
  int32_t top_k = 0;
  float min_p = 0;
  float repetition_penalty = 1;
  float frequency_penalty = 0;
  float presence_penalty = 0;
  uint64_t seed = 0;        // resolved: a random one was drawn where the user gave none
  int32_t max_tokens = 16;  // 0: the prompt alone (needs prompt_logprobs or echo); at least 1 otherwise
  int32_t min_tokens = 0;
  bool ignore_eos = false;
  std::vector<int32_t> eos_ids;         // end with kStop and no stop token id
  std::vector<int32_t> stop_token_ids;  // end with kStop and the id
  std::vector<TokenBias> logit_bias;
  std::vector<int32_t> allowed_token_ids;       // empty: all
  std::vector<std::vector<int32_t>> bad_words;  // token sequences that must not appear
  int32_t num_logprobs = -1;                    // -1: none
  int32_t num_prompt_logprobs = -1;             // -1: none; reads no prefix cache
};

// Immutable once submitted. Ids are checked against the vocabulary by the front end.
struct Request {
  std::string id;
  std::vector<int32_t> prompt;  // at least one token
  int32_t num_choices = 1;      // n: sequences of this request
  SamplingParams sampling;
  std::string cache_salt;  // isolates the prefix cache; empty: shared
};

enum class FinishReason { kNone, kStop, kLength, kAbort, kError };

// News of one sequence after one step. Only the last event of a sequence has a finish reason.
struct TokenEvent {
  int32_t choice = 0;
  std::vector<RowOutput> tokens;  // newly generated (0 or 1 without speculation)
  std::vector<RowOutput> prompt;  // once, with prompt logprobs: rows for prompt tokens 1 .. n-1, in order
  FinishReason finish = FinishReason::kNone;
  int32_t stop_token = -1;        // the entry of stop_token_ids that ended it
  Error error;                    // with kError
  int32_t num_cached_tokens = 0;  // prompt tokens found in the prefix cache, with the first event
  TimeNs first_scheduled = 0;     // engine clock, with the first event
  TimeNs time = 0;                // engine clock, when the step ended
};

// Mailbox of one request: the engine thread puts events in, one front-end thread takes them out.
class Outbox {
 public:
  // `notify` is called by the engine thread when the box turns from empty to not empty; it must not block,
  // and not call the engine.
  explicit Outbox(std::function<void()> notify) : notify_(std::move(notify)) {}
  void Put(TokenEvent event);      // engine thread
  std::vector<TokenEvent> Take();  // front end: all events so far
 private:
  std::mutex mutex_;
  std::vector<TokenEvent> events_;
  const std::function<void()> notify_;
};

}  // namespace tessera
