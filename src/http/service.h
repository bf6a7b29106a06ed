// What every handler of one API server shares. Lives on the io thread, except where it says otherwise.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/sha256.h"
#include "http/api.h"
#include "http/metrics.h"
#include "http/prompt.h"
#include "http/server.h"

namespace tessera {

class Generation;

// Requests whose outbox has news, told by the engine thread and read on the io thread: one wake-up for all
// news of a step. Outlives the server where an outbox still holds it.
class NewsList {
 public:
  explicit NewsList(HttpServer& server) : server_(&server) {}
  void Add(std::weak_ptr<Generation> generation);  // any thread
  void Close();                                    // nothing is delivered any more; the server may go

 private:
  static void Deliver(const std::shared_ptr<NewsList>& list);

  std::mutex mutex_;
  HttpServer* server_;  // null when closed
  std::vector<std::weak_ptr<Generation>> waiting_;
  std::weak_ptr<NewsList> self_;

 public:
  static std::shared_ptr<NewsList> Create(HttpServer& server) {
    auto list = std::make_shared<NewsList>(server);
    list->self_ = list;
    return list;
  }
};

struct Service {
  const ApiOptions options;
  const ApiModel model;
  HttpServer& server;
  Metrics metrics;
  const std::shared_ptr<NewsList> news;
  const std::vector<Sha256> key_digests;
  const size_t max_token_bytes;
  const int64_t start_time;           // Unix seconds
  std::atomic<bool> draining{false};  // any thread
  int load = 0;                       // generation requests being served
  uint64_t num_requests = 0;

  PromptRules prompt_rules() const {
    return {options, model.tokenizer, model.chat_template, max_token_bytes};
  }
  CallRules call_rules() const { return {options, model.tokenizer.vocab_size()}; }
};

HttpResponse ErrorResponse(const ApiError& error);

// The id that the client chose, or a random one. Ids that are not plain printable text are not taken.
std::string ChooseRequestId(std::string_view header, std::string_view field);
uint64_t RandomSeed();

}  // namespace tessera
