// Builds the tree from nlohmann's events, so that limits hold before memory is spent.
#include "model/json.h"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>

#include "base/file.h"

namespace tessera {
namespace {

class TreeBuilder : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit TreeBuilder(const JsonLimits& limits) : limits_(limits) {}

  JsonValue& root() { return root_; }
  const std::string& error() const { return error_; }

  bool null() override { return Add(JsonValue::Kind::kNull) != nullptr; }
  bool boolean(bool value) override {
    JsonValue* added = Add(JsonValue::Kind::kBool);
    if (added != nullptr) added->boolean = value;
    return added != nullptr;
  }
  bool number_integer(int64_t value) override {
    JsonValue* added = Add(JsonValue::Kind::kInteger);
    if (added == nullptr) return false;
    added->integer = value;
    added->real = static_cast<double>(value);
    return true;
  }
  bool number_unsigned(uint64_t value) override {
    if (value <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return number_integer(static_cast<int64_t>(value));
    }
    return number_float(static_cast<double>(value), "");
  }
  bool number_float(double value, const std::string&) override {
    JsonValue* added = Add(JsonValue::Kind::kReal);
    if (added != nullptr) added->real = value;
    return added != nullptr;
  }
  bool string(std::string& value) override {
    JsonValue* added = Add(JsonValue::Kind::kText);
    if (added != nullptr) added->text = std::move(value);
    return added != nullptr;
  }
  bool binary(nlohmann::json::binary_t&) override { return Stop("binary values are not JSON"); }
  bool key(std::string& name) override {
    open_.back()->members.push_back({std::move(name), {}});
    return true;
  }
  bool start_object(size_t) override { return Open(JsonValue::Kind::kObject); }
  bool start_array(size_t) override { return Open(JsonValue::Kind::kArray); }
  bool end_array() override {
    open_.pop_back();
    return true;
  }
  bool end_object() override {
    std::vector<JsonMember>& members = open_.back()->members;
    open_.pop_back();
    const auto name = [](const JsonMember& member) -> const std::string& { return member.name; };
    std::ranges::sort(members, std::ranges::less{}, name);
    const auto twice = std::ranges::adjacent_find(members, std::ranges::equal_to{}, name);
    if (twice != members.end()) return Stop(Format("the key \"{}\" occurs twice", Printable(twice->name)));
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception& reason) override {
    const std::string_view text = reason.what();
    const size_t prefix = text.find("] ");  // "[json.exception.parse_error.101] "
    const std::string_view tail = prefix == std::string_view::npos ? text : text.substr(prefix + 2);
    return Stop(Format("byte {}: {}", position, Printable(tail)));
  }

 private:
  bool Stop(std::string reason) {
    error_ = std::move(reason);
    return false;
  }

  // The place of the next value: the root, the next item of the open array, or the member whose key came last.
  // Null when the limit is reached. Only the innermost open container grows, so pointers in open_ stay valid.
  JsonValue* Add(JsonValue::Kind kind) {
    if (++num_values_ > limits_.max_values) {
      Stop(Format("more than {} values", limits_.max_values));
      return nullptr;
    }
    JsonValue* place = &root_;
    if (!open_.empty()) {
      JsonValue& parent = *open_.back();
      place = parent.is_object() ? &parent.members.back().value : &parent.items.emplace_back();
    }
    place->kind = kind;
    return place;
  }
  bool Open(JsonValue::Kind kind) {
    if (open_.size() >= limits_.max_depth) return Stop(Format("nested deeper than {} levels", limits_.max_depth));
    JsonValue* added = Add(kind);
    if (added == nullptr) return false;
    open_.push_back(added);
    return true;
  }

  const JsonLimits& limits_;
  JsonValue root_;
  std::vector<JsonValue*> open_;
  size_t num_values_ = 0;
  std::string error_;
};

}  // namespace

const JsonValue* JsonValue::Find(std::string_view name) const {
  const auto at = std::ranges::lower_bound(members, name, std::ranges::less{},
                                           [](const JsonMember& member) -> std::string_view { return member.name; });
  return at != members.end() && at->name == name ? &at->value : nullptr;
}

std::string JsonValue::Describe() const {
  switch (kind) {
    case Kind::kNull: return "null";
    case Kind::kBool: return boolean ? "true" : "false";
    case Kind::kInteger: return Format("{}", integer);
    case Kind::kReal: return Format("{}", real);
    case Kind::kText: return Format("\"{}\"", Printable(text));
    case Kind::kArray: return Format("an array of {}", items.size());
    case Kind::kObject: return Format("an object of {}", members.size());
  }
  return "";
}

Result<JsonValue> ParseJson(std::string_view text, std::string_view what, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes) {
    return Invalid("{} has {} bytes of JSON, at most {} are accepted", what, text.size(), limits.max_bytes);
  }
  // nlohmann takes a NUL after the value for the end of its input and would ignore what follows.
  if (const size_t at = text.find('\0'); at != std::string_view::npos) {
    return Invalid("{} is not valid JSON: byte {} is NUL", what, at);
  }
  TreeBuilder builder(limits);
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) {
    return Invalid("{} is not valid JSON: {}", what, builder.error());
  }
  return std::move(builder.root());
}

Result<JsonValue> ReadJsonFile(const std::string& path, const JsonLimits& limits) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, limits.max_bytes));
  return ParseJson(text, path, limits);
}

std::string Printable(std::string_view text) {
  constexpr size_t kMaxBytes = 120;
  size_t length = text.size();
  if (length > kMaxBytes) {
    length = kMaxBytes;
    while (length > 0 && (static_cast<unsigned char>(text[length]) & 0xC0) == 0x80) --length;  // whole characters
  }
  std::string out(text.substr(0, length));
  for (char& c : out) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = '?';
  }
  if (length < text.size()) out += "...";
  return out;
}

}  // namespace tessera
