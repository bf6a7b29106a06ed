// Text formatting for every room: libstdc++ 12 has no std::format, so fmt stands in behind one name.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <string>

namespace tessera {

template <typename... Args>
std::string Format(fmt::format_string<Args...> pattern, Args&&... args) {
  return fmt::format(pattern, std::forward<Args>(args)...);
}

}  // namespace tessera
