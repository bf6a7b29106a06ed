// `tessera bench comm`: time of each collective between ranks that are processes of this machine.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

int RunBenchComm(std::span<const std::string> arguments);

}  // namespace tessera::cli
