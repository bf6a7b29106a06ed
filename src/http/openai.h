// The OpenAI API as values: what a request asks for, checked field by field, and the one shape of every
// error. No sockets and no tokenizer: bytes -> JsonValue -> GenerationCall. What follows is prompt.h.
#pragma once

#include <cstdint>
#include <expected>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "engine/request.h"
#include "http/api.h"

namespace tessera {

// {"error":{"message","type","param","code"}} with a status.
struct ApiError {
  int status = 400;
  std::string type = "BadRequestError";
  std::string message;
  std::string param = {};  // empty: null
  int retry_after_s = 0;   // header Retry-After; 0: none
};
template <typename T>
using ApiResult = std::expected<T, ApiError>;
using ApiStatus = ApiResult<void>;

std::string ErrorBody(const ApiError& error);
// A sampling value or other content that is not acceptable.
std::unexpected<ApiError> BadRequest(std::string param, std::string message);
// A rule between fields that the request breaks: type "Bad Request".
std::unexpected<ApiError> BrokenRule(std::string param, std::string message);
std::unexpected<ApiError> NotSupported(std::string param, std::string_view what);
// What the engine or a parser below reported.
ApiError FromError(const Error& error);

// What the checks need to know about the server.
struct CallRules {
  const ApiOptions& options;
  int vocab_size = 0;
};

enum class CallKind { kCompletion, kChat };

// One prompt as it was written.
struct PromptInput {
  std::string text;
  std::vector<int32_t> ids;
  bool is_text = false;
};

// One POST to /v1/completions or /v1/chat/completions, after all checks that need no tokenizer.
struct GenerationCall {
  CallKind kind = CallKind::kCompletion;
  std::string request_id;            // of the body; empty: none
  std::vector<PromptInput> prompts;  // completions
  ChatInput chat;                    // chat
  std::string last_role;             // chat: of the last message
  bool add_special_tokens = true;
  int num_choices = 1;      // n, for each prompt
  SamplingParams sampling;  // max_tokens, bad_words and seed are still open
  std::optional<int32_t> max_tokens;
  std::optional<uint64_t> seed;
  std::vector<std::string> bad_words;
  std::vector<std::string> stop;
  std::string cache_salt;
  bool stream = false;
  bool include_usage = false;
  bool continuous_usage = false;
  bool echo = false;
  bool include_stop = false;  // include_stop_str_in_output
  bool skip_special_tokens = true;
  bool return_token_ids = false;
  bool tokens_as_ids = false;  // return_tokens_as_token_ids
  bool include_reasoning = true;
  bool prompt_logprobs_asked = false;  // the field prompt_logprobs, not echo
};

ApiResult<GenerationCall> ParseCompletionCall(const JsonValue& body, const CallRules& rules);
ApiResult<GenerationCall> ParseChatCall(const JsonValue& body, const CallRules& rules);

// POST /tokenize, either form.
struct TokenizeCall {
  bool is_chat = false;
  std::string prompt;
  ChatInput chat;
  bool add_special_tokens = true;
  bool return_token_strs = false;
};
ApiResult<TokenizeCall> ParseTokenizeCall(const JsonValue& body, const CallRules& rules);

// POST /detokenize. Ids beyond 32 bits come as -1: they name no token.
ApiResult<std::vector<int32_t>> ParseDetokenizeCall(const JsonValue& body, const CallRules& rules);

// A body's bytes as a JSON object, or the 400 for it.
ApiResult<JsonValue> ParseBody(std::string_view bytes);

}  // namespace tessera
