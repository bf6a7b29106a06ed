// How the collectives of one group are made of rounds in shared memory and exchanges over TCP. Pure sequence:
// no numbering, counting or breaking, which are communicator.cc's. Internal to comm/.
//
// Work is spread over the members of a node: what node A has for member j of another node is added up and
// sent by one member of A, j's *carrier* there; and what j has for node A travels once, to the same carrier.
// A local member is its own carrier.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "base/error.h"
#include "base/net.h"
#include "comm/local_group.h"
#include "comm/operation.h"
#include "comm/remote_group.h"

namespace tessera {

// Which members share a node; pure.
class Places {
 public:
  // node_of[i]: node of member i; `rank` is this one.
  Places(int rank, const std::vector<int>& node_of);

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(node_of_.size()); }
  int num_nodes() const { return static_cast<int>(nodes_.size()); }
  int own_node() const { return node_of_[rank_]; }
  const std::vector<int>& members(int node) const { return nodes_[node]; }
  const std::vector<int>& local() const { return nodes_[own_node()]; }
  int local_index() const { return local_index_[rank_]; }
  int smallest_node() const;  // number of members of it
  bool IsLocal(int member) const { return node_of_[member] == own_node(); }
  // The member of `node` that stands for `member` there.
  int Carrier(int member, int node) const;
  // For whom the local member with this index is the carrier here, ascending: itself, and members of other
  // nodes.
  const std::vector<int>& carried(int local_index) const { return carried_[local_index]; }
  // Likewise on this node.
  int Carrier(int member) const { return Carrier(member, own_node()); }

 private:
  int rank_;
  std::vector<int> node_of_;               // numbered from 0 in the order of first members
  std::vector<std::vector<int>> nodes_;    // members of each, ascending
  std::vector<int> local_index_;           // of every member in its node
  std::vector<std::vector<int>> carried_;  // [local index]
};

class Collectives {
 public:
  Collectives(Places places, std::optional<LocalGroup> local, std::optional<RemoteGroup> remote);

  // As in communicator.h; the caller has checked sizes against each other.
  Status AllReduce(const Operation& operation, std::span<int64_t> values, Deadline deadline);
  Status ReduceScatter(const Operation& operation, std::span<const int64_t> values,
                       std::span<const int64_t> counts, std::span<int64_t> own, Deadline deadline);
  Status AllGather(const Operation& operation, std::span<const std::byte> own, std::span<const int64_t> sizes,
                   std::span<std::byte> all, Deadline deadline);
  Status AllToAll(const Operation& operation, std::span<const std::byte> send,
                  std::span<const int64_t> send_sizes, std::span<std::byte> receive,
                  std::span<const int64_t> receive_sizes, Deadline deadline);
  Status Broadcast(const Operation& operation, std::span<std::byte> bytes, int root, Deadline deadline);
  Status Barrier(const Operation& operation, Deadline deadline);

  void Break(std::string_view why) const;
  const Places& places() const { return places_; }
  uint64_t payload_bytes() const { return payload_bytes_; }  // handed to other ranks so far
  uint64_t wire_bytes() const { return remote_ ? remote_->wire_bytes() : 0; }

 private:
  // How an array is cut for the work of one node.
  struct Cut {
    std::vector<int64_t> sizes, offsets;  // of each part
    std::vector<std::vector<int>>
        parts_of;  // [local index]: those that this member adds up, or shows to the others
  };
  Cut CutByCarrier(std::span<const int64_t> sizes) const;

  Status AllReduceAtOnce(const Operation& operation, std::span<int64_t> values, Deadline deadline);
  Status AllReduceByNode(const Operation& operation, std::span<int64_t> values, Deadline deadline);
  Status AllReduceByMember(const Operation& operation, std::span<int64_t> values, Deadline deadline);
  Status AddLocally(const Operation& operation, std::span<const int64_t> values, const Cut& cut,
                    std::span<int64_t* const> sums, Deadline deadline);
  Status ExchangeBlocks(const Operation& operation, std::span<const int64_t> sizes, std::span<std::byte> all,
                        Deadline deadline);
  Status ShareBlocks(const Operation& operation, const Cut& cut, std::span<std::byte> all, Deadline deadline);
  Status SwapLocally(const Operation& operation, std::span<const std::byte> send,
                     std::span<const int64_t> send_sizes, std::span<std::byte> receive,
                     std::span<const int64_t> receive_sizes, Deadline deadline);
  Result<int64_t> LargestSwap(const Operation& operation) const;
  void Publish(std::span<const std::byte> bytes, size_t offset);

  const Places places_;
  std::optional<LocalGroup> local_;    // where this node has several members
  std::optional<RemoteGroup> remote_;  // where there are several nodes
  uint64_t payload_bytes_ = 0;
  std::vector<int64_t> sums_;  // of this node for those members of others that this one carries, back to back
};

}  // namespace tessera
