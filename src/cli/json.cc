// The bridge onto nlohmann::json; its exceptions end here.
#include "cli/json.h"

#include <nlohmann/json.hpp>
#include <vector>

namespace tessera::cli {
namespace {

using Json = nlohmann::json;

Result<Json> ParseObject(std::string_view text) {
  Json value = Json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (value.is_discarded()) return Invalid("'{}' is not JSON", text);
  if (!value.is_object()) return Invalid("'{}' is JSON, but not an object", text);
  return value;
}

std::string Dump(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }

const Json* At(const Json& root, std::string_view pointer) {
  const Json* node = &root;
  while (!pointer.empty()) {
    pointer.remove_prefix(1);
    const size_t end = std::min(pointer.find('/'), pointer.size());
    const std::string key(pointer.substr(0, end));
    pointer.remove_prefix(end);
    if (node->is_array()) {
      if (key.empty() || key.find_first_not_of("0123456789") != std::string::npos || key.size() > 6) return nullptr;
      const size_t index = std::stoul(key);
      if (index >= node->size()) return nullptr;
      node = &(*node)[index];
    } else {
      if (!node->is_object() || !node->contains(key)) return nullptr;
      node = &(*node)[key];
    }
  }
  return node;
}

}  // namespace

Status CheckJsonObject(std::string_view text) {
  ASSIGN_OR_RETURN(const Json value, ParseObject(text));
  return {};
}

std::optional<std::string> JsonString(std::string_view json, std::string_view pointer) {
  const Json root = Json::parse(json, nullptr, false);
  const Json* node = root.is_discarded() ? nullptr : At(root, pointer);
  if (node == nullptr || !node->is_string()) return std::nullopt;
  return node->get<std::string>();
}

std::optional<double> JsonNumber(std::string_view json, std::string_view pointer) {
  const Json root = Json::parse(json, nullptr, false);
  const Json* node = root.is_discarded() ? nullptr : At(root, pointer);
  if (node == nullptr || !node->is_number()) return std::nullopt;
  return node->get<double>();
}

Result<std::string> JsonKeys(std::string_view object) {
  ASSIGN_OR_RETURN(const Json value, ParseObject(object));
  std::string keys;
  for (const auto& item : value.items()) keys += (keys.empty() ? "" : ", ") + item.key();
  return keys;
}

Result<std::string> JsonSet(std::string_view object, std::string_view path, std::string_view value, bool* replaced) {
  ASSIGN_OR_RETURN(Json root, ParseObject(object));
  const bool append = path.ends_with('+');
  if (append) path.remove_suffix(1);
  Json parsed = Json::parse(value, nullptr, false);
  if (parsed.is_discarded()) parsed = std::string(value);
  Json* node = &root;
  std::string_view rest = path;
  while (!rest.empty()) {
    const size_t end = std::min(rest.find('.'), rest.size());
    const std::string key(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (key.empty()) return Invalid("'{}' has an empty part between its dots", path);
    if (node->is_null()) *node = Json::object();
    if (!node->is_object()) return Invalid("'{}' goes through a value that is not an object", path);
    node = &(*node)[key];
  }
  if (append) {
    if (node->is_null()) *node = Json::array();
    if (!node->is_array()) return Invalid("'{}+' wants a list, the value there is {}", path, Dump(*node));
    node->push_back(std::move(parsed));
    *replaced = false;
  } else {
    *replaced = !node->is_null();
    *node = std::move(parsed);
  }
  return Dump(root);
}

Result<std::string> JsonMerge(std::string_view base, std::string_view object, std::string* replaced) {
  ASSIGN_OR_RETURN(Json root, ParseObject(base));
  ASSIGN_OR_RETURN(const Json top, ParseObject(object));
  for (const auto& item : top.items()) {
    if (root.contains(item.key())) *replaced += (replaced->empty() ? "" : ", ") + item.key();
    root[item.key()] = item.value();
  }
  return Dump(root);
}

std::string JsonQuote(std::string_view text) { return Dump(Json(std::string(text))); }

}  // namespace tessera::cli
