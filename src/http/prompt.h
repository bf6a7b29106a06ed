// From a checked call to token ids and the engine's requests: template, tokenizer, length rules. Slow for
// long texts, so it runs on a background thread; it touches nothing but its arguments.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "http/openai.h"

namespace tessera {

struct PromptRules {
  const ApiOptions& options;
  const Tokenizer& tokenizer;
  const ChatTemplate* chat_template = nullptr;
  size_t max_token_bytes = 0;  // of the longest token: longer texts cannot fit, whatever they say
};

struct PreparedPrompt {
  std::shared_ptr<Request> request;  // all but its id
  std::string echo_text;
};

// One for each prompt of the call. Empties the texts of `call`, which are not needed any more.
ApiResult<std::vector<PreparedPrompt>> PreparePrompts(GenerationCall& call, uint64_t seed,
                                                      const PromptRules& rules);

// Ids of a chat, or the error for it.
ApiResult<TokenIds> RenderChat(const ChatInput& chat, bool add_special_tokens, const PromptRules& rules);

// Longest token of the vocabulary, in bytes.
size_t LongestTokenBytes(const Tokenizer& tokenizer);

}  // namespace tessera
