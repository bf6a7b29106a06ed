// THE FACE of http/: the OpenAI-compatible API of one engine, served on one address.
#pragma once

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "engine/engine.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace tessera {

// Sampling defaults of a request that does not say: generation_config.json over the built-in ones.
struct DefaultSampling {
  double temperature = 1;
  double top_p = 1;
  int top_k = 0;
  double min_p = 0;
  double repetition_penalty = 1;
  int max_new_tokens = 0;  // cap on a missing max_tokens in chat; 0: none
};

struct ApiOptions {
  std::string host = "127.0.0.1";
  int port = 8000;
  std::vector<std::string> model_names;  // the first is used in answers
  std::string model_root;                // the path as typed, for /v1/models
  std::vector<std::string> api_keys;     // empty: open
  std::string version;
  std::string numerics;  // name of the arithmetic: with the version it makes system_fingerprint
  DefaultSampling sampling;
  std::vector<int32_t> eos_ids;
  int max_model_len = 0;
  int max_logprobs = 20;
  bool reasoning_parser = false;  // deepseek_r1
  std::string response_role = "assistant";
  std::string default_chat_template_kwargs = "{}";
  bool enable_prompt_tokens_details = false;
  bool enable_force_include_usage = false;
  bool enable_request_id_headers = false;
  bool enable_server_load_tracking = false;
  bool enable_tokenizer_info_endpoint = false;
  size_t max_body_bytes = size_t{64} << 20;
  int block_size = 0;  // for cache_config_info
  int num_blocks = 0;
};

// What the API serves. All outlive the server. `chat_template` may be null: chat is then refused with the
// reason.
struct ApiModel {
  Engine& engine;
  const Tokenizer& tokenizer;
  const ChatTemplate* chat_template = nullptr;
  const Clock& clock;
};

class ApiServer {
 public:
  // Binds and listens at once, so that a port in use is an error here; answers /health with 200 from then on.
  static Result<std::unique_ptr<ApiServer>> Start(const ApiOptions& options, const ApiModel& model);
  ~ApiServer();

  int port() const;  // the bound one, when options.port was 0
  // /ready answers 503 and new generation requests are refused with 503 + Retry-After; running ones go on.
  void BeginDrain();
  // Waits until no request is open, at most `limit`; then closes every connection and stops the threads.
  void Stop(std::chrono::nanoseconds limit);

 private:
  struct Content;
  explicit ApiServer(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
