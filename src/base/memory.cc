// Anonymous mappings, and the limits that the kernel and its cgroups set.
#include "base/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>

#include "base/check.h"

namespace tessera {
namespace {

constexpr size_t kAlignBytes = 64;

// "max" and missing files mean no limit.
std::optional<uint64_t> ReadNumber(const std::string& path) {
  std::ifstream file(path);
  uint64_t value = 0;
  if (!(file >> value)) return std::nullopt;
  return value;
}

struct CgroupMemory {
  uint64_t limit = UINT64_MAX;
  uint64_t used = 0;
};

// The tightest limit on the way from this process's cgroup to the root.
CgroupMemory TightestCgroup() {
  CgroupMemory tightest;
  std::ifstream file("/proc/self/cgroup");
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);
    const bool v2 = controllers.empty();
    if (!v2 && controllers.find("memory") == std::string::npos) continue;
    const std::string root = v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/memory";
    while (true) {
      const std::string folder = root + (path == "/" ? "" : path);
      const auto limit = ReadNumber(folder + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
      const auto used = ReadNumber(folder + (v2 ? "/memory.current" : "/memory.usage_in_bytes"));
      if (limit && *limit < tightest.limit) tightest = {*limit, used.value_or(0)};
      if (path.empty() || path == "/") break;
      path = path.substr(0, path.rfind('/'));
    }
  }
  return tightest;
}

uint64_t MeminfoBytes(std::string_view key) {
  std::ifstream file("/proc/meminfo");
  std::string name;
  uint64_t kib = 0;
  for (std::string unit; file >> name >> kib; std::getline(file, unit)) {
    if (name == key) return kib * 1024;
  }
  return 0;
}

}  // namespace

Result<Arena> Arena::Allocate(size_t size_bytes) {
  Arena arena;
  if (size_bytes == 0) return arena;
  const size_t huge = size_t{2} << 20;
  const size_t size = RoundUp(size_bytes, size_bytes >= huge ? huge : 4096);
  void* base =
      mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    return Fail(ErrorKind::kExhausted, "cannot reserve {} bytes of memory: the system refused", size);
  }
  madvise(base, size, MADV_HUGEPAGE);  // a hint: refusal is harmless
  arena.base_ = static_cast<std::byte*>(base);
  arena.size_ = size;
  return arena;
}

Arena Arena::AllocateOrDie(size_t size_bytes) {
  Result<Arena> arena = Allocate(size_bytes);
  CHECK(arena.has_value());
  return std::move(*arena);
}

Arena::~Arena() {
  if (base_ != nullptr) munmap(base_, size_);
}

std::byte* Arena::Take(size_t size_bytes) {
  const size_t at = RoundUp(taken_, kAlignBytes);
  CHECK_LE(at + size_bytes, size_);
  taken_ = at + size_bytes;
  return base_ + at;
}

uint64_t MemoryLimitBytes() {
  return std::min(MeminfoBytes("MemTotal:"), TightestCgroup().limit);
}

uint64_t MemoryAvailableBytes() {
  const CgroupMemory cgroup = TightestCgroup();
  const uint64_t headroom =
      cgroup.limit == UINT64_MAX ? UINT64_MAX : cgroup.limit - std::min(cgroup.limit, cgroup.used);
  return std::min(MeminfoBytes("MemAvailable:"), headroom);
}

uint64_t ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  uint64_t total = 0;
  uint64_t resident = 0;
  file >> total >> resident;
  return resident * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
}

}  // namespace tessera
