// What can go wrong without being a bug. A user, a file or a peer caused it: it travels as a value.
// Bugs do not come here; they end the process in check.h.
#pragma once

#include <expected>
#include <string>
#include <utility>

#include "base/format.h"

namespace tessera {

enum class ErrorKind {
  kInvalid,      // bad input: HTTP 400, or refusal at start
  kNotFound,     // a name that does not exist: HTTP 404
  kExhausted,    // no room: HTTP 429 or 503
  kDeadline,     // a limit in time ran out
  kUnavailable,  // a rank, link or service is gone: HTTP 503
  kInternal,     // the computation failed (non-finite values): HTTP 500
};

// `message` names the thing, the value seen and the value wanted. `param` is the request field or flag it is
// about, where there is one.
struct Error {
  ErrorKind kind = ErrorKind::kInvalid;
  std::string message;
  std::string param = {};
};

template <typename T>
using Result = std::expected<T, Error>;
using Status = Result<void>;

template <typename... Args>
std::unexpected<Error> Fail(ErrorKind kind, fmt::format_string<Args...> pattern, Args&&... args) {
  return std::unexpected(Error{kind, fmt::format(pattern, std::forward<Args>(args)...)});
}
template <typename... Args>
std::unexpected<Error> Invalid(fmt::format_string<Args...> pattern, Args&&... args) {
  return std::unexpected(Error{ErrorKind::kInvalid, fmt::format(pattern, std::forward<Args>(args)...)});
}

}  // namespace tessera

#define TESSERA_CONCAT_INNER(a, b) a##b
#define TESSERA_CONCAT(a, b) TESSERA_CONCAT_INNER(a, b)

// ASSIGN_OR_RETURN(auto x, F()): x is F()'s value, or the enclosing function returns F()'s error.
#define ASSIGN_OR_RETURN(declaration, expression) \
  ASSIGN_OR_RETURN_INNER(TESSERA_CONCAT(result_, __LINE__), declaration, expression)
#define ASSIGN_OR_RETURN_INNER(result, declaration, expression)   \
  auto result = (expression);                                     \
  if (!result) return std::unexpected(std::move(result).error()); \
  declaration = std::move(*result)
#define RETURN_IF_ERROR(expression)                                                             \
  do {                                                                                          \
    if (auto status = (expression); !status) return std::unexpected(std::move(status).error()); \
  } while (false)
