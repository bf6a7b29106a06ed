// See machine.h.
#include "cli/machine.h"

#include <sys/utsname.h>

#include <algorithm>
#include <fstream>

#include "base/format.h"
#include "base/memory.h"
#include "base/threads.h"
#include "cli/json.h"

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

}  // namespace

std::string ProcessorName() {
  return Look("/proc/cpuinfo", "model name");
}

std::string SystemName() {
  return Look("/etc/os-release", "PRETTY_NAME");
}

std::string KernelName() {
  utsname system = {};
  uname(&system);
  return Format("{} {} {}", system.sysname, system.release, system.machine);
}

std::string HugePages() {
  return Look("/sys/kernel/mm/transparent_hugepage/enabled", "");
}

std::string InstructionSets() {
  std::string names;
  for (const auto isa :
       {kernels::Isa::kScalar, kernels::Isa::kAvx2, kernels::Isa::kAvx512, kernels::Isa::kAvx512Bf16}) {
    if (kernels::ForIsa(isa)) names += (names.empty() ? "" : ", ") + std::string(kernels::IsaName(isa));
  }
  return names;
}

std::string ResultHead(std::string_view isa, int num_threads) {
  return Format(
      "\"machine\": {{\"processor\": {}, \"instruction_sets\": {}, \"cores\": {}, \"memory_bytes\": {}, "
      "\"system\": {}, \"kernel\": {}}}, \"version\": {}, \"numerics\": {}, \"isa\": {}, \"threads\": {}",
      JsonQuote(ProcessorName()), JsonQuote(InstructionSets()), AvailableCores(), MemoryLimitBytes(),
      JsonQuote(SystemName()), JsonQuote(KernelName()), JsonQuote(TESSERA_VERSION),
      JsonQuote(kernels::kNumerics), JsonQuote(isa), num_threads);
}

}  // namespace tessera::cli
