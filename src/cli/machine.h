// What bug reports and results of benchmarks say of the machine and the build.
#pragma once

#include <string>
#include <string_view>

#include "kernels/kernels.h"

namespace tessera::cli {

std::string ProcessorName();
std::string SystemName();       // of the distribution
std::string KernelName();       // of the operating system
std::string HugePages();        // "always [madvise] never"
std::string InstructionSets();  // of this CPU, joined by ", "

// The members, without braces, that every result of a benchmark has: the machine, the version, the numerics,
// the instruction set ("" for several) and the threads that compute (per rank).
std::string ResultHead(std::string_view isa, int num_threads);

}  // namespace tessera::cli
