// `tessera bench kernels|latency|throughput|serve|load|comm`.
#pragma once

#include <span>
#include <string>

namespace tessera::cli {

int RunBench(std::span<const std::string> arguments);
// bench serve: load on a running server over HTTP (bench_serve.cc).
int RunBenchServe(std::span<const std::string> arguments);

}  // namespace tessera::cli
