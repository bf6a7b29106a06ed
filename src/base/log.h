// Log lines on stderr: "2026-01-31 12:00:00.123 I text". Thread-safe. spdlog stays in log.cc.
// Never log request text.
#pragma once

#include <string_view>

#include "base/format.h"

namespace tessera {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

void SetLogLevel(LogLevel level);
void LogLine(LogLevel level, std::string_view text);

template <typename... Args>
void LogDebug(fmt::format_string<Args...> pattern, Args&&... args) {
  LogLine(LogLevel::kDebug, fmt::format(pattern, std::forward<Args>(args)...));
}
template <typename... Args>
void LogInfo(fmt::format_string<Args...> pattern, Args&&... args) {
  LogLine(LogLevel::kInfo, fmt::format(pattern, std::forward<Args>(args)...));
}
template <typename... Args>
void LogWarning(fmt::format_string<Args...> pattern, Args&&... args) {
  LogLine(LogLevel::kWarning, fmt::format(pattern, std::forward<Args>(args)...));
}
template <typename... Args>
void LogError(fmt::format_string<Args...> pattern, Args&&... args) {
  LogLine(LogLevel::kError, fmt::format(pattern, std::forward<Args>(args)...));
}

}  // namespace tessera
