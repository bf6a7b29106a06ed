// See fields.h.
#include "http/fields.h"

#include <algorithm>
#include <cmath>

namespace tessera {
namespace {

constexpr size_t kMaxReportedErrors = 20;

}  // namespace

std::optional<int64_t> ToInteger(const JsonValue& value, std::string& why) {
  if (const int64_t* number = value.AsInt()) return *number;
  if (const double* real = value.AsFloat()) {
    if (std::abs(*real) < 0x1p63 && *real == std::trunc(*real)) return static_cast<int64_t>(*real);
    why = "Input should be a valid integer, got a number with a fractional part";
    if (*real == std::trunc(*real)) why = "Input should be a valid integer of at most 64 bits";
  } else if (value.AsBigInt()) {
    why = "Input should be a valid integer of at most 64 bits";
  } else {
    why = "Input should be a valid integer";
  }
  return std::nullopt;
}

std::optional<double> ToFloat(const JsonValue& value) {
  if (const double* real = value.AsFloat()) return *real;
  if (const int64_t* number = value.AsInt()) return static_cast<double>(*number);
  if (const uint64_t* big = value.AsBigInt()) return static_cast<double>(*big);
  return std::nullopt;
}

const JsonValue* FieldReader::Get(std::string_view name) {
  asked_.push_back(name);
  const JsonValue* value = body_.Find(name);
  return value && !value->is_null() ? value : nullptr;
}

bool FieldReader::Bool(std::string_view name, bool missing) {
  const JsonValue* value = Get(name);
  if (!value) return missing;
  if (const bool* flag = value->AsBool()) return *flag;
  Report(name, "Input should be a valid boolean");
  return missing;
}

std::optional<int64_t> FieldReader::Int(std::string_view name) {
  const JsonValue* value = Get(name);
  if (!value) return std::nullopt;
  std::string why;
  const auto number = ToInteger(*value, why);
  if (!number) Report(name, why);
  return number;
}

std::optional<double> FieldReader::Float(std::string_view name) {
  const JsonValue* value = Get(name);
  if (!value) return std::nullopt;
  const auto number = ToFloat(*value);
  if (!number) Report(name, "Input should be a valid number");
  return number;
}

std::optional<std::string> FieldReader::String(std::string_view name) {
  const JsonValue* value = Get(name);
  if (!value) return std::nullopt;
  if (const std::string* text = value->AsString()) return *text;
  Report(name, "Input should be a valid string");
  return std::nullopt;
}

std::vector<std::string> FieldReader::Strings(std::string_view name) {
  const JsonValue* value = Get(name);
  if (!value) return {};
  if (const std::string* text = value->AsString()) return {*text};
  const JsonArray* items = value->AsArray();
  if (!items) {
    Report(name, "Input should be a valid string or a valid list");
    return {};
  }
  std::vector<std::string> texts;
  for (size_t i = 0; i < items->size(); ++i) {
    if (const std::string* text = (*items)[i].AsString()) {
      texts.push_back(*text);
    } else {
      Report(Format("{}.{}", name, i), "Input should be a valid string");
    }
  }
  return texts;
}

std::vector<int64_t> FieldReader::Ints(std::string_view name) {
  const JsonValue* value = Get(name);
  if (!value) return {};
  const JsonArray* items = value->AsArray();
  if (!items) {
    Report(name, "Input should be a valid list");
    return {};
  }
  std::vector<int64_t> numbers;
  numbers.reserve(items->size());
  std::string why;
  for (size_t i = 0; i < items->size(); ++i) {
    if (const auto number = ToInteger((*items)[i], why)) {
      numbers.push_back(*number);
    } else {
      Report(Format("{}.{}", name, i), why);
    }
  }
  return numbers;
}

const JsonObject* FieldReader::Object(std::string_view name) {
  const JsonValue* value = Get(name);
  if (!value) return nullptr;
  if (const JsonObject* object = value->AsObject()) return object;
  Report(name, "Input should be a valid dictionary");
  return nullptr;
}

void FieldReader::Report(std::string_view name, std::string message) {
  if (errors_.size() < kMaxReportedErrors)
    errors_.push_back({Format("{}.{}", path_, name), std::move(message)});
}

std::optional<ApiError> FieldReader::TypeErrors() const {
  if (errors_.empty()) return std::nullopt;
  std::string message = Format("{} validation error{}:", errors_.size(), errors_.size() == 1 ? "" : "s");
  for (const FieldError& error : errors_) message += Format("\n  {}: {}", error.path, error.message);
  return ApiError{.type = "Bad Request", .message = std::move(message), .param = errors_.front().path};
}

std::vector<std::string> FieldReader::UnknownNames() const {
  std::vector<std::string> names;
  const JsonObject* members = body_.AsObject();
  for (const JsonMember& member : *members) {
    if (names.size() >= 8) break;
    const bool plain =
        member.key.size() <= 40 && std::all_of(member.key.begin(), member.key.end(), [](char c) {
          return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
        });
    if (plain && std::find(asked_.begin(), asked_.end(), member.key) == asked_.end())
      names.push_back(member.key);
  }
  return names;
}

}  // namespace tessera
