// The members of a communicator that share this node's memory, and the one thing they do: a round. Each
// member writes its buffer, all meet, each reads the others' buffers. Collectives are made of rounds in
// collectives.cc. Knows nothing of other nodes. Internal to comm/.
//
// Two buffers per member suffice, and no second barrier per round: round s uses buffers[s % 2]. A member
// writes round s + 2 only after it has passed the barrier of round s + 1; nobody arrives there before having
// read what it needs of round s. So when a buffer is written again, all have read it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/net.h"
#include "comm/operation.h"
#include "comm/shared_memory.h"

namespace tessera {

class LocalGroup {
 public:
  struct Member {
    int local_rank = 0;  // in the memory
    int world_rank = 0;  // for messages
  };
  // `members` in the order of the communicator; this one is members[index]. `memory` outlives it.
  LocalGroup(const SharedMemory& memory, int channel, std::vector<Member> members, int index);

  int size() const { return static_cast<int>(members_.size()); }
  int index() const { return index_; }

  // Where this member writes before it meets the others.
  std::span<std::byte> own_data() const;
  std::span<uint64_t> own_sizes() const;  // 2 * size()
  // Returns when all members are here with the same operation. kInvalid: they disagree (all members get that
  // error); kDeadline names who is missing; kUnavailable: the group has broken.
  Status Meet(const Operation& operation, Deadline deadline);
  // What `member` wrote for the round just met; valid until the next Meet. Foreign bytes.
  std::span<const std::byte> Data(int member) const;
  std::span<const uint64_t> Sizes(int member) const;

  // Wakes all members with an error that says why; they never meet again.
  void Break(std::string_view why) const;

 private:
  size_t parity(uint64_t round) const { return round % 2; }
  bool Passed(uint32_t generation) const;
  bool Done(uint32_t generation) const;
  bool Spin();
  void Wait(Deadline deadline);
  Status Missing(const Operation& operation) const;
  Status Compare() const;

  struct SharedMemory::Content& memory_;
  const int channel_;
  const std::vector<Member> members_;
  const int index_;
  struct GroupWords& words_;
  std::chrono::nanoseconds spin_limit_;
  uint64_t round_ = 0;  // rounds met; the next one writes buffers[round_ % 2]
};

}  // namespace tessera
