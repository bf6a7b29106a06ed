// See collect_env.h.
#include "cli/collect_env.h"

#include <sys/utsname.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "base/format.h"
#include "base/memory.h"
#include "base/threads.h"
#include "cli/assembly.h"
#include "cli/flags.h"
#include "kernels/kernels.h"

namespace tessera::cli {
namespace {

// The value behind `key` in a "key : value" or "key=value" file of the system. Read line by line, since files
// of /proc have no size.
std::string Look(const std::string& path, std::string_view key) {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(key)) continue;
    const size_t begin = std::min(line.find_first_not_of(" \t:=\"", key.size()), line.size());
    return line.substr(begin, line.find('"', begin) - begin);
  }
  return "unknown";
}

std::string InstructionSets() {
  std::string names;
  for (const auto isa :
       {kernels::Isa::kScalar, kernels::Isa::kAvx2, kernels::Isa::kAvx512, kernels::Isa::kAvx512Bf16}) {
    if (kernels::ForIsa(isa)) names += (names.empty() ? "" : ", ") + std::string(kernels::IsaName(isa));
  }
  return names;
}

}  // namespace

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
  utsname system = {};
  uname(&system);
  const auto line = [](std::string_view name, std::string_view value) {
    fmt::print("{:<26}{}\n", name, value);
  };
  line("tessera", TESSERA_VERSION);
  line("numerics", kernels::kNumerics);
  line("compiler", __VERSION__);
  line("system", Look("/etc/os-release", "PRETTY_NAME"));
  line("kernel", Format("{} {} {}", system.sysname, system.release, system.machine));
  line("processor", Look("/proc/cpuinfo", "model name"));
  line("cores to use", Format("{}", AvailableCores()));
  line("instruction sets", InstructionSets());
  line("memory limit", BytesText(MemoryLimitBytes()));
  line("memory available", BytesText(MemoryAvailableBytes()));
  line("huge pages", Look("/sys/kernel/mm/transparent_hugepage/enabled", ""));
  for (const char* name :
       {"TESSERA_ISA", "MINDFORMERS_MODEL_CONFIG", "vLLM_MODEL_BACKEND", "VLLM_MS_MODEL_BACKEND"}) {
    const char* value = std::getenv(name);
    line(name, value == nullptr ? "unset" : value);
  }
  line("VLLM_API_KEY", std::getenv("VLLM_API_KEY") == nullptr ? "unset" : "set");
  return 0;
}

}  // namespace tessera::cli
