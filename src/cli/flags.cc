// The parser and the help text of flags.h.
#include "cli/flags.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "base/check.h"
#include "base/format.h"
#include "cli/config_file.h"
#include "cli/json.h"

namespace tessera::cli {
namespace {

template <typename... Cases>
struct Overloaded : Cases... {
  using Cases::operator()...;
};
template <typename... Cases>
Overloaded(Cases...) -> Overloaded<Cases...>;

template <typename T>
bool Is(const Flag& flag) {
  return std::holds_alternative<T>(flag.kind);
}

// A flag without a value of its own: present or not.
bool IsSwitch(const Flag& flag) {
  if (const auto* ignored = std::get_if<IgnoredFlag>(&flag.kind)) return !ignored->has_value;
  if (const auto* refused = std::get_if<RefusedFlag>(&flag.kind)) return !refused->has_value;
  return Is<BoolFlag>(flag);
}

// Flags are written with dashes, but "-1" and "-0.5" are values.
bool LooksLikeFlag(std::string_view argument) {
  if (argument.size() < 2 || argument[0] != '-') return false;
  return argument.find_first_not_of("0123456789.", 1) != std::string_view::npos;
}

std::optional<bool> ParseBool(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  if (text == "true" || text == "yes" || text == "on" || text == "1") return true;
  if (text == "false" || text == "no" || text == "off" || text == "0") return false;
  return std::nullopt;
}

int EditDistance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int above = row[j];
      row[j] = std::min({above + 1, row[j - 1] + 1, diagonal + (a[i - 1] == b[j - 1] ? 0 : 1)});
      diagonal = above;
    }
  }
  return row[b.size()];
}

std::string Nearest(const FlagTable& table, std::string_view name) {
  const Flag* best = nullptr;
  int best_distance = 0;
  for (const Flag& flag : table.flags) {
    const int distance = EditDistance(name, flag.name);
    if (best == nullptr || distance < best_distance) {
      best = &flag;
      best_distance = distance;
    }
  }
  return best == nullptr ? "help" : best->name;
}

Status SetInt(const Flag& flag, const std::string& text, int64_t min, int64_t max, bool suffixes,
              int64_t* value) {
  auto parsed = ParseCount(text, suffixes);
  if (!parsed || *parsed < min || *parsed > max) {
    const std::string bounds =
        max == INT64_MAX ? Format("of at least {}", min) : Format("from {} to {}", min, max);
    return Invalid("--{}: '{}' is not an integer {}{}", flag.name, text, bounds,
                   suffixes ? " (suffixes: 1k = 1000, 1K = 1024)" : "");
  }
  *value = *parsed;
  return {};
}

Status SetNumber(const Flag& flag, const NumberFlag& kind, const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || !(value > kind.above) ||
      !(value <= kind.max)) {
    const std::string bounds = std::isinf(kind.max) ? Format("above {}", kind.above)
                                                    : Format("above {} and at most {}", kind.above, kind.max);
    return Invalid("--{}: '{}' is not a number {}", flag.name, text, bounds);
  }
  *kind.target = value;
  return {};
}

Status SetChoice(const Flag& flag, const std::vector<std::string>& choices, const std::string& text) {
  if (choices.empty() || std::find(choices.begin(), choices.end(), text) != choices.end()) return {};
  return Invalid("--{}: '{}' is not one of {}", flag.name, text, fmt::join(choices, ", "));
}

class Parser {
 public:
  explicit Parser(const FlagTable& table) : table_(table) {}

  Status ApplyConfigFile(const std::string& path);
  Status Apply(std::span<const std::string> arguments);
  ParsedFlags& parsed() { return parsed_; }

 private:
  const Flag* Find(std::string_view name) const {
    for (const Flag& flag : table_.flags) {
      if (flag.name == name) return &flag;
    }
    return nullptr;
  }
  Error Unknown(std::string_view written, std::string_view name) const {
    return Error{ErrorKind::kInvalid,
                 Format("unknown flag {}; did you mean --{}?", written, Nearest(table_, name))};
  }
  void Warn(const std::string& text) {
    auto& warnings = parsed_.warnings;
    if (std::find(warnings.begin(), warnings.end(), text) == warnings.end()) warnings.push_back(text);
  }
  Status ApplyOne(std::span<const std::string> arguments, size_t* next);
  Status ApplyPositional(const std::string& text);
  // `has_inline`: the value was written behind '='.
  Status ApplySwitch(const Flag& flag, bool on, const std::optional<std::string>& inline_value);
  Status ApplyValue(const Flag& flag, const std::string& value);
  Status ApplyJson(const Flag& flag, const JsonFlag& kind, std::string_view path, const std::string& value);
  void Given(const Flag& flag) {
    if (!parsed_.Has(flag.name)) parsed_.given.push_back(flag.name);
  }

  const FlagTable& table_;
  ParsedFlags parsed_;
  std::vector<std::string> started_;  // list and JSON flags whose default has been replaced
};

Status Parser::ApplySwitch(const Flag& flag, bool on, const std::optional<std::string>& inline_value) {
  if (inline_value) {
    const auto value = ParseBool(*inline_value);
    if (!value) return Invalid("--{}: '{}' is not true or false", flag.name, *inline_value);
    on = on == *value;
  }
  Given(flag);
  if (Is<IgnoredFlag>(flag)) {
    Warn(Format("--{} has no effect here: {}", flag.name, flag.help));
  } else if (Is<RefusedFlag>(flag)) {
    if (on) return Invalid("--{}: {}", flag.name, flag.help);
  } else {
    *std::get<BoolFlag>(flag.kind).target = on;
  }
  return {};
}

Status Parser::ApplyJson(const Flag& flag, const JsonFlag& kind, std::string_view path,
                         const std::string& value) {
  const bool first = std::find(started_.begin(), started_.end(), flag.name) == started_.end();
  if (first) started_.push_back(flag.name);
  const std::string base = first ? "{}" : *kind.target;
  std::string replaced_keys;
  bool replaced = false;
  auto merged = path.empty() ? JsonMerge(base, value, &replaced_keys) : JsonSet(base, path, value, &replaced);
  if (!merged) return Invalid("--{}: {}; wanted a JSON object", flag.name, merged.error().message);
  if (replaced) replaced_keys = path;
  if (!replaced_keys.empty())
    Warn(Format("--{}: '{}' was given twice, the last value counts", flag.name, replaced_keys));
  *kind.target = *merged;
  return {};
}

Status Parser::ApplyValue(const Flag& flag, const std::string& value) {
  Given(flag);
  return std::visit(
      Overloaded{
          [&](const IntFlag& kind) {
            return SetInt(flag, value, kind.min, kind.max, kind.suffixes, kind.target);
          },
          [&](const OptionalIntFlag& kind) {
            kind.target->emplace(0);
            return SetInt(flag, value, kind.min, kind.max, kind.suffixes, &**kind.target);
          },
          [&](const NumberFlag& kind) { return SetNumber(flag, kind, value); },
          [&](const TextFlag& kind) -> Status {
            RETURN_IF_ERROR(SetChoice(flag, kind.choices, value));
            *kind.target = value;
            return {};
          },
          [&](const ListFlag& kind) -> Status {
            kind.target->push_back(value);
            return {};
          },
          [&](const JsonFlag& kind) { return ApplyJson(flag, kind, "", value); },
          [&](const IgnoredFlag&) -> Status {
            Warn(Format("--{} has no effect here: {}", flag.name, flag.help));
            return {};
          },
          [&](const OnlyFlag& kind) -> Status {
            if (std::find(kind.values.begin(), kind.values.end(), value) != kind.values.end()) return {};
            return Invalid("--{} {}: {} (accepted: {})", flag.name, value, flag.help,
                           fmt::join(kind.values, ", "));
          },
          [&](const RefusedFlag&) -> Status { return Invalid("--{}: {}", flag.name, flag.help); },
          [&](const BoolFlag&) -> Status { return {}; },  // switches do not come here
      },
      flag.kind);
}

Status Parser::ApplyPositional(const std::string& text) {
  if (table_.positional == nullptr)
    return Invalid("'{}' is not a flag, and no other argument is expected", text);
  if (!parsed_.Has("")) {
    parsed_.given.push_back("");
    *table_.positional = text;
    return {};
  }
  return Invalid("'{}': there is already a {}, '{}'", text, table_.positional_name, *table_.positional);
}

Status Parser::ApplyOne(std::span<const std::string> arguments, size_t* next) {
  const std::string& argument = arguments[(*next)++];
  if (!LooksLikeFlag(argument)) return ApplyPositional(argument);
  const size_t dashes = argument.starts_with("--") ? 2 : 1;
  const size_t equals = argument.find('=');
  std::optional<std::string> inline_value;
  if (equals != std::string::npos) inline_value = argument.substr(equals + 1);
  const std::string written = argument.substr(0, equals);
  std::string name = written.substr(dashes);
  if ((dashes == 2 && name == "help") || (dashes == 1 && name == "h")) {
    parsed_.help = true;
    return {};
  }
  std::string path;
  const Flag* flag = nullptr;
  bool on = true;
  if (dashes == 1) {
    for (const Flag& candidate : table_.flags) {
      if (!candidate.letter.empty() && candidate.letter == name) flag = &candidate;
    }
  } else {
    if (const size_t dot = name.find('.'); dot != std::string::npos) {
      path = name.substr(dot + 1);
      name.resize(dot);
    }
    std::replace(name.begin(), name.end(), '_', '-');
    flag = Find(name);
    if (flag == nullptr && name.starts_with("no-")) {
      flag = Find(name.substr(3));
      on = false;
      if (flag != nullptr && !IsSwitch(*flag)) flag = nullptr;
    }
    if (flag != nullptr && !path.empty() && Is<IgnoredFlag>(*flag)) path.clear();
    if (flag != nullptr && !path.empty() && !Is<JsonFlag>(*flag)) flag = nullptr;
  }
  if (flag == nullptr) return std::unexpected(Unknown(written, name));
  if (IsSwitch(*flag)) return ApplySwitch(*flag, on, inline_value);
  if (!inline_value) {
    if (*next == arguments.size() || LooksLikeFlag(arguments[*next])) {
      return Invalid("--{} wants a value", flag->name);
    }
    inline_value = arguments[(*next)++];
  }
  if (!path.empty()) {
    Given(*flag);
    return ApplyJson(*flag, std::get<JsonFlag>(flag->kind), path, *inline_value);
  }
  if (const auto* list = std::get_if<ListFlag>(&flag->kind)) {
    list->target->clear();
    RETURN_IF_ERROR(ApplyValue(*flag, *inline_value));
    while (*next < arguments.size() && !LooksLikeFlag(arguments[*next])) {
      RETURN_IF_ERROR(ApplyValue(*flag, arguments[(*next)++]));
    }
    return {};
  }
  return ApplyValue(*flag, *inline_value);
}

Status Parser::Apply(std::span<const std::string> arguments) {
  for (size_t next = 0; next < arguments.size();) RETURN_IF_ERROR(ApplyOne(arguments, &next));
  return {};
}

Status Parser::ApplyConfigFile(const std::string& path) {
  ASSIGN_OR_RETURN(const std::vector<ConfigEntry> entries, ReadConfigFile(path));
  for (const ConfigEntry& entry : entries) {
    std::vector<std::string> arguments = {"--" + entry.name};
    // A scalar travels behind '=', so that it may begin with a dash and switches see their true or false.
    if (!entry.is_list) arguments[0] += "=" + entry.values[0];
    if (entry.is_list) arguments.insert(arguments.end(), entry.values.begin(), entry.values.end());
    if (auto status = Apply(arguments); !status) return Invalid("{}: {}", path, status.error().message);
  }
  // An explicit positional argument or list replaces what the file said.
  std::erase(parsed_.given, "");
  return {};
}

// Takes every `--config x` out of the arguments.
Result<std::optional<std::string>> TakeConfigFile(std::vector<std::string>& arguments) {
  std::optional<std::string> path;
  for (size_t i = 0; i < arguments.size();) {
    const bool separate = arguments[i] == "--config";
    if (!separate && !arguments[i].starts_with("--config=")) {
      ++i;
      continue;
    }
    if (path) return Invalid("--config: '{}' and another one; at most one file is read", *path);
    if (separate && i + 1 == arguments.size()) return Invalid("--config wants a file");
    path = separate ? arguments[i + 1] : arguments[i].substr(9);
    arguments.erase(arguments.begin() + i, arguments.begin() + i + (separate ? 2 : 1));
  }
  return path;
}

std::string ValueName(const Flag& flag) {
  return std::visit(Overloaded{[](const BoolFlag&) { return std::string(); },
                               [](const IntFlag&) { return std::string("N"); },
                               [](const OptionalIntFlag&) { return std::string("N"); },
                               [](const NumberFlag&) { return std::string("X"); },
                               [](const TextFlag& kind) {
                                 return kind.choices.empty() ? "TEXT"
                                                             : Format("{}", fmt::join(kind.choices, "|"));
                               },
                               [](const ListFlag&) { return std::string("TEXT..."); },
                               [](const JsonFlag&) { return std::string("JSON"); },
                               [](const OnlyFlag& kind) { return Format("{}", fmt::join(kind.values, "|")); },
                               [](const auto&) { return std::string(); }},
                    flag.kind);
}

std::string DefaultText(const Flag& flag) {
  const auto or_nothing = [](const std::string& text) {
    return text.empty() ? std::string() : "default: " + text;
  };
  return std::visit(
      Overloaded{[](const BoolFlag& kind) { return Format("default: {}", *kind.target ? "on" : "off"); },
                 [](const IntFlag& kind) { return Format("default: {}", *kind.target); },
                 [](const NumberFlag& kind) { return Format("default: {}", *kind.target); },
                 [&](const TextFlag& kind) { return or_nothing(*kind.target); },
                 [&](const ListFlag& kind) { return or_nothing(Format("{}", fmt::join(*kind.target, " "))); },
                 [](const auto&) { return std::string(); }},
      flag.kind);
}

void AppendWrapped(std::string& out, const std::string& text, size_t indent, size_t width) {
  size_t column = indent;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(' ', begin), text.size());
    if (column + (end - begin) > width) {
      out += "\n" + std::string(indent, ' ');
      column = indent;
    }
    out += text.substr(begin, end - begin) + " ";
    column += end - begin + 1;
    begin = end + 1;
  }
  while (out.ends_with(' ')) out.pop_back();
  out += "\n";
}

}  // namespace

bool ParsedFlags::Has(std::string_view name) const {
  return std::find(given.begin(), given.end(), name) != given.end();
}

Result<int64_t> ParseCount(std::string_view text, bool suffixes) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end == text.data()) return Invalid("'{}' is not an integer", text);
  const std::string_view suffix = text.substr(end - text.data());
  if (suffix.empty()) return value;
  const size_t power = std::string_view("kmgtKMGT").find(suffix[0]);
  if (!suffixes || suffix.size() != 1 || power == std::string_view::npos)
    return Invalid("'{}' is not an integer", text);
  for (size_t i = 0; i <= power % 4; ++i) {
    if (__builtin_mul_overflow(value, power < 4 ? int64_t{1000} : int64_t{1024}, &value)) {
      return Invalid("'{}' is too large", text);
    }
  }
  return value;
}

Result<ParsedFlags> ParseFlags(const FlagTable& table, std::span<const std::string> arguments) {
  Parser parser(table);
  std::vector<std::string> rest(arguments.begin(), arguments.end());
  if (table.takes_config_file) {
    ASSIGN_OR_RETURN(const std::optional<std::string> path, TakeConfigFile(rest));
    if (path) RETURN_IF_ERROR(parser.ApplyConfigFile(*path));
  }
  RETURN_IF_ERROR(parser.Apply(rest));
  return std::move(parser.parsed());
}

std::string HelpText(const FlagTable& table) {
  std::string out =
      Format("usage: {}{} [flags]\n\n{}\n", table.command,
             table.positional == nullptr ? "" : Format(" [{}]", table.positional_name), table.summary);
  std::string group;
  std::string ignored, refused;
  for (const Flag& flag : table.flags) {
    if (Is<IgnoredFlag>(flag) || Is<RefusedFlag>(flag)) {
      (Is<IgnoredFlag>(flag) ? ignored : refused) += "--" + flag.name + " ";
      continue;
    }
    if (flag.group != group) out += Format("\n{}:\n", flag.group);
    group = flag.group;
    std::string left = Format("  --{}{}", flag.name, flag.letter.empty() ? "" : Format(", -{}", flag.letter));
    if (const std::string value = ValueName(flag); !value.empty()) left += " " + value;
    const std::string standard = DefaultText(flag);
    out += left.size() < 38 ? left + std::string(38 - left.size(), ' ') : left + "\n" + std::string(38, ' ');
    AppendWrapped(out, flag.help + (standard.empty() ? "" : " (" + standard + ")"), 38, 108);
  }
  if (table.takes_config_file) {
    out += "\n  --config FILE                       YAML file of flags; explicit flags win\n";
  }
  for (const auto& [title, names] :
       {std::pair{"Accepted without effect", &ignored}, std::pair{"Refused", &refused}}) {
    if (names->empty()) continue;
    out += Format("\n{}:\n  ", title);
    AppendWrapped(out, *names, 2, 108);
  }
  return out;
}

int RunCommand(const FlagTable& table, std::span<const std::string> arguments,
               const std::function<Status(ParsedFlags& parsed)>& run) {
  const std::string help = HelpText(table);  // before the targets change: it shows the defaults
  auto parsed = ParseFlags(table, arguments);
  if (parsed && parsed->help) {
    fmt::print("{}", help);
    return 0;
  }
  const Status status = parsed ? run(*parsed) : Status(std::unexpected(parsed.error()));
  if (status) return 0;
  std::fflush(stdout);
  fmt::print(stderr, "{}: {}\n", table.command, status.error().message);
  return status.error().kind == ErrorKind::kInvalid ? 2 : 1;
}

}  // namespace tessera::cli
