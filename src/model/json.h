// JSON of model files (config.json, indexes, descriptions, safetensors headers) as a plain tree, read strictly:
// duplicate keys, broken UTF-8, NUL bytes and anything beyond the limits are errors. Not for requests: http/ has its
// own. nlohmann::json stays in json.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace tessera {

struct JsonMember;

struct JsonValue {
  enum class Kind { kNull, kBool, kInteger, kReal, kText, kArray, kObject };
  Kind kind = Kind::kNull;
  bool boolean = false;
  int64_t integer = 0;  // kInteger; integers beyond 64 bits are kReal
  double real = 0;      // kReal, and the value of kInteger
  std::string text;
  std::vector<JsonValue> items;
  std::vector<JsonMember> members;  // sorted by name, no name twice

  bool is_object() const { return kind == Kind::kObject; }
  bool is_text() const { return kind == Kind::kText; }
  bool is_integer() const { return kind == Kind::kInteger; }
  bool is_number() const { return kind == Kind::kInteger || kind == Kind::kReal; }
  const JsonValue* Find(std::string_view name) const;  // a member, or null
  // A short form for messages: 12, "text", null, an array of 3, ...
  std::string Describe() const;
};

struct JsonMember {
  std::string name;
  JsonValue value;
};

struct JsonLimits {
  size_t max_bytes = size_t{64} << 20;
  size_t max_depth = 32;
  size_t max_values = size_t{4} << 20;  // a value costs about 130 bytes of memory
};

// `what` names the text in messages, usually its path.
Result<JsonValue> ParseJson(std::string_view text, std::string_view what, const JsonLimits& limits = {});
// The file's text, parsed.
Result<JsonValue> ReadJsonFile(const std::string& path, const JsonLimits& limits = {});

// `text` as it may stand in a message: control characters replaced, cut after 120 bytes.
std::string Printable(std::string_view text);

}  // namespace tessera
