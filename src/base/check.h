// CHECK ends the process on a bug, in release builds too, and prints both values. Never on user bytes.
#pragma once

#include <string>

#include "base/format.h"

namespace tessera {

[[noreturn]] void CheckFailed(const char* file, int line, const std::string& what);

}  // namespace tessera

#define CHECK(condition)                                      \
  do {                                                        \
    if (!(condition)) [[unlikely]]                            \
      ::tessera::CheckFailed(__FILE__, __LINE__, #condition); \
  } while (false)
#define CHECK_OP(a, op, b)                                                                              \
  do {                                                                                                  \
    const auto& check_a = (a);                                                                          \
    const auto& check_b = (b);                                                                          \
    if (!(check_a op check_b)) [[unlikely]]                                                             \
      ::tessera::CheckFailed(__FILE__, __LINE__,                                                        \
                             ::fmt::format("{} {} {} ({} against {})", #a, #op, #b, check_a, check_b)); \
  } while (false)
#define CHECK_EQ(a, b) CHECK_OP(a, ==, b)
#define CHECK_NE(a, b) CHECK_OP(a, !=, b)
#define CHECK_LE(a, b) CHECK_OP(a, <=, b)
#define CHECK_LT(a, b) CHECK_OP(a, <, b)
#define CHECK_GE(a, b) CHECK_OP(a, >=, b)
#define CHECK_GT(a, b) CHECK_OP(a, >, b)
