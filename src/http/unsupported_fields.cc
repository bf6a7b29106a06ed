// Names of request fields that are documented but not served: refused or ignored, never half done. Declared
// in sampling_fields.h.
#include <algorithm>
#include <mutex>
#include <set>

#include "base/log.h"
#include "http/sampling_fields.h"

namespace tessera {
namespace {

constexpr std::string_view kRefused[] = {
    "logits_processors",      "kv_transfer_params", "documents",
    "truncate_prompt_tokens", "logprob_token_ids",  "repetition_detection",
    "structured_outputs",     "guided_json",        "guided_regex",
    "guided_choice",          "guided_grammar",     "structural_tag",
    "mm_processor_kwargs",    "media_io_kwargs",    "audio",
    "lora_request",           "ec_transfer_params"};
constexpr std::string_view kRefusedWhenTrue[] = {"use_beam_search", "return_prompt_text"};
constexpr std::string_view kIgnored[] = {"guided_decoding_backend", "guided_whitespace_pattern",
                                         "vllm_xargs"};

void WarnOnce(std::string_view name) {
  static std::mutex mutex;
  static std::set<std::string_view> warned;
  std::lock_guard lock(mutex);
  if (warned.insert(name).second) LogWarning("the request field {} is accepted and ignored", name);
}

ApiStatus RefuseTools(FieldReader& fields) {
  const JsonValue* choice = fields.Get("tool_choice");
  const JsonValue* tools = fields.Get("tools");
  fields.Get("parallel_tool_calls");
  if (tools && !tools->AsArray()) return BrokenRule("tools", "Input should be a valid list");
  if (tools && tools->AsArray()->empty()) return BrokenRule("tools", "tools must not be an empty list.");
  const std::string* name = choice ? choice->AsString() : nullptr;
  if (name && *name == "none") return {};
  if (choice && (!name || *name != "auto")) {
    if (!tools) return BrokenRule("tool_choice", "tool_choice needs tools.");
    return NotSupported("tool_choice", "a tool_choice other than \"none\"");
  }
  if (!tools) return {};
  return NotSupported(
      choice ? "tool_choice" : "tools",
      "\"auto\" tool choice (which requires --enable-auto-tool-choice and --tool-call-parser to be "
      "set)");
}

ApiStatus RefuseResponseFormat(FieldReader& fields) {
  const JsonValue* format = fields.Get("response_format");
  if (!format) return {};
  const JsonValue* type = format->Find("type");
  const std::string* name = type ? type->AsString() : nullptr;
  if (!name) return BrokenRule("response_format", "response_format must be an object with a string `type`.");
  if (*name == "text") return {};
  if (*name == "json_schema" && !format->Find("json_schema")) {
    return BrokenRule("response_format", "response_format of type json_schema needs the field json_schema.");
  }
  return NotSupported("response_format", "a response_format other than \"text\"");
}

}  // namespace

ApiStatus RefuseUnsupported(FieldReader& fields, CallKind kind) {
  for (const std::string_view name : kRefused) {
    if (fields.Has(name)) return NotSupported(std::string(name), name);
  }
  for (const std::string_view name : kRefusedWhenTrue) {
    if (fields.Bool(name, false)) return NotSupported(std::string(name), name);
  }
  for (const std::string_view name : kIgnored) {
    if (fields.Has(name)) WarnOnce(name);
  }
  for (const std::string_view known : {"user", "session_id", "length_penalty", "truncation_side"})
    fields.Get(known);
  if (const auto budget = fields.Int("thinking_token_budget"); budget.value_or(-1) != -1) {
    return NotSupported("thinking_token_budget", "a limited thinking_token_budget");
  }
  if (const auto interval = fields.Int("stream_interval"); interval.value_or(1) != 1) {
    return NotSupported("stream_interval", "a stream_interval other than 1");
  }
  if (const auto priority = fields.Int("priority"); priority.value_or(0) != 0) {
    return BadRequest("priority",
                      "a priority other than 0 needs --scheduling-policy priority, which is not "
                      "supported by Tessera.");
  }
  if (auto status = RefuseResponseFormat(fields); !status) return status;
  if (kind == CallKind::kChat) {
    if (fields.Bool("echo", false)) return NotSupported("echo", "echo of a chat message");
    if (fields.Has("chat_template")) {
      return std::unexpected(ApiError{.message =
                                          "A chat template in a request is not trusted and not supported by "
                                          "Tessera; serve uses the template of the model or of "
                                          "--chat-template."});
    }
    return RefuseTools(fields);
  }
  if (const JsonValue* suffix = fields.Get("suffix");
      suffix && (!suffix->AsString() || !suffix->AsString()->empty())) {
    return NotSupported("suffix", "suffix");
  }
  if (fields.Has("prompt_embeds")) return NotSupported("prompt_embeds", "prompt_embeds");
  return {};
}

ApiStatus CheckModel(FieldReader& fields, const ApiOptions& options) {
  const auto name = fields.String("model");
  if (!name) return {};
  if (std::find(options.model_names.begin(), options.model_names.end(), *name) != options.model_names.end())
    return {};
  // An endless name is not repeated in full.
  return std::unexpected(ApiError{
      .status = 404,
      .type = "NotFoundError",
      .message = Format("The model `{}` does not exist.", RepairUtf8(std::string_view(*name).substr(0, 512))),
      .param = "model"});
}

}  // namespace tessera
