// See messages.h.
#include "http/messages.h"

#include <algorithm>

namespace tessera {
namespace {

constexpr size_t kMaxMessages = 10000;

// Appends `content` as the template sees it: a string or null. Text parts are joined by line feeds.
ApiStatus AppendContent(std::string& out, const JsonValue& content, size_t index) {
  const std::string where = Format("messages.{}.content", index);
  const JsonArray* parts = content.AsArray();
  if (!parts) {
    if (!content.is_null() && !content.AsString()) {
      return BrokenRule("body." + where,
                        Format("1 validation error:\n  body.{}: Input should be a valid string or a "
                               "valid list",
                               where));
    }
    AppendJson(out, content);
    return {};
  }
  std::string text;
  for (size_t i = 0; i < parts->size(); ++i) {
    const JsonValue& part = (*parts)[i];
    const std::string* piece = part.AsString();
    if (!piece) {
      const JsonValue* type = part.Find("type");
      const std::string* name = type ? type->AsString() : nullptr;
      if (!name) {
        return BrokenRule("body." + where,
                          Format("1 validation error:\n  body.{}.{}: a content part must be an object "
                                 "with a string `type`",
                                 where, i));
      }
      if (*name == "refusal") {
        piece = part.Find("refusal") ? part.Find("refusal")->AsString() : nullptr;
      } else if (*name == "text" || *name == "input_text" || *name == "output_text") {
        piece = part.Find("text") ? part.Find("text")->AsString() : nullptr;
      } else {
        return NotSupported("messages", "a content part that is not text");
      }
      if (!piece) {
        return BrokenRule("body." + where,
                          Format("1 validation error:\n  body.{}.{}.text: Input should be a valid "
                                 "string",
                                 where, i));
      }
    }
    if (i > 0) text += '\n';
    text += *piece;
  }
  AppendJsonString(out, text);
  return {};
}

ApiStatus AppendMessage(std::string& out, const JsonObject& message, size_t index) {
  out += '{';
  bool first = true;
  for (const JsonMember& member : message) {
    if (!std::exchange(first, false)) out += ',';
    AppendJsonString(out, member.key);
    out += ':';
    if (member.key == "content") {
      if (auto status = AppendContent(out, member.value, index); !status) return status;
    } else {
      AppendJson(out, member.value);
    }
  }
  // Templates know one of the two names of a thought.
  const auto find = [&](std::string_view key) {
    return std::find_if(message.begin(), message.end(),
                        [&](const JsonMember& member) { return member.key == key; });
  };
  const auto reasoning = find("reasoning"), older = find("reasoning_content");
  if (reasoning != message.end() && older == message.end()) {
    out += ",\"reasoning_content\":";
    AppendJson(out, reasoning->value);
  } else if (older != message.end() && reasoning == message.end()) {
    out += ",\"reasoning\":";
    AppendJson(out, older->value);
  }
  out += '}';
  return {};
}

bool Has(const JsonObject* members, std::string_view key) {
  return members && std::any_of(members->begin(), members->end(),
                                [&](const JsonMember& member) { return member.key == key; });
}

// Appends those of `members` whose names are in neither of the others.
void AppendMembers(std::string& out, const JsonObject& members, const JsonObject* first_override,
                   const JsonObject* second_override = nullptr) {
  for (const JsonMember& member : members) {
    if (Has(first_override, member.key) || Has(second_override, member.key)) continue;
    if (out.size() > 1) out += ',';
    AppendJsonString(out, member.key);
    out += ':';
    AppendJson(out, member.value);
  }
}

}  // namespace

void ChatFields::Read(FieldReader& fields) {
  const JsonValue* messages = fields.Get("messages");
  if (!messages) {
    fields.Missing("messages");
  } else if (!(messages_ = messages->AsArray())) {
    fields.Report("messages", "Input should be a valid list");
  }
  for (size_t i = 0; messages_ && i < messages_->size(); ++i) {
    const JsonValue& message = (*messages_)[i];
    const JsonValue* role = message.Find("role");
    if (!message.AsObject()) {
      fields.Report(Format("messages.{}", i), "Input should be a valid dictionary");
    } else if (!role) {
      fields.Report(Format("messages.{}.role", i), "Field required");
    } else if (!role->AsString()) {
      fields.Report(Format("messages.{}.role", i), "Input should be a valid string");
    } else {
      last_role_ = *role->AsString();
    }
  }
  tools_ = fields.Get("tools");
  if (tools_ && !tools_->AsArray()) fields.Report("tools", "Input should be a valid list");
  kwargs_ = fields.Object("chat_template_kwargs");
  reasoning_effort_ = fields.String("reasoning_effort").value_or("");
  add_generation_prompt_ = fields.Bool("add_generation_prompt", true);
  continue_final_message_ = fields.Bool("continue_final_message", false);
  add_special_tokens_ = fields.Bool("add_special_tokens", false);
}

ApiResult<ChatInput> ChatFields::Build(const ApiOptions& options) const {
  if (add_generation_prompt_ && continue_final_message_) {
    return BrokenRule("continue_final_message",
                      "continue_final_message and add_generation_prompt must not both be true.");
  }
  if (messages_->empty()) return BrokenRule("messages", "messages must hold at least one message.");
  if (messages_->size() > kMaxMessages) {
    return BadRequest("messages", Format("messages holds {} messages, at most {} are allowed.",
                                         messages_->size(), kMaxMessages));
  }
  static constexpr std::string_view kEfforts[] = {"",       "none", "minimal", "low",
                                                  "medium", "high", "xhigh",   "max"};
  if (std::find(std::begin(kEfforts), std::end(kEfforts), reasoning_effort_) == std::end(kEfforts)) {
    return BrokenRule("reasoning_effort",
                      "reasoning_effort must be none, minimal, low, medium, high, xhigh or max.");
  }
  ChatInput input;
  input.add_generation_prompt = add_generation_prompt_;
  input.continue_final_message = continue_final_message_;
  input.messages = "[";
  for (size_t i = 0; i < messages_->size(); ++i) {
    if (i > 0) input.messages += ',';
    if (auto status = AppendMessage(input.messages, *(*messages_)[i].AsObject(), i); !status) {
      return std::unexpected(std::move(status.error()));
    }
  }
  input.messages += ']';
  if (tools_) {
    input.tools.clear();
    AppendJson(input.tools, *tools_);
  }
  JsonObject effort;
  if (!reasoning_effort_.empty()) {
    effort.push_back({"reasoning_effort", JsonValue(reasoning_effort_)});
    effort.push_back({"enable_thinking", JsonValue(reasoning_effort_ != "none")});
  }
  const auto standard = ParseJson(options.default_chat_template_kwargs);
  input.kwargs = "{";
  if (standard && standard->AsObject()) AppendMembers(input.kwargs, *standard->AsObject(), &effort, kwargs_);
  AppendMembers(input.kwargs, effort, kwargs_);
  if (kwargs_) AppendMembers(input.kwargs, *kwargs_, nullptr);
  input.kwargs += '}';
  return input;
}

}  // namespace tessera
