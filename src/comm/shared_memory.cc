// Making, checking and breaking the shared memory of a node. What is said through it is local_group.cc's.
#include "comm/shared_memory.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

#include "comm/shared_memory_layout.h"

namespace tessera {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;

std::byte* Map(int descriptor, size_t bytes) {
  void* base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  return base == MAP_FAILED ? nullptr : static_cast<std::byte*>(base);
}

std::unexpected<Error> SystemError(const char* what) {
  return Fail(ErrorKind::kUnavailable, "shared memory of the ranks: {}: {}", what, std::strerror(errno));
}

}  // namespace

void FutexWait(const std::atomic<uint32_t>& word, uint32_t value,
               std::chrono::steady_clock::time_point deadline) {
  const auto since_boot =
      std::max(std::chrono::duration_cast<std::chrono::nanoseconds>(deadline.time_since_epoch()),
               std::chrono::nanoseconds(0))
          .count();
  const timespec until{.tv_sec = since_boot / 1'000'000'000, .tv_nsec = since_boot % 1'000'000'000};
  // Not FUTEX_PRIVATE: the others are processes. BITSET takes an absolute time, of the monotonic clock.
  syscall(SYS_futex, &word, FUTEX_WAIT_BITSET, value, &until, nullptr, FUTEX_BITSET_MATCH_ANY);
}

void FutexWakeAll(const std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void GroupWords::Break(std::string_view why) {
  uint32_t none = kNone;
  if (reason_state.compare_exchange_strong(none, kBeingWritten)) {  // the first one's reason stays
    const size_t size = std::min(why.size(), reason.size() - 1);
    std::memcpy(reason.data(), why.data(), size);
    reason[size] = '\0';
    reason_state.store(kWritten);
  }
  generation.fetch_or(kBroken);
  FutexWakeAll(generation);
}

std::string GroupWords::Reason() const {
  if (reason_state.load() != kWritten) return "the group has broken";
  return {reason.data(), strnlen(reason.data(), reason.size())};
}

Mapping::~Mapping() {
  munmap(base, layout.total_bytes());
}

Result<int> SharedMemory::Create(int num_ranks) {
  if (num_ranks < 1 || num_ranks > kMaxRanks)
    return Invalid("shared memory for {} ranks of a node; 1 to {} are possible", num_ranks, kMaxRanks);
  const size_t bytes = MemoryLayout(num_ranks).total_bytes();
  const int descriptor = memfd_create("tessera-ranks", MFD_ALLOW_SEALING);
  if (descriptor < 0) return SystemError("memfd_create");
  if (ftruncate(descriptor, static_cast<off_t>(bytes)) != 0 || fcntl(descriptor, F_ADD_SEALS, kSeals) != 0) {
    auto error = SystemError("size and seals");
    close(descriptor);
    return error;
  }
  std::byte* base = Map(descriptor, MemoryLayout::kPage);
  if (base == nullptr) {
    auto error = SystemError("mmap");
    close(descriptor);
    return error;
  }
  const MemoryHeader header{MemoryHeader::kMagic, MemoryHeader::kVersion, static_cast<uint32_t>(num_ranks)};
  std::memcpy(base, &header, sizeof(header));
  munmap(base, MemoryLayout::kPage);
  return descriptor;
}

Result<std::unique_ptr<SharedMemory>> SharedMemory::Attach(int descriptor, int local_rank, bool spin) {
  struct stat file{};
  if (fstat(descriptor, &file) != 0) return SystemError("descriptor");
  const int seals = fcntl(descriptor, F_GET_SEALS);
  if (seals < 0 || (seals & kSeals) != kSeals)
    return Invalid("descriptor {} is not the shared memory of ranks: not a memfd sealed against resizing",
                   descriptor);
  MemoryHeader header;
  if (pread(descriptor, &header, sizeof(header), 0) != sizeof(header) || header.magic != MemoryHeader::kMagic)
    return Invalid("descriptor {} is not the shared memory of ranks: no such mark in it", descriptor);
  if (header.version != MemoryHeader::kVersion)
    return Invalid("the shared memory of ranks has version {}, this program version {}", header.version,
                   MemoryHeader::kVersion);
  if (header.num_ranks < 1 || header.num_ranks > kMaxRanks || local_rank < 0 ||
      static_cast<uint32_t>(local_rank) >= header.num_ranks)
    return Invalid("local rank {} in a shared memory of {} ranks", local_rank, header.num_ranks);
  const int num_ranks = static_cast<int>(header.num_ranks);
  const size_t bytes = MemoryLayout(num_ranks).total_bytes();
  if (static_cast<uint64_t>(file.st_size) != bytes)
    return Invalid("the shared memory of {} ranks has {} bytes, wanted {}", num_ranks, file.st_size, bytes);
  std::byte* base = Map(descriptor, bytes);
  if (base == nullptr) return SystemError("mmap");
  return std::unique_ptr<SharedMemory>(new SharedMemory(
      std::make_unique<Content>(Content{std::make_shared<Mapping>(base, num_ranks), local_rank, spin})));
}

SharedMemory::SharedMemory(std::unique_ptr<Content> content) : content_(std::move(content)) {}
SharedMemory::~SharedMemory() = default;

std::unique_ptr<SharedMemory> SharedMemory::ForRank(int local_rank) const {
  CHECK(local_rank >= 0 && local_rank < num_ranks());
  return std::unique_ptr<SharedMemory>(
      new SharedMemory(std::make_unique<Content>(Content{content_->mapping, local_rank, content_->spin})));
}

int SharedMemory::num_ranks() const {
  return static_cast<int>(content_->mapping->layout.ranks);
}
int SharedMemory::local_rank() const {
  return content_->local_rank;
}

void SharedMemory::Abort(std::string_view why) {
  for (int channel = 0; channel < kNumChannels; ++channel)
    for (int rank = 0; rank < num_ranks(); ++rank) content_->mapping->group(channel, rank).Break(why);
}

}  // namespace tessera
