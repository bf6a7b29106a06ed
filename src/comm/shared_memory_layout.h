// What lies where in the memory of a node. Everything in it is foreign: sizes and places are computed from
// what this process knows, never from what it reads there. Internal to shared_memory.cc and local_group.cc.
//
//   MemoryHeader | GroupWords [channel][rank] | RankWords [channel][rank] | RoundHeader [channel][rank][2] |
//   data [channel][rank][2]
//
// A group uses the words that belong to its channel and its lowest local rank: disjoint groups on one channel
// do not meet.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/check.h"
#include "base/memory.h"
#include "comm/operation.h"
#include "comm/shared_memory.h"

namespace tessera {

struct MemoryHeader {
  static constexpr uint64_t kMagic = 0x796D656D72737374;  // "tssrmemy"
  static constexpr uint32_t kVersion = 1;
  uint64_t magic = 0;
  uint32_t version = 0;
  uint32_t num_ranks = 0;
};

// A barrier, and why it broke. `generation` counts rounds in steps of two; its lowest bit says "broken", so
// that breaking it also wakes those who sleep on it.
struct GroupWords {
  static constexpr uint32_t kBroken = 1;
  static constexpr uint32_t kRound = 2;
  enum ReasonState : uint32_t { kNone, kBeingWritten, kWritten };

  alignas(64) std::atomic<uint32_t> arrived;
  alignas(64) std::atomic<uint32_t> generation;
  std::atomic<uint32_t> sleepers;  // upper bound of those in futex wait; a killed one stays counted
  alignas(64) std::atomic<uint32_t> reason_state;
  std::array<char, 508> reason;

  void Break(std::string_view why);
  std::string Reason() const;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free);

struct RankWords {
  alignas(64) std::atomic<uint64_t> round;  // that this rank has arrived at: who is missing, for messages
};

// Of one buffer: what its owner is doing. Behind it lie 2 x num_ranks sizes (AllToAll: sent to each member,
// and expected from each).
struct alignas(64) RoundHeader {
  Operation operation;
};

struct MemoryLayout {
  // Measured: pieces of 128 KiB are slower (more barriers), from 256 KiB on it makes no difference. A rank
  // touches two buffers per channel at most, as far as its arrays need them.
  static constexpr size_t kBufferBytes = size_t{512} << 10;

  explicit MemoryLayout(int num_ranks) : ranks(static_cast<size_t>(num_ranks)) {}

  size_t header_bytes() const { return RoundUp(sizeof(RoundHeader) + 2 * ranks * sizeof(uint64_t), 64); }
  size_t slots() const { return SharedMemory::kNumChannels * ranks; }
  size_t group_words() const { return kPage; }
  size_t rank_words() const { return group_words() + slots() * sizeof(GroupWords); }
  size_t headers() const { return rank_words() + slots() * sizeof(RankWords); }
  size_t buffers() const { return RoundUp(headers() + slots() * 2 * header_bytes(), kPage); }
  size_t total_bytes() const { return buffers() + slots() * 2 * kBufferBytes; }

  static constexpr size_t kPage = 4096;
  size_t ranks;
};

// One mapping; shared by the ranks of a process that are threads, and unmapped by the last of them.
struct Mapping {
  Mapping(std::byte* base, int num_ranks) : base(base), layout(num_ranks) {}
  ~Mapping();
  std::byte* const base;
  const MemoryLayout layout;

  size_t Slot(int channel, int rank) const {
    CHECK(channel >= 0 && channel < SharedMemory::kNumChannels);
    CHECK(rank >= 0 && static_cast<size_t>(rank) < layout.ranks);
    return static_cast<size_t>(channel) * layout.ranks + static_cast<size_t>(rank);
  }
  GroupWords& group(int channel, int rank) const {
    return reinterpret_cast<GroupWords*>(base + layout.group_words())[Slot(channel, rank)];
  }
  RankWords& rank_words(int channel, int rank) const {
    return reinterpret_cast<RankWords*>(base + layout.rank_words())[Slot(channel, rank)];
  }
  RoundHeader& header(int channel, int rank, size_t parity) const {
    return *reinterpret_cast<RoundHeader*>(base + layout.headers() +
                                           (2 * Slot(channel, rank) + parity) * layout.header_bytes());
  }
  std::span<uint64_t> sizes(int channel, int rank, size_t parity) const {
    return {reinterpret_cast<uint64_t*>(&header(channel, rank, parity) + 1), 2 * layout.ranks};
  }
  std::span<std::byte> data(int channel, int rank, size_t parity) const {
    return {base + layout.buffers() + (2 * Slot(channel, rank) + parity) * MemoryLayout::kBufferBytes,
            MemoryLayout::kBufferBytes};
  }
};

struct SharedMemory::Content {
  std::shared_ptr<Mapping> mapping;  // shared: see ForRank
  int local_rank = 0;
  bool spin = false;
};

// Waits while *word == value, until the deadline or a wake; may return early. Wakes reach other processes.
void FutexWait(const std::atomic<uint32_t>& word, uint32_t value,
               std::chrono::steady_clock::time_point deadline);
void FutexWakeAll(const std::atomic<uint32_t>& word);

}  // namespace tessera
