// Messages are rewritten event by event, never held as a tree: linear in time, no recursion, numbers keep
// their text, and of two equal keys the template sees the last, as everywhere else.
#include "text/json_text.h"

#include <nlohmann/json.hpp>

#include <array>
#include <utility>
#include <vector>

namespace tessera {
namespace {

using Json = nlohmann::json;

// Bounds what the template library's recursion sees.
constexpr size_t kMaxDepth = 100;

void AppendJsonString(std::string_view text, std::string* out) {
  *out += '"';
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      *out += '\\';
      *out += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      *out += Format("\\u{:04x}", static_cast<int>(c));
    } else {
      *out += c;
    }
  }
  *out += '"';
}

// Copies JSON events to text. A subclass looks at keys and strings as they pass.
class JsonCopier : public Json::json_sax_t {
 public:
  bool null() override { return Scalar("null", 'n'); }
  bool boolean(bool value) override { return Scalar(value ? "true" : "false"); }
  bool number_integer(number_integer_t value) override { return Scalar(Format("{}", value)); }
  bool number_unsigned(number_unsigned_t value) override { return Scalar(Format("{}", value)); }
  bool number_float(number_float_t, const string_t& text) override { return Scalar(text); }
  bool binary(binary_t&) override { return false; }
  bool string(string_t& text) override {
    BeginValue();
    OnString(text);
    AppendJsonString(text, &out_);
    return true;
  }
  bool key(string_t& text) override {
    Separate();
    key_ = text;
    if (!OnKey(text)) return false;
    AppendJsonString(text, &out_);
    out_ += ':';
    after_key_ = true;
    return true;
  }
  bool start_object(size_t) override { return Open('{'); }
  bool start_array(size_t) override { return Open('['); }
  bool end_object() override { return Close('}'); }
  bool end_array() override { return Close(']'); }
  bool parse_error(size_t position, const std::string&, const Json::exception&) override {
    if (error_.empty()) error_ = Format("broken JSON at byte {}", position);
    return false;
  }

  // kInvalid with `name` in front where `json` is broken or a check failed.
  Status Run(std::string_view name, std::string_view json) {
    if (Json::sax_parse(json, this) && error_.empty()) return {};
    return Invalid("{}: {}", name, error_.empty() ? "not usable" : error_);
  }
  std::string Take() { return std::move(out_); }

 protected:
  virtual void OnString(std::string&) {}
  virtual bool OnKey(std::string&) { return true; }
  // Anything but a string, before it is written: '{', '[', 'n' for null, 'v' for other scalars.
  virtual bool OnValue(char kind) { return true; }

  bool Refuse(std::string reason) {
    error_ = std::move(reason);
    return false;
  }
  size_t depth() const { return has_items_.size(); }
  const std::string& last_key() const { return key_; }
  size_t num_top_items() const { return num_top_items_; }

 private:
  bool Scalar(std::string_view text, char kind = 'v') {
    if (!OnValue(kind)) return false;
    BeginValue();
    out_ += text;
    return true;
  }
  bool Open(char bracket) {
    if (depth() == kMaxDepth) return Refuse(Format("nested deeper than {} levels", kMaxDepth));
    if (!OnValue(bracket)) return false;
    BeginValue();
    out_ += bracket;
    has_items_.push_back(false);
    return true;
  }
  bool Close(char bracket) {
    has_items_.pop_back();
    out_ += bracket;
    return true;
  }
  void BeginValue() {
    if (!std::exchange(after_key_, false)) Separate();
  }
  void Separate() {
    if (has_items_.empty()) return;
    if (has_items_.back()) out_ += ',';
    has_items_.back() = true;
    if (depth() == 1) ++num_top_items_;
  }

  std::string out_;
  std::string key_;
  std::string error_;
  std::vector<bool> has_items_;  // per open bracket
  bool after_key_ = false;
  size_t num_top_items_ = 0;
};

// First look at messages: their shape, who speaks, and whether the last one has text.
class MessageSurvey : public JsonCopier {
 public:
  std::vector<bool> from_assistant;
  bool final_is_text = false;

 protected:
  bool OnValue(char kind) override {
    if (depth() == 0 && kind != '[') return Refuse("must be a list");
    if (depth() == 1) {
      if (kind != '{') return Refuse("each must be an object");
      from_assistant.push_back(false);
      final_is_text = false;
    }
    if (depth() == 2 && last_key() == "content") final_is_text = false;
    if (depth() == 2 && last_key() == "role") from_assistant.back() = false;
    return true;
  }
  void OnString(std::string& text) override {
    if (depth() < 2) {
      Refuse(depth() == 0 ? "must be a list" : "each must be an object");
    } else if (depth() == 2 && last_key() == "role") {
      from_assistant.back() = text == "assistant";
    } else if (depth() == 2 && last_key() == "content") {
      final_is_text = true;
    }
  }
};

// Second look: every string and key marked.
class MessageMarker : public JsonCopier {
 public:
  MessageMarker(const Marking& marking, const std::vector<bool>& from_assistant)
      : marking_(marking), from_assistant_(from_assistant) {}
  std::string final_content;

 protected:
  void OnString(std::string& text) override {
    text = scanner().Marked(text, marking_.mark);
    if (!marking_.tail.empty() && depth() == 2 && last_key() == "content" &&
        num_top_items() == from_assistant_.size()) {
      final_content = text;
      text += marking_.tail;
    }
  }
  bool OnKey(std::string& text) override {
    text = scanner().Marked(text, marking_.mark);
    return true;
  }

 private:
  const ControlScanner& scanner() const {
    return from_assistant_[num_top_items() - 1] ? marking_.every_but_thinking : marking_.every_token;
  }

  const Marking& marking_;
  const std::vector<bool>& from_assistant_;
};

class ToolMarker : public JsonCopier {
 public:
  explicit ToolMarker(const Marking& marking) : marking_(marking) {}

 protected:
  bool OnValue(char kind) override {
    return depth() > 0 || kind == '[' || kind == 'n' || Refuse("must be a list or null");
  }
  void OnString(std::string& text) override {
    if (depth() == 0) Refuse("must be a list or null");
    text = marking_.every_token.Marked(text, marking_.mark);
  }
  bool OnKey(std::string& text) override {
    text = marking_.every_token.Marked(text, marking_.mark);
    return true;
  }

 private:
  const Marking& marking_;
};

class KwargsCopier : public JsonCopier {
 protected:
  bool OnValue(char kind) override { return depth() > 0 || kind == '{' || Refuse("must be an object"); }
  void OnString(std::string&) override {
    if (depth() == 0) Refuse("must be an object");
  }
  bool OnKey(std::string& name) override {
    constexpr std::array<std::string_view, 3> kReserved = {"messages", "tools", "add_generation_prompt"};
    for (const std::string_view reserved : kReserved) {
      if (depth() == 1 && name == reserved) return Refuse(Format("'{}' is set by the request itself", name));
    }
    return true;
  }
};

Result<std::string> TokenText(const Json& config, const char* name) {
  const auto found = config.find(name);
  if (found == config.end() || found->is_null()) return std::string();
  if (found->is_string()) return found->get<std::string>();
  if (found->is_object() && found->contains("content") && (*found)["content"].is_string()) {
    return (*found)["content"].get<std::string>();
  }
  return Invalid("tokenizer_config.json: {} is neither a string nor an object with content", name);
}

// A text, or a list of named ones of which "default" is meant.
Result<std::string> TemplateText(const Json& config) {
  const auto found = config.find("chat_template");
  if (found == config.end() || found->is_null()) return std::string();
  if (found->is_string()) return found->get<std::string>();
  if (found->is_array()) {
    for (const Json& entry : *found) {
      if (!entry.is_object() || entry.value("name", Json()) != "default") continue;
      if (const Json text = entry.value("template", Json()); text.is_string()) return text.get<std::string>();
    }
  }
  return Invalid(
      "tokenizer_config.json: chat_template is neither a string nor a list with an entry 'default'");
}

}  // namespace

Result<TokenizerConfig> ParseTokenizerConfig(std::string_view json) {
  const Json config = Json::parse(json, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return Invalid("tokenizer_config.json: not a JSON object");
  TokenizerConfig result;
  if (const auto add = config.find("add_bos_token"); add != config.end() && !add->is_null()) {
    if (!add->is_boolean()) return Invalid("tokenizer_config.json: add_bos_token is not a boolean");
    result.add_bos = add->get<bool>();
  }
  ASSIGN_OR_RETURN(result.bos_token, TokenText(config, "bos_token"));
  ASSIGN_OR_RETURN(result.eos_token, TokenText(config, "eos_token"));
  ASSIGN_OR_RETURN(result.chat_template, TemplateText(config));
  return result;
}

Result<TemplateVariables> WriteTemplateVariables(const ChatInput& input, std::string_view bos_token,
                                                 std::string_view eos_token, const Marking& marking) {
  MessageSurvey survey;
  RETURN_IF_ERROR(survey.Run("messages", input.messages));
  if (!marking.tail.empty() && !survey.final_is_text) {
    return Invalid("continue_final_message: the last message has no text content to continue");
  }
  MessageMarker messages(marking, survey.from_assistant);
  RETURN_IF_ERROR(messages.Run("messages", input.messages));
  ToolMarker tools(marking);
  RETURN_IF_ERROR(tools.Run("tools", input.tools));
  KwargsCopier kwargs;
  RETURN_IF_ERROR(kwargs.Run("chat_template_kwargs", input.kwargs));

  // Later keys win: kwargs may replace what stands before them.
  std::string json = R"({"bos_token":)";
  AppendJsonString(bos_token, &json);
  json += R"(,"eos_token":)";
  AppendJsonString(eos_token, &json);
  json += R"(,"documents":null,)";
  const std::string further = kwargs.Take();
  if (further != "{}") json += further.substr(1, further.size() - 2) + ",";
  json += Format(R"("add_generation_prompt":{},"tools":)", input.add_generation_prompt);
  json += tools.Take();
  json += R"(,"messages":)";
  json += messages.Take();
  json += '}';
  return TemplateVariables{std::move(json), std::move(messages.final_content)};
}

}  // namespace tessera
