// `tessera chat` and `tessera complete`: talk to a running server from a terminal.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

// Exit codes: 0, 1 when the server failed or is not there, 2 for a usage error.
int RunChat(std::span<const std::string> arguments);
int RunComplete(std::span<const std::string> arguments);

}  // namespace tessera::cli
