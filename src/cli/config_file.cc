// The bridge onto yaml-cpp; its exceptions end here. In YAML `None` is a string and merge keys are not
// applied by the library: the first fails where its flag wants something else, the second are refused.
#include "cli/config_file.h"

#include <yaml-cpp/yaml.h>

#include <set>

#include "base/file.h"
#include "cli/json.h"

namespace tessera::cli {
namespace {

Result<std::string> ToJson(const std::string& path, const YAML::Node& node) {
  if (node.IsNull()) return "null";
  if (node.IsScalar()) {
    const std::string text = node.Scalar();
    bool truth = false;
    double number = 0;
    if (node.Tag() == "!") return JsonQuote(text);  // quoted in the file
    if (YAML::convert<double>::decode(node, number) &&
        text.find_first_not_of("0123456789+-.eE") == std::string::npos && text.front() != '+' &&
        text.front() != '.') {
      return text;
    }
    if (YAML::convert<bool>::decode(node, truth)) return truth ? "true" : "false";
    return JsonQuote(text);
  }
  std::string json = node.IsSequence() ? "[" : "{";
  for (const auto& item : node) {
    if (json.size() > 1) json += ",";
    if (node.IsSequence()) {
      ASSIGN_OR_RETURN(const std::string value, ToJson(path, item));
      json += value;
    } else {
      if (!item.first.IsScalar())
        return Invalid("{}: a key in line {} is not a word", path, item.first.Mark().line + 1);
      ASSIGN_OR_RETURN(const std::string value, ToJson(path, item.second));
      json += JsonQuote(item.first.Scalar()) + ":" + value;
    }
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
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, uint64_t{1} << 20));
  try {
    return ReadEntries(path, YAML::Load(text));
  } catch (const YAML::Exception& error) {
    return Invalid("{}: not YAML: {}", path, error.what());
  }
}

}  // namespace tessera::cli
