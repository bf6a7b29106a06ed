// The binary `tessera`: picks the subcommand. Nothing else happens here.
#include <cstdio>
#include <string>
#include <vector>

#include "base/format.h"
#include "cli/bench.h"
#include "cli/chat.h"
#include "cli/collect_env.h"
#include "cli/inspect.h"
#include "cli/make_random.h"
#include "cli/serve.h"
#include "cluster/rank_process.h"

namespace {

struct Command {
  const char* name;
  const char* help;
  int (*run)(std::span<const std::string> arguments);
};

constexpr Command kCommands[] = {
    {"serve", "serve a checkpoint over the OpenAI API", tessera::cli::RunServe},
    {"chat", "talk with a running server", tessera::cli::RunChat},
    {"complete", "complete texts on a running server", tessera::cli::RunComplete},
    {"bench", "measure kernels, the engine or a server", tessera::cli::RunBench},
    {"inspect", "show a checkpoint, or what each rank of a layout holds of it", tessera::cli::RunInspect},
    {"make-random", "write a random checkpoint of any dimensions", tessera::cli::RunMakeRandom},
    {"collect-env", "print what a bug report needs", tessera::cli::RunCollectEnv},
};

void PrintUsage(FILE* out) {
  fmt::print(out, "usage: tessera COMMAND [flags]\n\n");
  for (const Command& command : kCommands) fmt::print(out, "  {:<14}{}\n", command.name, command.help);
  fmt::print(out, "\n`tessera COMMAND --help` shows the flags of one; `tessera --version` the version.\n");
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  if (arguments.empty()) {
    PrintUsage(stderr);
    return 2;
  }
  if (arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
    PrintUsage(stdout);
    return 0;
  }
  if (arguments[0] == "--version" || arguments[0] == "-v") {
    fmt::print("tessera {}\n", TESSERA_VERSION);
    return 0;
  }
  // What a node agent starts; people have no use for it.
  if (arguments[0] == "rank") return tessera::RunRankProcess();
  for (const Command& command : kCommands) {
    if (arguments[0] == command.name) return command.run(std::span(arguments).subspan(1));
  }
  fmt::print(stderr, "tessera: unknown command '{}'\n\n", arguments[0]);
  PrintUsage(stderr);
  return 2;
}
