// Reads the fields of one JSON object with the types the API documents. Type errors are collected and
// reported together, in the words that clients of this API match. Ranges are the caller's business.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "http/openai.h"

namespace tessera {

class FieldReader {
 public:
  // `body` is an object and outlives the reader. `path` is its dotted path, such as "body".
  FieldReader(const JsonValue& body, std::string path) : body_(body), path_(std::move(path)) {}

  // Null when the field is absent or JSON null.
  const JsonValue* Get(std::string_view name);
  bool Has(std::string_view name) { return Get(name) != nullptr; }
  bool Bool(std::string_view name, bool missing);
  std::optional<int64_t> Int(std::string_view name);
  std::optional<double> Float(std::string_view name);
  std::optional<std::string> String(std::string_view name);
  // One string or a list of strings.
  std::vector<std::string> Strings(std::string_view name);
  std::vector<int64_t> Ints(std::string_view name);
  const JsonObject* Object(std::string_view name);

  void Report(std::string_view name, std::string message);
  void Missing(std::string_view name) { Report(name, "Field required"); }
  // "N validation error(s):" and one line each; nothing when there is none.
  std::optional<ApiError> TypeErrors() const;
  // Names that nobody asked for; for the log, at most a few, and only if they look like names.
  std::vector<std::string> UnknownNames() const;

 private:
  struct FieldError {
    std::string path;
    std::string message;
  };
  const JsonValue& body_;
  const std::string path_;
  std::vector<FieldError> errors_;
  std::vector<std::string_view> asked_;
};

// An integer as JSON may write it (7, 7.0); null with `why` set otherwise.
std::optional<int64_t> ToInteger(const JsonValue& value, std::string& why);
std::optional<double> ToFloat(const JsonValue& value);

}  // namespace tessera
