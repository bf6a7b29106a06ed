// Bodies of the generation endpoints, /tokenize and /detokenize -> checked calls; and errors. See openai.h.
#include "http/openai.h"

#include <limits>

#include "base/log.h"
#include "http/fields.h"
#include "http/messages.h"
#include "http/sampling_fields.h"

namespace tessera {
namespace {

constexpr size_t kMaxFields = 1000;  // of a body
// Prompts of one request times n: so many sequences one request may ask for.
constexpr int64_t kMaxSequences = 16384;
constexpr size_t kMaxPrompts = 2048;

const char kEmptyPrompt[] = "The decoder prompt cannot be empty";

// One list of ids.
ApiStatus ReadIds(const JsonArray& items, int vocab_size, PromptInput& prompt) {
  if (items.empty()) return BrokenRule("prompt", kEmptyPrompt);
  prompt.ids.reserve(items.size());
  for (const JsonValue& item : items) {
    const int64_t* id = item.AsInt();
    if (!id && !item.AsBigInt()) {
      return BrokenRule("body.prompt", "1 validation error:\n  body.prompt: Input should be a valid integer");
    }
    if (!id || *id < 0 || *id >= vocab_size) {
      return BadRequest("prompt",
                        Format("Token id {} is out of vocabulary: ids are 0 to {}.",
                               id ? std::to_string(*id) : std::string("beyond 63 bits"), vocab_size - 1));
    }
    prompt.ids.push_back(static_cast<int32_t>(*id));
  }
  return {};
}

ApiStatus ReadText(const std::string& text, PromptInput& prompt) {
  if (text.empty()) return BrokenRule("prompt", kEmptyPrompt);
  prompt.text = text;
  prompt.is_text = true;
  return {};
}

ApiStatus ReadPrompts(const JsonValue& value, int vocab_size, std::vector<PromptInput>& prompts) {
  if (const std::string* text = value.AsString()) return ReadText(*text, prompts.emplace_back());
  const JsonArray& items = *value.AsArray();
  if (items.empty()) return BrokenRule("prompt", kEmptyPrompt);
  if (!items[0].AsString() && !items[0].AsArray()) return ReadIds(items, vocab_size, prompts.emplace_back());
  if (items.size() > kMaxPrompts) {
    return BadRequest("prompt",
                      Format("prompt holds {} prompts, at most {} are allowed.", items.size(), kMaxPrompts));
  }
  const bool texts = items[0].AsString() != nullptr;
  for (const JsonValue& item : items) {
    ApiStatus status;
    if (texts && item.AsString()) {
      status = ReadText(*item.AsString(), prompts.emplace_back());
    } else if (!texts && item.AsArray()) {
      status = ReadIds(*item.AsArray(), vocab_size, prompts.emplace_back());
    } else {
      status = BrokenRule("body.prompt",
                          "1 validation error:\n  body.prompt: Input should be a valid list of texts, "
                          "or of token ids, or of lists of token ids");
    }
    if (!status) return status;
  }
  return {};
}

void LogUnknown(const FieldReader& fields) {
  const auto names = fields.UnknownNames();
  if (!names.empty()) LogDebug("request fields that are not known and ignored: {}", fmt::join(names, ", "));
}

ApiStatus CheckSequences(const GenerationCall& call) {
  const int64_t sequences =
      static_cast<int64_t>(call.prompts.empty() ? 1 : call.prompts.size()) * call.num_choices;
  if (sequences <= kMaxSequences) return {};
  return BadRequest(
      "n", Format("the request asks for {} sequences, at most {} are allowed.", sequences, kMaxSequences));
}

// The order in which both endpoints look: types, the model, what is not built, ranges.
ApiResult<void> CheckCall(FieldReader& fields, CallKind kind, const CallRules& rules,
                          SamplingFields& sampling, GenerationCall& call) {
  if (auto error = fields.TypeErrors()) return std::unexpected(std::move(*error));
  if (auto status = CheckModel(fields, rules.options); !status) return std::unexpected(status.error());
  if (auto status = RefuseUnsupported(fields, kind); !status) return std::unexpected(status.error());
  if (auto error = fields.TypeErrors()) return std::unexpected(std::move(*error));
  return sampling.Check(rules, call);
}

}  // namespace

std::string ErrorBody(const ApiError& error) {
  std::string body = "{\"error\":{\"message\":";
  AppendJsonString(body, RepairUtf8(error.message));
  body += ",\"type\":";
  AppendJsonString(body, error.type);
  body += ",\"param\":";
  if (error.param.empty()) {
    body += "null";
  } else {
    AppendJsonString(body, error.param);
  }
  body += Format(",\"code\":{}}}}}", error.status);
  return body;
}

std::unexpected<ApiError> BadRequest(std::string param, std::string message) {
  return std::unexpected(ApiError{.message = std::move(message), .param = std::move(param)});
}
std::unexpected<ApiError> BrokenRule(std::string param, std::string message) {
  return std::unexpected(
      ApiError{.type = "Bad Request", .message = std::move(message), .param = std::move(param)});
}
std::unexpected<ApiError> NotSupported(std::string param, std::string_view what) {
  return BadRequest(std::move(param), Format("{} is not supported by Tessera.", what));
}

ApiError FromError(const Error& error) {
  switch (error.kind) {
    case ErrorKind::kInvalid:
      return {.message = error.message, .param = error.param};
    case ErrorKind::kNotFound:
      return {.status = 404, .type = "NotFoundError", .message = error.message, .param = error.param};
    case ErrorKind::kExhausted:
      return {.status = 429, .type = "ServiceUnavailableError", .message = error.message, .retry_after_s = 1};
    case ErrorKind::kDeadline:
    case ErrorKind::kUnavailable:
      return {.status = 503, .type = "ServiceUnavailableError", .message = error.message, .retry_after_s = 5};
    case ErrorKind::kInternal:
      break;
  }
  return {.status = 500, .type = "InternalServerError", .message = error.message};
}

ApiResult<JsonValue> ParseBody(std::string_view bytes) {
  auto value = ParseJson(bytes);
  if (!value) {
    return BrokenRule("body",
                      Format("1 validation error:\n  body: JSON decode error, {}", value.error().message));
  }
  const JsonObject* members = value->AsObject();
  if (!members) return BrokenRule("body", "1 validation error:\n  body: Input should be a valid dictionary");
  if (members->size() > kMaxFields)
    return BrokenRule("body", Format("the body has more than {} fields", kMaxFields));
  return std::move(*value);
}

ApiResult<GenerationCall> ParseCompletionCall(const JsonValue& body, const CallRules& rules) {
  GenerationCall call;
  FieldReader fields(body, "body");
  SamplingFields sampling;
  sampling.Read(fields, CallKind::kCompletion);
  fields.String("model");
  call.add_special_tokens = fields.Bool("add_special_tokens", true);
  const JsonValue* prompt = fields.Get("prompt");
  const bool embeds = fields.Has("prompt_embeds");
  if (!prompt && !embeds) fields.Missing("prompt");
  if (prompt && !prompt->AsString() && !prompt->AsArray()) {
    fields.Report("prompt", "Input should be a valid string");
    fields.Report("prompt", "Input should be a valid list");
  }
  if (auto status = CheckCall(fields, CallKind::kCompletion, rules, sampling, call); !status) {
    return std::unexpected(status.error());
  }
  if (auto status = ReadPrompts(*prompt, rules.vocab_size, call.prompts); !status) {
    return std::unexpected(status.error());
  }
  if (auto status = CheckSequences(call); !status) return std::unexpected(status.error());
  LogUnknown(fields);
  return call;
}

ApiResult<GenerationCall> ParseChatCall(const JsonValue& body, const CallRules& rules) {
  GenerationCall call;
  FieldReader fields(body, "body");
  SamplingFields sampling;
  sampling.Read(fields, CallKind::kChat);
  fields.String("model");
  call.include_reasoning = fields.Bool("include_reasoning", true);
  ChatFields chat;
  chat.Read(fields);
  if (auto status = CheckCall(fields, CallKind::kChat, rules, sampling, call); !status) {
    return std::unexpected(status.error());
  }
  auto input = chat.Build(rules.options);
  if (!input) return std::unexpected(std::move(input.error()));
  call.chat = std::move(*input);
  call.last_role = chat.last_role();
  call.add_special_tokens = chat.add_special_tokens();
  if (auto status = CheckSequences(call); !status) return std::unexpected(status.error());
  LogUnknown(fields);
  return call;
}

ApiResult<TokenizeCall> ParseTokenizeCall(const JsonValue& body, const CallRules& rules) {
  TokenizeCall call;
  FieldReader fields(body, "body");
  fields.String("model");
  call.return_token_strs = fields.Bool("return_token_strs", false);
  call.is_chat = fields.Has("messages");
  ChatFields chat;
  if (call.is_chat) {
    chat.Read(fields);
  } else {
    const auto prompt = fields.String("prompt");
    if (!fields.Has("prompt")) fields.Missing("prompt");
    call.prompt = prompt.value_or("");
    call.add_special_tokens = fields.Bool("add_special_tokens", true);
  }
  if (auto error = fields.TypeErrors()) return std::unexpected(std::move(*error));
  if (auto status = CheckModel(fields, rules.options); !status) return std::unexpected(status.error());
  if (!call.is_chat) return call;
  if (fields.Has("chat_template")) return NotSupported("chat_template", "a chat template in a request");
  auto input = chat.Build(rules.options);
  if (!input) return std::unexpected(std::move(input.error()));
  call.chat = std::move(*input);
  call.add_special_tokens = chat.add_special_tokens();
  return call;
}

ApiResult<std::vector<int32_t>> ParseDetokenizeCall(const JsonValue& body, const CallRules& rules) {
  FieldReader fields(body, "body");
  fields.String("model");
  if (!fields.Has("tokens")) fields.Missing("tokens");
  const std::vector<int64_t> wide = fields.Ints("tokens");
  if (auto error = fields.TypeErrors()) return std::unexpected(std::move(*error));
  if (auto status = CheckModel(fields, rules.options); !status) return std::unexpected(status.error());
  std::vector<int32_t> ids;
  ids.reserve(wide.size());
  for (const int64_t id : wide) {
    if (id < 0)
      return BrokenRule("body.tokens", Format("1 validation error:\n  body.tokens: Input should be greater "
                                              "than or equal to 0, got {}",
                                              id));
    ids.push_back(id > std::numeric_limits<int32_t>::max() ? -1 : static_cast<int32_t>(id));
  }
  return ids;
}

}  // namespace tessera
