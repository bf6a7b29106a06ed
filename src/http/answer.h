// JSON of answers: whole ones and stream chunks of both endpoints, logprobs in both shapes. Text in, text
// out: what is to be said is decided in generation.cc. Chunks are appended to a prefix made once per request;
// no tree per token.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "http/openai.h"

namespace tessera {

struct Usage {
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t cached_tokens = 0;
  int64_t reasoning_tokens = 0;
};

// How usage is shown.
struct UsageStyle {
  bool prompt_details = false;     // cached tokens
  bool reasoning_details = false;  // reasoning tokens
};
void AppendUsage(std::string& out, const Usage& usage, const UsageStyle& style);

struct LogprobStyle {
  CallKind kind = CallKind::kCompletion;
  bool tokens_as_ids = false;
  bool skip_special_tokens = true;  // special tokens take no room in the text
  int num_top = 0;
};

// Logprobs of the tokens of one answer, collected until they are taken out.
class LogprobText {
 public:
  // `tokenizer` outlives the object.
  LogprobText(const Tokenizer& tokenizer, const LogprobStyle& style) : tokenizer_(tokenizer), style_(style) {}
  void Add(const RowOutput& row);
  void AddWithoutLogprob(int32_t token);  // the first prompt token
  bool empty() const { return num_tokens_ == 0; }
  // The JSON object of all tokens since the last call.
  std::string Take();
  void Drop();

 private:
  void AddCompletion(int32_t token, const RowOutput* row);
  void AddChat(const RowOutput& row);

  const Tokenizer& tokenizer_;
  const LogprobStyle style_;
  int num_tokens_ = 0;
  int64_t offset_ = 0;                              // characters of the text before the next token
  std::string tokens_, logprobs_, tops_, offsets_;  // elements, joined by commas; chat uses tokens_ alone
};

// [null, {"id": {"logprob", "rank", "decoded_token"}}, ...]
std::string PromptLogprobsJson(const Tokenizer& tokenizer, const std::vector<RowOutput>& rows);

// What one chunk or one choice of a whole answer says. Views must live during the call.
struct AnswerPiece {
  int index = 0;
  bool role_chunk = false;                           // chat: the first delta, role alone
  std::string_view text = {};                        // or content
  std::string_view reasoning = {};                   // chat
  std::string_view logprobs = {};                    // JSON; empty: null
  std::string_view finish = {};                      // empty: null
  std::string_view stop_reason = {};                 // JSON; empty: null
  const std::vector<int32_t>* token_ids = nullptr;   // null: not asked for
  const std::vector<int32_t>* prompt_ids = nullptr;  // null: not asked for, or given before
  std::string_view prompt_logprobs = {};             // JSON; empty: null
  const Usage* usage = nullptr;                      // chunks
};

class AnswerWriter {
 public:
  // `id` with its prefix. `fingerprint`: what may change bits, for system_fingerprint. `reasoning`: thoughts
  // are told apart, and an empty content is null.
  AnswerWriter(CallKind kind, std::string id, int64_t created, const std::string& model,
               const std::string& fingerprint, std::string role, bool reasoning,
               const UsageStyle& usage_style);
  const std::string& id() const { return id_; }

  // Each appends one event, "data: {...}" and a blank line.
  void AppendChunk(std::string& out, const AnswerPiece& piece) const;
  void AppendUsageChunk(std::string& out, const Usage& usage) const;
  // A choice of the whole answer; choices are joined by commas.
  void AppendChoice(std::string& out, const AnswerPiece& piece) const;
  std::string Whole(std::string_view choices, const Usage& usage, std::string_view prompt_logprobs,
                    const std::vector<int32_t>* prompt_ids) const;

 private:
  void AppendDelta(std::string& out, const AnswerPiece& piece) const;

  const CallKind kind_;
  const std::string id_;
  const std::string role_;
  const bool reasoning_;
  const UsageStyle usage_style_;
  std::string chunk_prefix_;  // up to the index of the choice
  std::string head_;          // id to model, of chunks and of whole answers but for the object
};

void AppendErrorEvent(std::string& out, const ApiError& error);
extern const std::string_view kDoneEvent;

}  // namespace tessera
