// What /metrics shows: latencies and sizes measured by the front end, the engine's counters, and the process.
// Names, labels and buckets are those that dashboards of this API know; old names are exported beside the new
// ones. prometheus-cpp stays in metrics.cc. Used on the io thread only.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "engine/engine.h"
#include "http/api.h"
#include "http/server.h"

namespace tessera {

// One answer, when its last token came. Times are of the engine's clock; 0: never happened.
struct SequenceRecord {
  std::string_view finish;  // stop, length, abort, error
  int64_t prompt_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t generated_tokens = 0;
  TimeNs arrival = 0;
  TimeNs first_scheduled = 0;
  TimeNs first_token = 0;
  TimeNs last_token = 0;
};

class Metrics {
 public:
  explicit Metrics(const ApiOptions& options);
  ~Metrics();

  void OnRequest(int num_choices, int64_t max_tokens);
  // Tokens that the step which ended at `time` computed or made, one call per event of the step.
  void OnStepTokens(TimeNs time, int64_t num_tokens);
  void OnFirstToken(TimeNs arrival, TimeNs time, int64_t prompt_tokens, int64_t cached_tokens);
  void OnNextToken(TimeNs since_last);
  void OnSequenceEnd(const SequenceRecord& record);
  // The most tokens that any answer of a request got.
  void OnRequestEnd(int64_t max_generated_tokens);
  void OnRejected();
  // `handler` is the route, "none" for unknown ones.
  void OnHttp(const ExchangeRecord& record, const std::string& handler);

  struct Live {
    EngineStats engine;
    std::vector<RankStatus> ranks;
    TimeNs now = 0;
    bool draining = false;
    bool healthy = true;
  };
  // The text exposition format, version 0.0.4.
  std::string Text(const Live& live);

 private:
  struct Content;
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
