// `tessera make-random DIR`: a seeded random checkpoint; the writer itself is model/random_checkpoint.h.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

int RunMakeRandom(std::span<const std::string> arguments);

}  // namespace tessera::cli
