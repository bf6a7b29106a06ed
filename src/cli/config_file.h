// YAML files. `--config file.yaml` is a mapping of flags, read as if they stood directly after the command's
// name, so that explicit flags win. Any other file becomes JSON. yaml-cpp stays in config_file.cc.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace tessera::cli {

struct ConfigEntry {
  std::string name;                 // as written, without dashes
  std::vector<std::string> values;  // one for a scalar; a nested mapping is one JSON text
  bool is_list = false;
};

// Null values (`key:`) are left out. kInvalid names file, line and key: not a mapping, doubled keys, merge
// keys.
Result<std::vector<ConfigEntry>> ReadConfigFile(const std::string& path);

// A file whose root is a mapping, as one JSON object. `True`, `on` and the like are booleans there, `key:` is
// null, what is no JSON number (`None`, `58GB`) is a string; anchors are resolved. kInvalid: as above.
Result<std::string> YamlFileToJson(const std::string& path);

}  // namespace tessera::cli
