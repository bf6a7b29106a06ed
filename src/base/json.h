// JSON of requests, answers and model files: a strict reader into a small value type, and writers that append
// text. Not a general JSON library: values are read-only after parsing, answers are written as text without a
// tree. nlohmann::json stays in json.cc.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/error.h"

namespace tessera {

class JsonValue;
struct JsonMember;
using JsonArray = std::vector<JsonValue>;
using JsonObject = std::vector<JsonMember>;  // in the order of the text; keys are unique

// 16 bytes, so that a long list of token ids stays small. Movable, not copyable.
class JsonValue {
 public:
  JsonValue();  // null
  explicit JsonValue(bool value);
  explicit JsonValue(int64_t value);
  explicit JsonValue(uint64_t value);
  explicit JsonValue(double value);
  explicit JsonValue(std::string value);
  explicit JsonValue(JsonArray value);
  explicit JsonValue(JsonObject value);
  JsonValue(JsonValue&&) noexcept;
  JsonValue& operator=(JsonValue&&) noexcept;
  ~JsonValue();

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  // Each returns null when the value has another type.
  const bool* AsBool() const { return std::get_if<bool>(&value_); }
  const int64_t* AsInt() const { return std::get_if<int64_t>(&value_); }
  const uint64_t* AsBigInt() const {
    return std::get_if<uint64_t>(&value_);
  }  // only above the range of int64_t
  const double* AsFloat() const { return std::get_if<double>(&value_); }  // written with '.' or 'e'
  const std::string* AsString() const;
  const JsonArray* AsArray() const;
  const JsonObject* AsObject() const;
  JsonArray* AsArray();
  JsonObject* AsObject();
  // The member of an object; null when there is none or this is no object.
  const JsonValue* Find(std::string_view key) const;

  // For readers of files: what kind it is, and its content, empty or zero when it is of another kind.
  bool is_text() const { return AsString() != nullptr; }
  bool is_integer() const { return AsInt() != nullptr; }
  bool is_number() const { return is_integer() || AsFloat() != nullptr; }
  bool is_array() const { return AsArray() != nullptr; }
  bool is_object() const { return AsObject() != nullptr; }
  const std::string& text() const;
  int64_t integer() const { return is_integer() ? *AsInt() : 0; }
  double number() const { return AsFloat() != nullptr ? *AsFloat() : static_cast<double>(integer()); }
  const JsonArray& items() const;
  const JsonObject& members() const;
  // A short form for messages: 12, "text", null, an array of 3, ...
  std::string Describe() const;

 private:
  std::variant<std::monostate, bool, int64_t, uint64_t, double, std::unique_ptr<std::string>,
               std::unique_ptr<JsonArray>, std::unique_ptr<JsonObject>>
      value_;
};

struct JsonMember {
  std::string key;
  JsonValue value;
};

struct JsonLimits {
  size_t max_depth = 64;                // nested arrays and objects
  size_t max_values = size_t{4} << 20;  // values in all; 16 bytes each
};

// The one value that `text` holds. kInvalid with the place for: broken syntax or UTF-8, lone surrogates, a
// BOM, NUL bytes, duplicate keys, integers beyond 64 bits, numbers that are not finite, and anything over
// `limits`. Does not recurse.
Result<JsonValue> ParseJson(std::string_view text, const JsonLimits& limits = {});
// The same with `what`, usually a path, named in messages.
Result<JsonValue> ParseJson(std::string_view text, std::string_view what, const JsonLimits& limits = {});
// A whole file of at most 64 MiB.
Result<JsonValue> ReadJsonFile(const std::string& path, const JsonLimits& limits = {});

// Appends `value` as compact JSON.
void AppendJson(std::string& out, const JsonValue& value);
// Appends `text`, which is UTF-8, escaped; the second form adds the quotes.
void AppendJsonEscaped(std::string& out, std::string_view text);
void AppendJsonString(std::string& out, std::string_view text);
// Shortest text that restores the bits, always with '.' or 'e'. Not finite: null.
void AppendJsonNumber(std::string& out, float value);
void AppendJsonNumber(std::string& out, double value);
void AppendJsonNumber(std::string& out, int64_t value);
// A logprob of fp32; -inf and anything below -9999 print as -9999.0.
void AppendLogprob(std::string& out, float value);
void AppendJsonIds(std::string& out, const std::vector<int32_t>& ids);
// "5.0", "-0.2": as a Python float prints; for messages.
std::string FloatText(double value);

// `text` as it may stand in a message: control characters replaced, cut after 120 bytes.
std::string Printable(std::string_view text);
bool IsUtf8(std::string_view bytes);
// `bytes` with each broken sequence replaced by U+FFFD.
std::string RepairUtf8(std::string_view bytes);

}  // namespace tessera
