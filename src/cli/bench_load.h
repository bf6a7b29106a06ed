// `tessera bench load`: time and memory of loading a checkpoint, beside plain reading of the same files.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

int RunBenchLoad(std::span<const std::string> arguments);

}  // namespace tessera::cli
