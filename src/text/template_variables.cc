// Parsed with the limits of base/json.h (depth 64, no equal keys), so the recursion here is shallow.
#include "text/template_variables.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/json.h"

namespace tessera {
namespace {

// Appends `value` with every string and key marked.
void AppendMarked(const JsonValue& value, const ControlScanner& scanner, std::string_view mark,
                  std::string* json) {
  std::string_view separator = "";
  if (value.is_text()) {
    AppendJsonString(*json, scanner.Marked(value.text(), mark));
  } else if (value.is_array()) {
    *json += '[';
    for (const JsonValue& item : value.items()) {
      *json += std::exchange(separator, ",");
      AppendMarked(item, scanner, mark, json);
    }
    *json += ']';
  } else if (value.is_object()) {
    *json += '{';
    for (const JsonMember& member : value.members()) {
      *json += std::exchange(separator, ",");
      AppendJsonString(*json, scanner.Marked(member.key, mark));
      *json += ':';
      AppendMarked(member.value, scanner, mark, json);
    }
    *json += '}';
  } else {
    AppendJson(*json, value);
  }
}

bool FromAssistant(const JsonValue& message) {
  const JsonValue* role = message.Find("role");
  return role != nullptr && role->text() == "assistant";
}

JsonMember* TextContent(JsonObject& message) {
  const auto found = std::ranges::find_if(
      message, [](const JsonMember& member) { return member.key == "content" && member.value.is_text(); });
  return found == message.end() ? nullptr : &*found;
}

// `messages` is a list of objects; the last one's content gets the tail.
Status AppendMessages(JsonValue messages, const Marking& marking, TemplateVariables* variables) {
  if (!messages.is_array()) return Invalid("messages: {}, expected a list", messages.Describe());
  for (const JsonValue& message : messages.items()) {
    if (!message.is_object()) return Invalid("messages: {}, expected an object", message.Describe());
  }
  JsonArray& list = *messages.AsArray();
  if (!marking.tail.empty()) {
    JsonMember* content = list.empty() ? nullptr : TextContent(*list.back().AsObject());
    if (content == nullptr) {
      return Invalid("continue_final_message: the last message has no text content to continue");
    }
    const ControlScanner& scanner =
        FromAssistant(list.back()) ? marking.every_but_thinking : marking.every_token;
    variables->final_content = scanner.Marked(content->value.text(), marking.mark);
    content->value = JsonValue(content->value.text() + marking.tail);
  }
  std::string_view separator = "";
  variables->json += '[';
  for (const JsonValue& message : list) {
    const ControlScanner& scanner = FromAssistant(message) ? marking.every_but_thinking : marking.every_token;
    variables->json += std::exchange(separator, ",");
    AppendMarked(message, scanner, marking.mark, &variables->json);
  }
  variables->json += ']';
  return {};
}

// Later keys of an object win with the template's parser, so kwargs may replace what was written before them.
Status AppendKwargs(const JsonValue& kwargs, std::string* json) {
  if (!kwargs.is_object()) return Invalid("chat_template_kwargs: {}, expected an object", kwargs.Describe());
  constexpr std::array<std::string_view, 3> kReserved = {"messages", "tools", "add_generation_prompt"};
  for (const JsonMember& member : kwargs.members()) {
    if (std::ranges::find(kReserved, member.key) != kReserved.end()) {
      return Invalid("chat_template_kwargs: '{}' is set by the request itself", member.key);
    }
    AppendJsonString(*json, member.key);
    *json += ':';
    AppendJson(*json, member.value);
    *json += ',';
  }
  return {};
}

}  // namespace

Result<TemplateVariables> WriteTemplateVariables(const ChatInput& input, std::string_view bos_token,
                                                 std::string_view eos_token, const Marking& marking) {
  ASSIGN_OR_RETURN(JsonValue messages, ParseJson(input.messages, "messages"));
  ASSIGN_OR_RETURN(const JsonValue tools, ParseJson(input.tools, "tools"));
  ASSIGN_OR_RETURN(const JsonValue kwargs, ParseJson(input.kwargs, "chat_template_kwargs"));
  if (!tools.is_array() && !tools.is_null()) {
    return Invalid("tools: {}, expected a list or null", tools.Describe());
  }
  TemplateVariables variables;
  std::string& json = variables.json;
  json += R"({"bos_token":)";
  AppendJsonString(json, bos_token);
  json += R"(,"eos_token":)";
  AppendJsonString(json, eos_token);
  json += R"(,"documents":null,)";
  RETURN_IF_ERROR(AppendKwargs(kwargs, &json));
  json += Format(R"("add_generation_prompt":{},"tools":)", input.add_generation_prompt);
  AppendMarked(tools, marking.every_token, marking.mark, &json);
  json += R"(,"messages":)";
  RETURN_IF_ERROR(AppendMessages(std::move(messages), marking, &variables));
  json += '}';
  return variables;
}

}  // namespace tessera
