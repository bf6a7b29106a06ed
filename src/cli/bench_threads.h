// `tessera bench threads`: what a loop over all threads costs beside its tasks.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

int RunBenchThreads(std::span<const std::string> arguments);

}  // namespace tessera::cli
