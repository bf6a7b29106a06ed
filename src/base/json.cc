// The bridge onto nlohmann::json's event parser, and the writers. See json.h.
#include "base/json.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "base/file.h"

namespace tessera {
namespace {

using Nlohmann = nlohmann::json;

// Builds the tree from parser events; every rule beyond the grammar is here.
class TreeBuilder : public nlohmann::json_sax<Nlohmann> {
 public:
  explicit TreeBuilder(const JsonLimits& limits) : limits_(limits) {}

  bool null() override { return Add(JsonValue()); }
  bool boolean(bool value) override { return Add(JsonValue(value)); }
  bool number_integer(number_integer_t value) override { return Add(JsonValue(int64_t{value})); }
  bool number_unsigned(number_unsigned_t value) override {
    if (value <= static_cast<uint64_t>(INT64_MAX)) return Add(JsonValue(static_cast<int64_t>(value)));
    return Add(JsonValue(uint64_t{value}));
  }
  bool number_float(number_float_t value, const string_t& text) override {
    if (text.find_first_of(".eE") == std::string::npos) return Reject("an integer does not fit in 64 bits");
    return Add(JsonValue(double{value}));
  }
  bool string(string_t& value) override { return Add(JsonValue(std::move(value))); }
  bool binary(binary_t&) override { return Reject("binary values are not JSON"); }
  bool start_object(size_t) override { return Open(JsonValue(JsonObject())); }
  bool start_array(size_t) override { return Open(JsonValue(JsonArray())); }
  bool key(string_t& name) override {
    open_.back().AsObject()->push_back({std::move(name), JsonValue()});
    return true;
  }
  bool end_object() override {
    const JsonObject& members = *open_.back().AsObject();
    std::vector<std::string_view> keys;
    keys.reserve(members.size());
    for (const JsonMember& member : members) keys.push_back(member.key);
    std::sort(keys.begin(), keys.end());
    if (std::adjacent_find(keys.begin(), keys.end()) != keys.end())
      return Reject("an object has a duplicate key");
    return Close();
  }
  bool end_array() override { return Close(); }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    const bool overflow = std::string_view(error.what()).find("number overflow") != std::string_view::npos;
    return Reject(overflow ? std::string("a number is too large")
                           : Format("invalid JSON at byte {}", position));
  }

  const std::string& reason() const { return reason_; }
  JsonValue TakeRoot() { return std::move(root_); }

 private:
  bool Reject(std::string reason) {
    reason_ = std::move(reason);
    return false;
  }
  bool Count() {
    if (++num_values_ > limits_.max_values) return Reject(Format("more than {} values", limits_.max_values));
    return true;
  }
  bool Add(JsonValue value) {
    if (!Count()) return false;
    Attach(std::move(value));
    return true;
  }
  bool Open(JsonValue value) {
    if (!Count()) return false;
    if (open_.size() >= limits_.max_depth) {
      return Reject(Format("nested deeper than {} levels", limits_.max_depth));
    }
    open_.push_back(std::move(value));
    return true;
  }
  bool Close() {
    JsonValue done = std::move(open_.back());
    open_.pop_back();
    Attach(std::move(done));
    return true;
  }
  void Attach(JsonValue value) {
    if (open_.empty()) {
      root_ = std::move(value);
    } else if (JsonArray* array = open_.back().AsArray()) {
      array->push_back(std::move(value));
    } else {
      open_.back().AsObject()->back().value = std::move(value);
    }
  }

  const JsonLimits limits_;
  std::vector<JsonValue> open_;
  JsonValue root_;
  size_t num_values_ = 0;
  std::string reason_;
};

template <typename T>
void AppendShortest(std::string& out, T value) {
  std::array<char, 64> buffer;
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr;
  const std::string_view text(buffer.data(), static_cast<size_t>(end - buffer.data()));
  out += text;
  if (text.find_first_of(".e") == std::string_view::npos) out += ".0";
}

// Bytes of the valid UTF-8 sequence at the front, 0 when it is broken.
size_t SequenceLength(std::string_view bytes) {
  const auto at = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = at(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || bytes.size() < length) return 0;
  for (size_t i = 1; i < length; ++i) {
    if ((at(i) & 0xC0) != 0x80) return 0;
  }
  const uint8_t next = at(1);
  if ((lead == 0xE0 && next < 0xA0) || (lead == 0xED && next > 0x9F) || (lead == 0xF0 && next < 0x90) ||
      (lead == 0xF4 && next > 0x8F)) {
    return 0;
  }
  return length;
}

}  // namespace

// Here, because in the header JsonMember is not complete yet.
JsonValue::JsonValue() = default;
JsonValue::JsonValue(bool value) : value_(value) {}
JsonValue::JsonValue(int64_t value) : value_(value) {}
JsonValue::JsonValue(uint64_t value) : value_(value) {}
JsonValue::JsonValue(double value) : value_(value) {}
JsonValue::JsonValue(std::string value) : value_(std::make_unique<std::string>(std::move(value))) {}
JsonValue::JsonValue(JsonArray value) : value_(std::make_unique<JsonArray>(std::move(value))) {}
JsonValue::JsonValue(JsonObject value) : value_(std::make_unique<JsonObject>(std::move(value))) {}
JsonValue::JsonValue(JsonValue&&) noexcept = default;
JsonValue& JsonValue::operator=(JsonValue&&) noexcept = default;
JsonValue::~JsonValue() = default;

const std::string* JsonValue::AsString() const {
  const auto* held = std::get_if<std::unique_ptr<std::string>>(&value_);
  return held ? held->get() : nullptr;
}
const JsonArray* JsonValue::AsArray() const {
  const auto* held = std::get_if<std::unique_ptr<JsonArray>>(&value_);
  return held ? held->get() : nullptr;
}
const JsonObject* JsonValue::AsObject() const {
  const auto* held = std::get_if<std::unique_ptr<JsonObject>>(&value_);
  return held ? held->get() : nullptr;
}
JsonArray* JsonValue::AsArray() {
  return const_cast<JsonArray*>(std::as_const(*this).AsArray());
}
JsonObject* JsonValue::AsObject() {
  return const_cast<JsonObject*>(std::as_const(*this).AsObject());
}

const std::string& JsonValue::text() const {
  static const std::string kNone;
  return is_text() ? *AsString() : kNone;
}
const JsonArray& JsonValue::items() const {
  static const JsonArray kNone;
  return is_array() ? *AsArray() : kNone;
}
const JsonObject& JsonValue::members() const {
  static const JsonObject kNone;
  return is_object() ? *AsObject() : kNone;
}

std::string JsonValue::Describe() const {
  if (is_text()) return Format("\"{}\"", Printable(text()));
  if (is_array()) return Format("an array of {}", items().size());
  if (is_object()) return Format("an object of {}", members().size());
  std::string out;
  AppendJson(out, *this);
  return out;
}

Result<JsonValue> ParseJson(std::string_view text, std::string_view what, const JsonLimits& limits) {
  Result<JsonValue> value = ParseJson(text, limits);
  if (!value) return Invalid("{} is not valid JSON: {}", what, value.error().message);
  return value;
}

Result<JsonValue> ReadJsonFile(const std::string& path, const JsonLimits& limits) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ParseJson(text, path, limits);
}

std::string Printable(std::string_view text) {
  constexpr size_t kMaxBytes = 120;
  size_t length = text.size();
  if (length > kMaxBytes) {
    length = kMaxBytes;
    while (length > 0 && (static_cast<uint8_t>(text[length]) & 0xC0) == 0x80) --length;  // whole characters
  }
  std::string out(text.substr(0, length));
  for (char& c : out) {
    if (static_cast<uint8_t>(c) < 0x20 || c == 0x7F) c = '?';
  }
  if (length < text.size()) out += "...";
  return out;
}

const JsonValue* JsonValue::Find(std::string_view key) const {
  const JsonObject* members = AsObject();
  if (!members) return nullptr;
  for (const JsonMember& member : *members) {
    if (member.key == key) return &member.value;
  }
  return nullptr;
}

Result<JsonValue> ParseJson(std::string_view text, const JsonLimits& limits) {
  // nlohmann would skip a BOM and take a NUL for the end.
  if (text.starts_with("\xEF\xBB\xBF")) return Invalid("the text begins with a byte order mark");
  if (text.find('\0') != std::string_view::npos) return Invalid("the text holds a NUL byte");
  TreeBuilder builder(limits);
  try {
    if (Nlohmann::sax_parse(text.begin(), text.end(), &builder)) return builder.TakeRoot();
  } catch (const std::exception& error) {
    return Invalid("JSON could not be read: {}", error.what());
  }
  return std::unexpected(Error{ErrorKind::kInvalid, builder.reason()});
}

void AppendJson(std::string& out, const JsonValue& value) {
  if (const bool* flag = value.AsBool()) {
    out += *flag ? "true" : "false";
  } else if (const int64_t* number = value.AsInt()) {
    AppendJsonNumber(out, *number);
  } else if (const uint64_t* big = value.AsBigInt()) {
    out += std::to_string(*big);
  } else if (const double* real = value.AsFloat()) {
    AppendJsonNumber(out, *real);
  } else if (const std::string* text = value.AsString()) {
    AppendJsonString(out, *text);
  } else if (const JsonArray* array = value.AsArray()) {
    out += '[';
    for (size_t i = 0; i < array->size(); ++i) {
      if (i > 0) out += ',';
      AppendJson(out, (*array)[i]);
    }
    out += ']';
  } else if (const JsonObject* object = value.AsObject()) {
    out += '{';
    for (size_t i = 0; i < object->size(); ++i) {
      if (i > 0) out += ',';
      AppendJsonString(out, (*object)[i].key);
      out += ':';
      AppendJson(out, (*object)[i].value);
    }
    out += '}';
  } else {
    out += "null";
  }
}

void AppendJsonEscaped(std::string& out, std::string_view text) {
  static constexpr char kHex[] = "0123456789abcdef";
  size_t begin = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const uint8_t c = static_cast<uint8_t>(text[i]);
    if (c >= 0x20 && c != '"' && c != '\\') continue;
    out.append(text, begin, i - begin);
    begin = i + 1;
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        out += "\\u00";
        out += kHex[c >> 4];
        out += kHex[c & 15];
    }
  }
  out.append(text, begin, text.size() - begin);
}

void AppendJsonString(std::string& out, std::string_view text) {
  out += '"';
  AppendJsonEscaped(out, text);
  out += '"';
}

void AppendJsonNumber(std::string& out, float value) {
  if (std::isfinite(value)) {
    AppendShortest(out, value);
  } else {
    out += "null";
  }
}

void AppendJsonNumber(std::string& out, double value) {
  if (std::isfinite(value)) {
    AppendShortest(out, value);
  } else {
    out += "null";
  }
}

void AppendJsonNumber(std::string& out, int64_t value) {
  std::array<char, 24> buffer;
  out.append(buffer.data(), std::to_chars(buffer.data(), buffer.data() + buffer.size(), value).ptr);
}

void AppendLogprob(std::string& out, float value) {
  if (value >= -9999.0F) {
    AppendJsonNumber(out, value);
  } else {
    out += "-9999.0";
  }
}

void AppendJsonIds(std::string& out, const std::vector<int32_t>& ids) {
  out += '[';
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += ',';
    AppendJsonNumber(out, int64_t{ids[i]});
  }
  out += ']';
}

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  std::string text;
  AppendShortest(text, value);
  return text;
}

bool IsUtf8(std::string_view bytes) {
  while (!bytes.empty()) {
    const size_t length = SequenceLength(bytes);
    if (length == 0) return false;
    bytes.remove_prefix(length);
  }
  return true;
}

std::string RepairUtf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  bool in_broken = false;
  while (!bytes.empty()) {
    const size_t length = SequenceLength(bytes);
    if (length > 0) {
      text.append(bytes, 0, length);
      bytes.remove_prefix(length);
      in_broken = false;
      continue;
    }
    // A run of continuation bytes after a broken lead belongs to the same broken character.
    const bool continuation = (static_cast<uint8_t>(bytes[0]) & 0xC0) == 0x80;
    if (!in_broken || !continuation) text += "\xEF\xBF\xBD";
    in_broken = true;
    bytes.remove_prefix(1);
  }
  return text;
}

}  // namespace tessera
