// The face: numbers the operations, checks what the caller gives, counts, and remembers an error for ever.
// The work is done by collectives.cc.
#include "comm/communicator.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "base/check.h"
#include "comm/collectives.h"
#include "comm/shared_memory.h"
#include "comm/tcp_frames.h"

namespace tessera {
namespace {

struct AtomicCounts {
  std::atomic<uint64_t> calls = 0, bytes = 0, wire_bytes = 0;
};

// Of one rank.
struct World {
  WorldLinks links;
  int next_channel = 0;  // the first that no communicator of this rank has used
  std::array<AtomicCounts, kNumCollectives> counts;
};

int64_t SumOf(std::span<const int64_t> sizes) {
  int64_t sum = 0;
  for (const int64_t size : sizes) {
    CHECK(size >= 0);
    sum += size;
  }
  return sum;
}

// The group of these ranks; `index` is this one.
Collectives MakeCollectives(const WorldLinks& links, int channel, const std::vector<int>& world_ranks,
                            int index) {
  std::vector<int> node_of;
  for (const int rank : world_ranks) node_of.push_back(links.node_of_rank[rank]);
  Places places(index, node_of);
  std::optional<LocalGroup> local;
  std::optional<RemoteGroup> remote;
  if (places.local().size() > 1) {
    std::vector<LocalGroup::Member> members;
    for (const int member : places.local()) {
      const int rank = world_ranks[member];
      const auto before = links.node_of_rank.begin() + rank;
      const auto local_rank = std::count(links.node_of_rank.begin(), before, links.node_of_rank[rank]);
      members.push_back({static_cast<int>(local_rank), rank});
    }
    local.emplace(*links.memory, channel, std::move(members), places.local_index());
  }
  if (places.num_nodes() > 1) remote.emplace(*links.mesh, channel, world_ranks);
  return {std::move(places), std::move(local), std::move(remote)};
}

Status CheckLinks(const WorldLinks& links) {
  const auto world = static_cast<int>(links.node_of_rank.size());
  if (links.rank < 0 || links.rank >= world)
    return Invalid("rank {} in a world of {} ranks", links.rank, world);
  const auto own = links.node_of_rank.begin() + links.rank;
  const auto on_node = std::count(links.node_of_rank.begin(), links.node_of_rank.end(), *own);
  const auto local_rank = std::count(links.node_of_rank.begin(), own, *own);
  if (on_node > 1 && (links.memory == nullptr || links.memory->num_ranks() != on_node ||
                      links.memory->local_rank() != local_rank))
    return links.memory == nullptr
               ? Invalid("rank {} shares its node with {} others and has no shared memory", links.rank,
                         on_node - 1)
               : Invalid("rank {} is {} of {} ranks of its node, its shared memory is made for rank {} of {}",
                         links.rank, local_rank, on_node, links.memory->local_rank(),
                         links.memory->num_ranks());
  if (on_node < world && links.mesh == nullptr)
    return Invalid("rank {} has {} ranks on other nodes and no links to them", links.rank, world - on_node);
  return {};
}

}  // namespace

struct Communicator::Content {
  // Shared by the communicators split from one world, which may end in any order.
  std::shared_ptr<World> world;
  Collectives collectives;
  std::vector<int> world_ranks;
  int channel = 0;
  uint64_t sequence = 0;
  std::optional<Error> broken;

  static std::unique_ptr<Content> Make(std::shared_ptr<World> world, int channel,
                                       std::vector<int> world_ranks, int index) {
    Collectives collectives = MakeCollectives(world->links, channel, world_ranks, index);
    return std::unique_ptr<Content>(
        new Content{std::move(world), std::move(collectives), std::move(world_ranks), channel, 0, {}});
  }

  // Runs body(operation, deadline) as the next operation; breaks the group when it fails.
  template <typename Body>
  Status Run(Operation operation, bool counted, const Body& body) {
    const auto kind = static_cast<Collective>(operation.collective);
    if (broken)
      return Fail(ErrorKind::kUnavailable, "{}: the communicator broke before: {}", CollectiveName(kind),
                  broken->message);
    operation.sequence = ++sequence;
    const uint64_t payload = collectives.payload_bytes(), wire = collectives.wire_bytes();
    const Status status = body(operation, After(world->links.deadline));
    if (counted && world_ranks.size() > 1) {
      AtomicCounts& counts = world->counts[operation.collective];
      counts.calls.fetch_add(1, std::memory_order_relaxed);
      counts.bytes.fetch_add(collectives.payload_bytes() - payload, std::memory_order_relaxed);
      counts.wire_bytes.fetch_add(collectives.wire_bytes() - wire, std::memory_order_relaxed);
    }
    if (!status) {
      broken = status.error();
      collectives.Break(broken->message);
    }
    return status;
  }

  Status Gather(std::span<const std::byte> own, std::span<const int64_t> sizes, std::span<std::byte> all,
                bool counted) {
    const Operation operation{.collective = static_cast<uint32_t>(Collective::kAllGather),
                              .bytes = all.size(),
                              .sizes_hash = HashSizes(sizes)};
    return Run(operation, counted, [&](const Operation& numbered, Deadline deadline) {
      return collectives.AllGather(numbered, own, sizes, all, deadline);
    });
  }
};

Communicator::Communicator(std::unique_ptr<Content> content) : content_(std::move(content)) {}
Communicator::~Communicator() = default;

std::unique_ptr<Communicator> Communicator::Alone() {
  auto world = std::make_shared<World>();
  world->links.node_of_rank = {0};
  return std::unique_ptr<Communicator>(new Communicator(Content::Make(std::move(world), 0, {0}, 0)));
}

Result<std::unique_ptr<Communicator>> Communicator::Create(const WorldLinks& links) {
  RETURN_IF_ERROR(CheckLinks(links));
  auto world = std::make_shared<World>();
  world->links = links;
  world->next_channel = 1;
  std::vector<int> ranks(links.node_of_rank.size());
  for (size_t i = 0; i < ranks.size(); ++i) ranks[i] = static_cast<int>(i);
  auto content = Content::Make(std::move(world), 0, std::move(ranks), links.rank);
  const Operation operation{.collective = static_cast<uint32_t>(Collective::kBarrier)};
  RETURN_IF_ERROR(content->Run(operation, false, [&](const Operation& numbered, Deadline deadline) {
    return content->collectives.Barrier(numbered, deadline);
  }));
  return std::unique_ptr<Communicator>(new Communicator(std::move(content)));
}

int Communicator::rank() const {
  return content_->collectives.places().rank();
}
int Communicator::size() const {
  return static_cast<int>(content_->world_ranks.size());
}

Status Communicator::AllReduce(std::span<int64_t> values) {
  const Operation operation{.collective = static_cast<uint32_t>(Collective::kAllReduce),
                            .bytes = values.size_bytes()};
  return content_->Run(operation, true, [&](const Operation& numbered, Deadline deadline) {
    return content_->collectives.AllReduce(numbered, values, deadline);
  });
}

Status Communicator::ReduceScatter(std::span<const int64_t> values, std::span<const int64_t> counts,
                                   std::span<int64_t> own) {
  CHECK_EQ(counts.size(), static_cast<size_t>(size()));
  CHECK_EQ(SumOf(counts), static_cast<int64_t>(values.size()));
  CHECK_EQ(counts[rank()], static_cast<int64_t>(own.size()));
  const Operation operation{.collective = static_cast<uint32_t>(Collective::kReduceScatter),
                            .bytes = values.size_bytes(),
                            .sizes_hash = HashSizes(counts)};
  return content_->Run(operation, true, [&](const Operation& numbered, Deadline deadline) {
    return content_->collectives.ReduceScatter(numbered, values, counts, own, deadline);
  });
}

Status Communicator::AllGather(std::span<const std::byte> own, std::span<const int64_t> sizes,
                               std::span<std::byte> all) {
  CHECK_EQ(sizes.size(), static_cast<size_t>(size()));
  CHECK_EQ(SumOf(sizes), static_cast<int64_t>(all.size()));
  CHECK_EQ(sizes[rank()], static_cast<int64_t>(own.size()));
  return content_->Gather(own, sizes, all, true);
}

Status Communicator::AllToAll(std::span<const std::byte> send, std::span<const int64_t> send_sizes,
                              std::span<std::byte> receive, std::span<const int64_t> receive_sizes) {
  CHECK_EQ(send_sizes.size(), static_cast<size_t>(size()));
  CHECK_EQ(receive_sizes.size(), static_cast<size_t>(size()));
  CHECK_EQ(SumOf(send_sizes), static_cast<int64_t>(send.size()));
  CHECK_EQ(SumOf(receive_sizes), static_cast<int64_t>(receive.size()));
  CHECK_EQ(send_sizes[rank()], receive_sizes[rank()]);
  const Operation operation{.collective = static_cast<uint32_t>(Collective::kAllToAll)};
  return content_->Run(operation, true, [&](const Operation& numbered, Deadline deadline) {
    return content_->collectives.AllToAll(numbered, send, send_sizes, receive, receive_sizes, deadline);
  });
}

Status Communicator::Broadcast(std::span<std::byte> bytes, int root) {
  CHECK(root >= 0 && root < size());
  const Operation operation{
      .collective = static_cast<uint32_t>(Collective::kBroadcast), .root = root, .bytes = bytes.size()};
  return content_->Run(operation, true, [&](const Operation& numbered, Deadline deadline) {
    return content_->collectives.Broadcast(numbered, bytes, root, deadline);
  });
}

Status Communicator::Barrier() {
  const Operation operation{.collective = static_cast<uint32_t>(Collective::kBarrier)};
  return content_->Run(operation, true, [&](const Operation& numbered, Deadline deadline) {
    return content_->collectives.Barrier(numbered, deadline);
  });
}

Result<std::unique_ptr<Communicator>> Communicator::Split(int color, int key) {
  struct Wish {
    int32_t color = 0, key = 0, next_channel = 0;
  };
  const std::shared_ptr<World>& world = content_->world;
  std::vector<Wish> wishes(content_->world_ranks.size());
  const Wish own{color, key, world->next_channel};
  const std::vector<int64_t> sizes(wishes.size(), sizeof(Wish));
  RETURN_IF_ERROR(content_->Gather(std::as_bytes(std::span(&own, 1)), sizes,
                                   std::as_writable_bytes(std::span(wishes)), false));
  // Groups of one color never meet those of another on a channel, so one channel serves all colors.
  int channel = 0;
  std::vector<int> members;
  for (int i = 0; i < size(); ++i) {
    channel = std::max(channel, wishes[i].next_channel);
    if (wishes[i].color == color) members.push_back(i);
  }
  if (channel < 0 || channel >= SharedMemory::kNumChannels)
    return Fail(ErrorKind::kExhausted, "no channel is left for another communicator; a rank has {}",
                SharedMemory::kNumChannels);
  world->next_channel = channel + 1;
  std::ranges::sort(members, {}, [&](int i) { return std::pair(wishes[i].key, i); });
  const auto index = static_cast<int>(std::ranges::find(members, rank()) - members.begin());
  for (int& member : members) member = content_->world_ranks[member];
  return std::unique_ptr<Communicator>(
      new Communicator(Content::Make(world, channel, std::move(members), index)));
}

CommunicatorCounts Communicator::Counts() const {
  CommunicatorCounts counts;
  for (int i = 0; i < kNumCollectives; ++i) {
    const AtomicCounts& one = content_->world->counts[i];
    counts[i] = {one.calls.load(), one.bytes.load(), one.wire_bytes.load()};
  }
  return counts;
}

}  // namespace tessera
