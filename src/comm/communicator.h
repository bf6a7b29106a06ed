// THE FACE of comm/: ranks exchange arrays. Sums are int64, so that the result does not depend on the order
// or on who adds (docs/numerics.md, "Fixed point").
//
// Ranks of one node (one node agent's children) talk through shared memory, ranks of different nodes through
// TCP; a group may span both. Reductions are hierarchical: a node adds first, then each rank gets the sums of
// the other nodes for its own part. Every member calls the same operations in the same order with matching
// sizes; what does not match is an error that names both values. Every wait has a deadline. After an error a
// communicator is broken: every later call fails too.
//
// One thread calls. Collectives return when the result is complete here; buffers may then be reused.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace tessera {

enum class Collective { kAllReduce, kReduceScatter, kAllGather, kAllToAll, kBroadcast, kBarrier };
inline constexpr int kNumCollectives = 6;
std::string_view CollectiveName(Collective collective);  // "all_reduce", ...

// What one rank has done, over all of its communicators.
struct CollectiveCounts {
  uint64_t calls = 0;
  uint64_t bytes = 0;       // payload handed to other ranks
  uint64_t wire_bytes = 0;  // of that, what went over TCP, packed
};
using CommunicatorCounts = std::array<CollectiveCounts, kNumCollectives>;

class SharedMemory;  // shared_memory.h
class TcpMesh;       // tcp_mesh.h

// The links of one rank to all others; outlives the communicators.
struct WorldLinks {
  int rank = 0;
  std::vector<int> node_of_rank;   // [world]: ranks with equal numbers share memory
  SharedMemory* memory = nullptr;  // null where the node has one rank
  TcpMesh* mesh = nullptr;         // null where there is one node
  std::chrono::milliseconds deadline{std::chrono::minutes(5)};  // of every wait
};

class Communicator {
 public:
  static std::unique_ptr<Communicator> Alone();  // a group of one
  // The group of all ranks. Collective: returns when all are here.
  static Result<std::unique_ptr<Communicator>> Create(const WorldLinks& links);
  ~Communicator();

  int rank() const;  // in this group
  int size() const;

  // values := the sum over all members, element by element.
  Status AllReduce(std::span<int64_t> values);
  // `values` holds one part per member, counts[i] elements for member i, back to back; own := the sum of this
  // member's part. `own` may lie inside `values`.
  Status ReduceScatter(std::span<const int64_t> values, std::span<const int64_t> counts,
                       std::span<int64_t> own);
  // all := every member's bytes, sizes[i] of member i, back to back. `own` may be its place inside `all`.
  Status AllGather(std::span<const std::byte> own, std::span<const int64_t> sizes, std::span<std::byte> all);
  // Sends send_sizes[i] bytes to member i and receives receive_sizes[i] from it; both back to back. The
  // receiver's size must be the sender's.
  Status AllToAll(std::span<const std::byte> send, std::span<const int64_t> send_sizes,
                  std::span<std::byte> receive, std::span<const int64_t> receive_sizes);
  // bytes := the root's bytes.
  Status Broadcast(std::span<std::byte> bytes, int root);
  Status Barrier();
  // Groups of the members that give the same color, ordered by (key, rank).
  Result<std::unique_ptr<Communicator>> Split(int color, int key);

  // Shared by all communicators split from one world. Any thread.
  CommunicatorCounts Counts() const;

 private:
  struct Content;
  explicit Communicator(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
