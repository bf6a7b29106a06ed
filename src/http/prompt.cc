// See prompt.h.
#include "http/prompt.h"

#include <algorithm>

namespace tessera {
namespace {

ApiError TooLong(int64_t length, const char* unit, int max_model_len) {
  return {.message = Format(
              "This model's maximum context length is {} tokens, but the prompt has {} {}; at least one "
              "token must be left for the answer.",
              max_model_len, length, unit),
          .param = "input_tokens"};
}

ApiResult<TokenIds> EncodeText(const std::string& text, bool add_special_tokens, const PromptRules& rules) {
  const int max_model_len = rules.options.max_model_len;
  if (text.size() > static_cast<size_t>(max_model_len) * rules.max_token_bytes) {
    return std::unexpected(TooLong(static_cast<int64_t>(text.size()), "bytes", max_model_len));
  }
  auto ids = rules.tokenizer.EncodePrompt(text, add_special_tokens);
  if (!ids) return std::unexpected(FromError(ids.error()));
  if (ids->empty()) return BrokenRule("prompt", "The decoder prompt cannot be empty");
  return std::move(*ids);
}

// How many tokens may be generated after a prompt of `length` tokens.
ApiResult<int32_t> ResolveMaxTokens(const GenerationCall& call, int64_t length, const PromptRules& rules) {
  const int64_t max_model_len = rules.options.max_model_len;
  if (length >= max_model_len) return std::unexpected(TooLong(length, "tokens", rules.options.max_model_len));
  const int64_t room = max_model_len - length;
  if (!call.max_tokens) {
    const int cap = rules.options.sampling.max_new_tokens;
    const int64_t max_tokens = cap > 0 ? std::min<int64_t>(room, cap) : room;
    if (call.sampling.min_tokens > max_tokens) {
      return BadRequest("min_tokens",
                        Format("min_tokens must be less than or equal to max_tokens={}, got {}.", max_tokens,
                               call.sampling.min_tokens));
    }
    return static_cast<int32_t>(max_tokens);
  }
  if (*call.max_tokens > room) {
    return BadRequest(
        "max_tokens",
        Format("'max_tokens' or 'max_completion_tokens' is too large: {}. This model's maximum context "
               "length is {} tokens and your request has {} input tokens ({} > {} - {}).",
               *call.max_tokens, max_model_len, length, *call.max_tokens, max_model_len, length));
  }
  return *call.max_tokens;
}

// Each word as it may appear: at the start of a text and after a space.
ApiStatus ExpandBadWords(const std::vector<std::string>& words, const Tokenizer& tokenizer,
                         SamplingParams& sampling) {
  for (const std::string& word : words) {
    const size_t begin = word.find_first_not_of(' ');
    const std::string bare = begin == std::string::npos ? word : word.substr(begin);
    for (const std::string& form : {bare, " " + bare}) {
      auto ids = tokenizer.Encode(form, ControlTokens::kParse);
      if (!ids) return std::unexpected(FromError(ids.error()));
      if (!ids->empty() &&
          std::find(sampling.bad_words.begin(), sampling.bad_words.end(), *ids) == sampling.bad_words.end()) {
        sampling.bad_words.push_back(std::move(*ids));
      }
    }
  }
  return {};
}

ApiResult<std::vector<TokenIds>> PromptIds(GenerationCall& call, const PromptRules& rules) {
  std::vector<TokenIds> all;
  if (call.kind == CallKind::kChat) {
    auto ids = RenderChat(call.chat, call.add_special_tokens, rules);
    if (!ids) return std::unexpected(std::move(ids.error()));
    all.push_back(std::move(*ids));
    call.chat = ChatInput();
    return all;
  }
  all.reserve(call.prompts.size());
  for (PromptInput& prompt : call.prompts) {
    if (!prompt.is_text) {
      all.push_back(std::move(prompt.ids));
      continue;
    }
    auto ids = EncodeText(prompt.text, call.add_special_tokens, rules);
    if (!ids) return std::unexpected(std::move(ids.error()));
    all.push_back(std::move(*ids));
  }
  std::vector<PromptInput>().swap(call.prompts);
  return all;
}

}  // namespace

ApiResult<TokenIds> RenderChat(const ChatInput& chat, bool add_special_tokens, const PromptRules& rules) {
  if (!rules.chat_template) {
    return std::unexpected(
        ApiError{.message = "This model has no chat template; give one with --chat-template."});
  }
  auto rendered = rules.chat_template->Render(chat);
  if (!rendered) {
    ApiError error = FromError(rendered.error());
    error.param.clear();
    return std::unexpected(std::move(error));
  }
  const auto bos = rules.tokenizer.bos_id();
  if (add_special_tokens && bos && rules.tokenizer.add_bos() &&
      (rendered->ids.empty() || rendered->ids[0] != *bos)) {
    rendered->ids.insert(rendered->ids.begin(), *bos);
  }
  if (rendered->ids.empty()) return BrokenRule("messages", "The decoder prompt cannot be empty");
  return std::move(rendered->ids);
}

ApiResult<std::vector<PreparedPrompt>> PreparePrompts(GenerationCall& call, uint64_t seed,
                                                      const PromptRules& rules) {
  auto all = PromptIds(call, rules);
  if (!all) return std::unexpected(std::move(all.error()));
  call.sampling.seed = seed;
  if (auto status = ExpandBadWords(call.bad_words, rules.tokenizer, call.sampling); !status) {
    return std::unexpected(std::move(status.error()));
  }
  std::vector<PreparedPrompt> prepared(all->size());
  for (size_t i = 0; i < prepared.size(); ++i) {
    TokenIds& ids = (*all)[i];
    const auto max_tokens = ResolveMaxTokens(call, static_cast<int64_t>(ids.size()), rules);
    if (!max_tokens) return std::unexpected(max_tokens.error());
    if (call.echo) prepared[i].echo_text = rules.tokenizer.Decode(ids, call.skip_special_tokens);
    auto request = std::make_shared<Request>();
    request->prompt = std::move(ids);
    request->num_choices = call.num_choices;
    request->sampling = call.sampling;
    request->sampling.max_tokens = *max_tokens;
    request->cache_salt = call.cache_salt;
    prepared[i].request = std::move(request);
  }
  return prepared;
}

size_t LongestTokenBytes(const Tokenizer& tokenizer) {
  size_t longest = 1;
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    longest = std::max(longest, tokenizer.TokenBytes(id).size());
  }
  return longest;
}

}  // namespace tessera
