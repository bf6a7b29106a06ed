// `tessera collect-env`: the machine and the build, for bug reports. No addresses, names or keys.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

int RunCollectEnv(std::span<const std::string> arguments);

}  // namespace tessera::cli
