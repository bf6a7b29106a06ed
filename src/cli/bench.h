// `tessera bench kernels|latency|throughput|step|serve|load|threads|comm`.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

int RunBench(std::span<const std::string> arguments);

// Each in its own file. They return the exit status: 2 for usage errors.
int RunBenchKernels(std::span<const std::string> arguments);
int RunBenchLatency(std::span<const std::string> arguments);
int RunBenchThroughput(std::span<const std::string> arguments);
int RunBenchStep(std::span<const std::string> arguments);
int RunBenchServe(std::span<const std::string> arguments);

}  // namespace tessera::cli
