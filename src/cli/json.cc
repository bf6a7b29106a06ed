// See json.h; the reader and the value are base/json.h's.
#include "cli/json.h"

#include <algorithm>
#include <charconv>
#include <utility>

#include "base/json.h"

namespace tessera::cli {
namespace {

Result<JsonValue> ParseObject(std::string_view text) {
  auto value = ParseJson(text);
  if (!value) return Invalid("'{}' is not JSON: {}", text, value.error().message);
  if (!value->is_object()) return Invalid("'{}' is JSON, but not an object", text);
  return value;
}

std::string Dump(const JsonValue& value) {
  std::string text;
  AppendJson(text, value);
  return text;
}

const JsonValue* At(const JsonValue& root, std::string_view pointer) {
  const JsonValue* node = &root;
  while (node != nullptr && !pointer.empty()) {
    pointer.remove_prefix(1);
    const std::string_view key = pointer.substr(0, pointer.find('/'));
    pointer.remove_prefix(key.size());
    if (!node->is_array()) {
      node = node->Find(key);
      continue;
    }
    size_t index = 0;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), index);
    const bool valid = error == std::errc() && end == key.data() + key.size() && index < node->items().size();
    node = valid ? &node->items()[index] : nullptr;
  }
  return node;
}

// The member `key` of an object, added as null where there is none.
JsonValue& Member(JsonObject& object, std::string_view key, bool* added) {
  const auto place =
      std::find_if(object.begin(), object.end(), [&](const JsonMember& m) { return m.key == key; });
  *added = place == object.end();
  if (!*added) return place->value;
  return object.emplace_back(JsonMember{std::string(key), JsonValue()}).value;
}

}  // namespace

Status CheckJsonObject(std::string_view text) {
  ASSIGN_OR_RETURN(const JsonValue value, ParseObject(text));
  return {};
}

std::optional<std::string> JsonString(std::string_view json, std::string_view pointer) {
  const auto root = ParseJson(json);
  const JsonValue* node = root ? At(*root, pointer) : nullptr;
  if (node == nullptr || !node->is_text()) return std::nullopt;
  return node->text();
}

std::optional<double> JsonNumber(std::string_view json, std::string_view pointer) {
  const auto root = ParseJson(json);
  const JsonValue* node = root ? At(*root, pointer) : nullptr;
  if (node == nullptr || !node->is_number()) return std::nullopt;
  return node->number();
}

Result<std::string> JsonKeys(std::string_view object) {
  ASSIGN_OR_RETURN(const JsonValue value, ParseObject(object));
  std::string keys;
  for (const JsonMember& member : value.members()) keys += (keys.empty() ? "" : ", ") + member.key;
  return keys;
}

Result<std::string> JsonSet(std::string_view object, std::string_view path, std::string_view value,
                            bool* replaced) {
  ASSIGN_OR_RETURN(JsonValue root, ParseObject(object));
  const bool append = path.ends_with('+');
  if (append) path.remove_suffix(1);
  auto parsed = ParseJson(value);
  JsonValue leaf = parsed ? std::move(*parsed) : JsonValue(std::string(value));
  JsonValue* node = &root;
  bool added = false;
  for (std::string_view rest = path; !rest.empty();) {
    const std::string_view key = rest.substr(0, rest.find('.'));
    rest.remove_prefix(std::min(key.size() + 1, rest.size()));
    if (key.empty()) return Invalid("'{}' has an empty part between its dots", path);
    if (node->is_null()) *node = JsonValue(JsonObject{});
    if (!node->is_object()) return Invalid("'{}' goes through a value that is not an object", path);
    node = &Member(*node->AsObject(), key, &added);
  }
  if (append) {
    if (node->is_null()) *node = JsonValue(JsonArray{});
    if (!node->is_array())
      return Invalid("'{}+' wants a list, the value there is {}", path, node->Describe());
    node->AsArray()->push_back(std::move(leaf));
  } else {
    *node = std::move(leaf);
  }
  *replaced = !append && !added;
  return Dump(root);
}

Result<std::string> JsonMerge(std::string_view base, std::string_view object, std::string* replaced) {
  ASSIGN_OR_RETURN(JsonValue root, ParseObject(base));
  ASSIGN_OR_RETURN(JsonValue top, ParseObject(object));
  for (JsonMember& member : *top.AsObject()) {
    bool added = false;
    JsonValue& target = Member(*root.AsObject(), member.key, &added);
    if (!added) *replaced += (replaced->empty() ? "" : ", ") + member.key;
    target = std::move(member.value);
  }
  return Dump(root);
}

std::string JsonQuote(std::string_view text) {
  std::string out;
  AppendJsonString(out, RepairUtf8(text));
  return out;
}

}  // namespace tessera::cli
