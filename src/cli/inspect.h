// `tessera inspect`: what a checkpoint is, and what each rank of a layout would hold of it, from its headers
// or from config.json alone. Loads nothing.
#pragma once

#include <span>
#include <string>

#include "base/error.h"
#include "cli/parallel.h"

namespace tessera::cli {

// The text that the command prints. kInvalid is a usage error.
Result<std::string> Inspect(std::span<const std::string> arguments, const Variable& variable);

// Exit code.
int RunInspect(std::span<const std::string> arguments);

}  // namespace tessera::cli
