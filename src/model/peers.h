// The ranks that one rank computes with: its place in the world and the groups that it exchanges with. In a
// world of one, exchanges do nothing.
#pragma once

#include "comm/communicator.h"
#include "comm/topology.h"

namespace tessera {

struct Peers {
  Topology topology;
  Communicator& world;  // all ranks
  Communicator& group;  // the tensor-parallel ranks of this rank's data-parallel group
};

}  // namespace tessera
