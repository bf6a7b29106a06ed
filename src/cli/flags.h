// One table of flags per command, and the one parser for all of them: `--flag v`, `--flag=v`, `_` for `-` in
// names,
// `--no-x`, dotted JSON flags, lists, a positional argument, `--config file.yaml`. Knows no flag by itself.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/error.h"

namespace tessera::cli {

// Where a value goes and what is allowed. The target's value when the table is built is the default.
struct BoolFlag {
  bool* target;
};
struct IntFlag {
  int64_t* target;
  int64_t min, max;
  bool suffixes = false;  // 32k = 32000, 32K = 32768, likewise m and g
};
struct OptionalIntFlag {  // absent unless given
  std::optional<int64_t>* target;
  int64_t min, max;
  bool suffixes = false;
};
struct NumberFlag {
  double* target;
  double above, max;  // above < value <= max
};
struct TextFlag {
  std::string* target;
  std::vector<std::string> choices = {};  // empty: any text
};
struct ListFlag {  // takes every value up to the next flag; a repeated flag starts anew
  std::vector<std::string>* target;
};
struct JsonFlag {  // an object; also --name.key.key value
  std::string* target;
};
struct IgnoredFlag {  // accepted with one warning, changes nothing
  bool has_value;
};
struct OnlyFlag {  // `values` are accepted, all else is refused: the rest is not built
  std::vector<std::string> values;
};
struct RefusedFlag {  // `help` of the flag says why
  bool has_value;
};

using FlagKind = std::variant<BoolFlag, IntFlag, OptionalIntFlag, NumberFlag, TextFlag, ListFlag, JsonFlag,
                              IgnoredFlag, OnlyFlag, RefusedFlag>;

struct Flag {
  std::string name;    // without dashes, words joined by '-'
  std::string letter;  // the short form without its dash ("tp"), or empty
  FlagKind kind;
  std::string help;
  std::string group;
};

struct FlagTable {
  std::string command;  // "tessera serve"
  std::string summary;
  std::string positional_name = {};  // empty: positional arguments are refused
  std::string* positional = nullptr;
  std::vector<Flag> flags;
  bool takes_config_file = false;
};

struct ParsedFlags {
  bool help = false;
  std::vector<std::string> given;     // names of the flags that were set, in order
  std::vector<std::string> warnings;  // for the log, at most one per flag
  bool Has(std::string_view name) const;
};

// Writes the targets. Errors are kInvalid and name the flag, the value seen and the value wanted; an unknown
// flag comes with the nearest name.
Result<ParsedFlags> ParseFlags(const FlagTable& table, std::span<const std::string> arguments);

// --help: grouped, with defaults.
std::string HelpText(const FlagTable& table);

// A whole subcommand: prints --help, or calls `run` with what was given, and prints its error behind the
// command's name. Returns the exit code: 0; 2 where the command line or what it names is invalid; else 1.
int RunCommand(const FlagTable& table, std::span<const std::string> arguments,
               const std::function<Status(ParsedFlags& parsed)>& run);

// A count with an optional suffix. kInvalid without the name of the flag.
Result<int64_t> ParseCount(std::string_view text, bool suffixes);

}  // namespace tessera::cli
