// A world whose ranks are threads of this process, with the real links: shared memory within a node, TCP over
// loopback between nodes. For tests and benchmarks; the product starts processes.
#pragma once

#include <unistd.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "comm/communicator.h"
#include "comm/shared_memory.h"
#include "comm/tcp_mesh.h"

namespace tessera {

// The links of all ranks, before any rank runs. node_of_rank[i]: node of rank i.
class ThreadWorld {
 public:
  explicit ThreadWorld(std::vector<int> node_of_rank,
                       std::chrono::milliseconds deadline = std::chrono::seconds(30), bool spin = false)
      : deadline_(deadline), node_of_rank_(std::move(node_of_rank)), ranks_(node_of_rank_.size()) {
    std::map<int, std::vector<int>> nodes;
    for (int rank = 0; rank < size(); ++rank) nodes[node_of_rank_[rank]].push_back(rank);
    for (const auto& [node, ranks] : nodes) {
      if (ranks.size() == 1) continue;
      const auto descriptor = SharedMemory::Create(static_cast<int>(ranks.size()));
      CHECK(descriptor.has_value());
      // One mapping for all: so ThreadSanitizer sees both sides of every exchange.
      auto memory = SharedMemory::Attach(*descriptor, 0, spin);
      CHECK(memory.has_value());
      close(*descriptor);
      for (size_t i = 1; i < ranks.size(); ++i)
        ranks_[ranks[i]].memory = (*memory)->ForRank(static_cast<int>(i));
      ranks_[ranks[0]].memory = std::move(*memory);
    }
    if (nodes.size() == 1) return;
    for (Rank& rank : ranks_) {
      auto listener = Listen({"127.0.0.1", 0});
      CHECK(listener.has_value());
      rank.listener = std::move(*listener);
      addresses_.push_back(LocalEndpoint(rank.listener)->Text());
    }
  }

  int size() const { return static_cast<int>(node_of_rank_.size()); }
  const std::vector<int>& node_of_rank() const { return node_of_rank_; }
  const std::vector<std::string>& addresses() const { return addresses_; }
  const Socket& listener(int rank) const { return ranks_[rank].listener; }
  SharedMemory* memory(int rank) const { return ranks_[rank].memory.get(); }
  TcpMesh* mesh(int rank) const { return ranks_[rank].mesh.get(); }  // once Join has returned

  // Makes the links of `rank` and its communicator; called by the thread (or forked process) of every rank.
  Result<std::unique_ptr<Communicator>> Join(int rank) {
    Rank& own = ranks_[rank];
    if (!addresses_.empty()) {
      const MeshOptions options{
          .rank = rank, .node_of_rank = node_of_rank_, .addresses = addresses_, .secret = "s", .epoch = 7};
      ASSIGN_OR_RETURN(own.mesh, TcpMesh::Connect(own.listener, options, After(deadline_)));
    }
    return Communicator::Create({.rank = rank,
                                 .node_of_rank = node_of_rank_,
                                 .memory = own.memory.get(),
                                 .mesh = own.mesh.get(),
                                 .deadline = deadline_});
  }
  // One thread per rank: joins, then runs body(communicator). What Join says of each rank comes back.
  std::vector<Status> Run(const std::function<void(Communicator&)>& body) {
    std::vector<Status> results(node_of_rank_.size());
    std::vector<std::jthread> threads;
    for (int rank = 0; rank < size(); ++rank) {
      threads.emplace_back([this, rank, &body, &results] {
        auto communicator = Join(rank);
        if (communicator)
          body(**communicator);
        else
          results[rank] = std::unexpected(communicator.error());
      });
    }
    threads.clear();
    return results;
  }

 private:
  struct Rank {
    std::unique_ptr<SharedMemory> memory;
    std::unique_ptr<TcpMesh> mesh;
    Socket listener;
  };
  const std::chrono::milliseconds deadline_;
  const std::vector<int> node_of_rank_;
  std::vector<Rank> ranks_;
  std::vector<std::string> addresses_;
};

}  // namespace tessera
