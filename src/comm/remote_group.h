// The members of a communicator that other nodes hold, and the one thing they do: an exchange, in which each
// sends at most one array to each other and receives at most one from it. All links move together, so no
// order of sends and receives can lock. Internal to comm/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/net.h"
#include "comm/operation.h"
#include "comm/tcp_mesh.h"

namespace tessera {

struct Outgoing {
  int member = 0;
  std::span<const std::byte> bytes;
};
struct Incoming {
  int member = 0;
  std::span<std::byte> bytes;
};
struct OutgoingSums {
  int member = 0;
  std::span<const int64_t> values;
};

class RemoteGroup {
 public:
  // world_ranks[i]: rank of member i in the mesh. `mesh` outlives it.
  RemoteGroup(TcpMesh& mesh, int channel, std::vector<int> world_ranks);

  // Returns when all has been handed to the system and all has come. A sender's size must be the receiver's.
  // kInvalid: the sides disagree; kDeadline names who is late; kUnavailable names who is gone.
  Status Exchange(const Operation& operation, std::span<const Outgoing> outgoing,
                  std::span<const Incoming> incoming, Deadline deadline);
  // The same with packed integers: `sums` += the array that each of `from` sends.
  Status ExchangeSums(const Operation& operation, std::span<const OutgoingSums> outgoing,
                      std::span<const int> from, std::span<int64_t> sums, Deadline deadline);

  // Bytes given to the system, frame headers included.
  uint64_t wire_bytes() const { return wire_bytes_; }
  // Tells the other members why, as far as the links take it, and ends the links.
  void Break(std::string_view why) const;

 private:
  struct Transfer;
  struct Bystander;
  Transfer& TransferOf(const Operation& operation, int member, std::vector<Transfer>& transfers);
  Status Run(const Operation& operation, std::span<Transfer> transfers, Deadline deadline);
  Status MoveAll(const Operation& operation, std::span<Transfer> transfers, Deadline deadline);
  Result<bool> Send(Transfer& transfer);
  Result<bool> Receive(Transfer& transfer);
  std::vector<Bystander> BystandersOf(std::span<const Transfer> transfers) const;
  Result<bool> Look(const Operation& operation, const Bystander& bystander) const;
  Status CheckHeader(Transfer& transfer) const;

  struct TcpMesh::Content& mesh_;
  const int channel_;
  const std::vector<int> world_ranks_;
  uint64_t wire_bytes_ = 0;
  std::vector<std::vector<std::byte>> packed_;  // kept between calls for their memory
};

}  // namespace tessera
