// TCP links from one rank to all ranks of other nodes, made once, authenticated by the cluster secret.
// Frames: magic, epoch, channel, sequence, operation, bytes; int64 arrays travel packed without loss.
// Internal to comm/ but for Connect and Abort.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/net.h"

namespace tessera {

struct MeshOptions {
  int rank = 0;
  std::vector<int> node_of_rank;
  std::vector<std::string> addresses;  // [world]: "address:port" where each rank listens; own node's unused
  std::string secret;                  // may be empty
  uint64_t epoch = 0;                  // a peer with another one is refused
};

class TcpMesh {
 public:
  // Connects to every rank of a lower number on another node, again and again while nobody listens there, and
  // accepts the higher ones on `listener`. A stranger, or a peer of another epoch or world, is turned away
  // with a line in the log and does not end it; being turned away does (kInvalid, both values). kDeadline
  // names the ranks that did not come.
  static Result<std::unique_ptr<TcpMesh>> Connect(const Socket& listener, const MeshOptions& options,
                                                  Deadline deadline);
  ~TcpMesh();
  // Wakes a waiting collective with an error, here and at the peers. Any thread.
  void Abort();

 private:
  friend class RemoteGroup;
  struct Content;
  explicit TcpMesh(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
