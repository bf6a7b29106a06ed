// The bridge onto yaml-cpp; its exceptions end here. In YAML `None` is a string and merge keys are not
// applied by the library: the first fails where its flag wants something else, the second are refused.
#include "cli/config_file.h"

#include <yaml-cpp/yaml.h>

#include <set>

#include "base/file.h"
#include "base/json.h"
#include "cli/json.h"

namespace tessera::cli {
namespace {

constexpr uint64_t kMaxFileBytes = uint64_t{1} << 20;
constexpr size_t kMaxJsonBytes = size_t{16} << 20;  // aliases multiply what stands in the file
constexpr int kMaxDepth = 32;

Result<std::string> ToJson(const std::string& path, const YAML::Node& node, int depth = 0);

std::string ScalarToJson(const YAML::Node& node) {
  const std::string& text = node.Scalar();
  if (node.Tag() == "!") return JsonQuote(text);  // quoted in the file
  if (const auto number = ParseJson(text); number && number->is_number()) return text;
  bool truth = false;
  if (YAML::convert<bool>::decode(node, truth)) return truth ? "true" : "false";
  return JsonQuote(text);
}

// `item` of a mapping: "key":value.
Result<std::string> MemberToJson(const std::string& path, const YAML::detail::iterator_value& item,
                                 int depth) {
  const int line = item.first.Mark().line + 1;
  if (!item.first.IsScalar()) return Invalid("{}: the key in line {} is not a word", path, line);
  if (item.first.Scalar() == "<<")
    return Invalid("{}: line {}: merge keys (<<) are not applied; write the values out", path, line);
  ASSIGN_OR_RETURN(const std::string value, ToJson(path, item.second, depth));
  return JsonQuote(item.first.Scalar()) + ":" + value;
}

Result<std::string> ToJson(const std::string& path, const YAML::Node& node, int depth) {
  if (node.IsNull()) return "null";
  if (node.IsScalar()) return ScalarToJson(node);
  if (depth == kMaxDepth)
    return Invalid("{}: line {}: more than {} levels", path, node.Mark().line + 1, kMaxDepth);
  std::string json = node.IsSequence() ? "[" : "{";
  std::set<std::string> seen;
  for (const auto& item : node) {
    if (node.IsMap() && item.first.IsScalar() && !seen.insert(item.first.Scalar()).second) {
      return Invalid("{}: line {}: '{}' stands twice", path, item.first.Mark().line + 1, item.first.Scalar());
    }
    if (json.size() > 1) json += ",";
    ASSIGN_OR_RETURN(const std::string part,
                     node.IsSequence() ? ToJson(path, item, depth + 1) : MemberToJson(path, item, depth + 1));
    json += part;
    if (json.size() > kMaxJsonBytes)
      return Invalid("{}: line {}: too large with its aliases", path, node.Mark().line + 1);
  }
  return json + (node.IsSequence() ? "]" : "}");
}

Result<std::vector<ConfigEntry>> ReadEntries(const std::string& path, const YAML::Node& root) {
  if (root.IsNull()) return std::vector<ConfigEntry>{};
  if (!root.IsMap()) return Invalid("{}: the file is not a mapping of flag names to values", path);
  std::vector<ConfigEntry> entries;
  std::set<std::string> seen;
  for (const auto& item : root) {
    const int line = item.first.Mark().line + 1;
    if (!item.first.IsScalar()) return Invalid("{}: the key in line {} is not a flag's name", path, line);
    ConfigEntry entry{.name = item.first.Scalar(), .values = {}};
    if (entry.name == "<<")
      return Invalid("{}: line {}: merge keys (<<) are not applied; write the values out", path, line);
    if (!seen.insert(entry.name).second)
      return Invalid("{}: line {}: '{}' stands twice", path, line, entry.name);
    const YAML::Node& value = item.second;
    if (value.IsNull()) continue;
    entry.is_list = value.IsSequence();
    if (value.IsScalar()) entry.values.push_back(value.Scalar());
    if (value.IsMap()) {
      ASSIGN_OR_RETURN(std::string json, ToJson(path, value));
      entry.values.push_back(std::move(json));
    }
    if (value.IsSequence()) {
      for (const auto& part : value) {
        if (!part.IsScalar())
          return Invalid("{}: line {}: a value of '{}' is not a word", path, line, entry.name);
        entry.values.push_back(part.Scalar());
      }
    }
    entries.push_back(std::move(entry));
  }
  return entries;
}

}  // namespace

Result<std::vector<ConfigEntry>> ReadConfigFile(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  try {
    return ReadEntries(path, YAML::Load(text));
  } catch (const YAML::Exception& error) {
    return Invalid("{}: not YAML: {}", path, error.what());
  }
}

Result<std::string> YamlFileToJson(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
  try {
    const YAML::Node root = YAML::Load(text);
    if (!root.IsMap()) return Invalid("{}: the file is not a mapping", path);
    return ToJson(path, root);
  } catch (const YAML::Exception& error) {
    return Invalid("{}: not YAML: {}", path, error.what());
  }
}

}  // namespace tessera::cli
