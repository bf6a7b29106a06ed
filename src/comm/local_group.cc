// Rounds of the ranks of one node: a central barrier of two words in shared memory. The last to arrive moves
// the generation and wakes the others.
#include "comm/local_group.h"

#include <algorithm>
#include <utility>

#include "comm/shared_memory_layout.h"

namespace tessera {
namespace {

// How long a waiter spins before it sleeps, where cores are free: at most this. The limit halves when
// spinning was in vain and doubles when it was not, so that ranks which do share a core after all soon sleep
// at once; now and then the full time is tried again.
constexpr auto kLongestSpin = std::chrono::microseconds(50);
constexpr auto kShortestSpin = std::chrono::microseconds(1);
constexpr uint64_t kRoundsPerTrial = 32;
constexpr int kPausesPerLook = 16;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int LowestRank(const std::vector<LocalGroup::Member>& members) {
  int lowest = members.front().local_rank;
  for (const auto& member : members) lowest = std::min(lowest, member.local_rank);
  return lowest;
}

}  // namespace

LocalGroup::LocalGroup(const SharedMemory& memory, int channel, std::vector<Member> members, int index)
    : memory_(*memory.content_),
      channel_(channel),
      members_(std::move(members)),
      index_(index),
      words_(memory_.mapping->group(channel, LowestRank(members_))),
      spin_limit_(kLongestSpin) {}

std::span<std::byte> LocalGroup::own_data() const {
  return memory_.mapping->data(channel_, members_[index_].local_rank, parity(round_));
}
std::span<uint64_t> LocalGroup::own_sizes() const {
  return memory_.mapping->sizes(channel_, members_[index_].local_rank, parity(round_))
      .first(2 * members_.size());
}
std::span<const std::byte> LocalGroup::Data(int member) const {
  return memory_.mapping->data(channel_, members_[member].local_rank, parity(round_ - 1));
}
std::span<const uint64_t> LocalGroup::Sizes(int member) const {
  return memory_.mapping->sizes(channel_, members_[member].local_rank, parity(round_ - 1))
      .first(2 * members_.size());
}

void LocalGroup::Break(std::string_view why) const {
  words_.Break(why);
}

// Whether the generation says that the round now being met is complete.
bool LocalGroup::Passed(uint32_t generation) const {
  const auto before = static_cast<uint32_t>(round_ * GroupWords::kRound);
  return (generation & ~GroupWords::kBroken) != before;
}

bool LocalGroup::Done(uint32_t generation) const {
  return Passed(generation) || (generation & GroupWords::kBroken) != 0;
}

// True when the round is complete or the group broken.
bool LocalGroup::Spin() {
  const auto limit = round_ % kRoundsPerTrial == 0 ? kLongestSpin : spin_limit_;
  const Deadline end = Deadline::clock::now() + limit;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (Done(words_.generation.load(std::memory_order_acquire))) {
        spin_limit_ = std::min<std::chrono::nanoseconds>(2 * limit, kLongestSpin);
        return true;
      }
      Pause();
    }
  } while (Deadline::clock::now() < end);
  spin_limit_ = std::max<std::chrono::nanoseconds>(spin_limit_ / 2, kShortestSpin);
  return false;
}

// Returns when the round is complete, the group broken, or the time over; the caller looks which.
void LocalGroup::Wait(Deadline deadline) {
  if (memory_.spin && Spin()) return;
  // The last to arrive moves the generation before it looks for sleepers, and a sleeper counts itself before
  // it looks at the generation: one of the two sees the other.
  words_.sleepers.fetch_add(1);
  while (true) {
    const uint32_t generation = words_.generation.load();
    if (Done(generation) || Deadline::clock::now() >= deadline) break;
    FutexWait(words_.generation, generation, deadline);
  }
  words_.sleepers.fetch_sub(1);
}

Status LocalGroup::Meet(const Operation& operation, Deadline deadline) {
  const int own_rank = members_[index_].local_rank;
  memory_.mapping->header(channel_, own_rank, parity(round_)).operation = operation;
  memory_.mapping->rank_words(channel_, own_rank).round.store(round_ + 1, std::memory_order_release);
  // Everything written above is published by this, and everything that the others published before is seen.
  const uint32_t arrived = words_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1;
  if (arrived == members_.size()) {
    words_.arrived.store(0, std::memory_order_relaxed);
    words_.generation.fetch_add(GroupWords::kRound);
    if (words_.sleepers.load() != 0) FutexWakeAll(words_.generation);
  } else {
    Wait(deadline);
  }
  const uint32_t generation = words_.generation.load(std::memory_order_acquire);
  if (Passed(generation)) {  // complete, even if broken since: what was written stays as it is
    ++round_;
    return Compare();
  }
  if ((generation & GroupWords::kBroken) != 0)
    return Fail(ErrorKind::kUnavailable, "{} cannot complete: {}", operation.Text(), words_.Reason());
  return Missing(operation);
}

Status LocalGroup::Missing(const Operation& operation) const {
  std::string names;
  for (const Member& member : members_) {
    const RankWords& words = memory_.mapping->rank_words(channel_, member.local_rank);
    if (words.round.load(std::memory_order_acquire) > round_) continue;
    names += (names.empty() ? "" : ", ") + std::to_string(member.world_rank);
  }
  return Fail(ErrorKind::kDeadline, "{}: rank {} did not come in time", operation.Text(),
              names.empty() ? "(unknown)" : names);
}

// Every member compares all headers with the first one's, so all find the same difference.
Status LocalGroup::Compare() const {
  const auto operation_of = [this](const Member& member) -> const Operation& {
    return memory_.mapping->header(channel_, member.local_rank, parity(round_ - 1)).operation;
  };
  const Operation& first = operation_of(members_.front());
  for (const Member& member : members_) {
    const Operation& other = operation_of(member);
    if (other != first)
      return Invalid("{}", MismatchText(members_.front().world_rank, first, member.world_rank, other));
  }
  return {};
}

}  // namespace tessera
