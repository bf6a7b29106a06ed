// `tessera serve`: options -> engine -> API -> signals -> drain.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

// The exit code: 0 after a drain, 1 when something failed, 2 for a usage error.
int RunServe(std::span<const std::string> arguments);

}  // namespace tessera::cli
