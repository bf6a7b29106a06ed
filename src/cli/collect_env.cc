// See collect_env.h.
#include "cli/collect_env.h"

#include <cstdio>
#include <cstdlib>

#include "base/format.h"
#include "base/memory.h"
#include "base/threads.h"
#include "cli/assembly.h"
#include "cli/flags.h"
#include "cli/machine.h"
#include "kernels/kernels.h"

namespace tessera::cli {
int RunCollectEnv(std::span<const std::string> arguments) {
  const FlagTable table{
      .command = "tessera collect-env", .summary = "Prints what a bug report needs.", .flags = {}};
  const auto parsed = ParseFlags(table, arguments);
  if (!parsed) {
    fmt::print(stderr, "tessera collect-env: {}\n", parsed.error().message);
    return 2;
  }
  if (parsed->help) {
    fmt::print("{}", HelpText(table));
    return 0;
  }
  const auto line = [](std::string_view name, std::string_view value) {
    fmt::print("{:<26}{}\n", name, value);
  };
  line("tessera", TESSERA_VERSION);
  line("numerics", kernels::kNumerics);
  line("compiler", __VERSION__);
  line("system", SystemName());
  line("kernel", KernelName());
  line("processor", ProcessorName());
  line("cores to use", Format("{}", AvailableCores()));
  line("instruction sets", InstructionSets());
  line("memory limit", BytesText(MemoryLimitBytes()));
  line("memory available", BytesText(MemoryAvailableBytes()));
  line("huge pages", HugePages());
  for (const char* name :
       {"TESSERA_ISA", "MINDFORMERS_MODEL_CONFIG", "vLLM_MODEL_BACKEND", "VLLM_MS_MODEL_BACKEND"}) {
    const char* value = std::getenv(name);
    line(name, value == nullptr ? "unset" : value);
  }
  line("VLLM_API_KEY", std::getenv("VLLM_API_KEY") == nullptr ? "unset" : "set");
  return 0;
}

}  // namespace tessera::cli
