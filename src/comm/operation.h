// What one call of a collective is: all members must be at the same one. Travels in the headers of shared
// memory and of TCP frames. Internal to comm/.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "comm/communicator.h"

namespace tessera {

struct Operation {
  uint64_t sequence = 0;    // of the communicator, from 1
  uint32_t collective = 0;  // a Collective
  int32_t root = -1;        // of a broadcast
  uint64_t bytes = 0;       // size of the whole array, where members must agree on it
  uint64_t sizes_hash = 0;  // of the sizes of its parts, likewise

  bool operator==(const Operation&) const = default;
  // "all_gather #17 of 4096 bytes". Any bytes may stand in a foreign one.
  std::string Text() const;
};

// FNV-1a over the numbers: equal lists have equal hashes; used to find mistakes, not attackers.
uint64_t HashSizes(std::span<const int64_t> sizes);

// "rank 3 is at all_gather #17 of 4096 bytes, rank 1 at all_reduce #17 of 512 bytes".
std::string MismatchText(int rank_a, const Operation& a, int rank_b, const Operation& b);

}  // namespace tessera
