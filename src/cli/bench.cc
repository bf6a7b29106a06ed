// The list of benchmarks; each has a file of its own.
#include "cli/bench.h"

#include <cstdio>

#include "base/format.h"
#include "cli/bench_comm.h"
#include "cli/bench_load.h"
#include "cli/bench_threads.h"

namespace tessera::cli {
namespace {

struct Bench {
  const char* name;
  const char* help;
  int (*run)(std::span<const std::string> arguments);
};
constexpr Bench kBenches[] = {
    {"kernels", "speed of every kernel, over the machine's peaks and over its reference", RunBenchKernels},
    {"latency", "time of one batch in this process", RunBenchLatency},
    {"throughput", "tokens per second of many requests in this process", RunBenchThroughput},
    {"step", "time of one forward pass of a given shape", RunBenchStep},
    {"serve", "load on a running server", RunBenchServe},
    {"load", "time and memory of loading a checkpoint", RunBenchLoad},
    {"threads", "what a loop over threads costs beside its tasks", RunBenchThreads},
    {"comm", "time of each collective between processes", RunBenchComm},
};

}  // namespace

int RunBench(std::span<const std::string> arguments) {
  for (const Bench& bench : kBenches) {
    if (!arguments.empty() && arguments[0] == bench.name) return bench.run(arguments.subspan(1));
  }
  const bool help = !arguments.empty() && (arguments[0] == "--help" || arguments[0] == "-h");
  FILE* out = help ? stdout : stderr;
  if (!help && !arguments.empty()) fmt::print(out, "tessera bench: unknown benchmark '{}'\n\n", arguments[0]);
  fmt::print(out, "usage: tessera bench BENCHMARK [flags]\n\n");
  for (const Bench& bench : kBenches) fmt::print(out, "  {:<14}{}\n", bench.name, bench.help);
  return help ? 0 : 2;
}

}  // namespace tessera::cli
