// The sequences of rounds and exchanges. Large arrays go in pieces: a round takes a proportional slice of
// every part, so that all members add in every round.
#include "comm/collectives.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "comm/shared_memory_layout.h"
#include "comm/sums.h"

namespace tessera {
namespace {

constexpr size_t kBufferBytes = MemoryLayout::kBufferBytes;
constexpr size_t kBufferValues = kBufferBytes / sizeof(int64_t);
// Small arrays are added at once: all members of a node add everything, which takes one barrier instead of
// two but reads more. Measured (`tessera bench comm`, 2 to 16 ranks): a barrier is worth reading this much
// more.
constexpr size_t kBytesPerBarrier = 128 << 10;

bool IsBetterAtOnce(size_t bytes, size_t num_ranks) {
  // Each reads (n - 1) arrays; by scatter and gather twice (n - 1) / n of one.
  return bytes <= kBufferBytes && bytes * (num_ranks - 1) * (num_ranks - 2) <= kBytesPerBarrier * num_ranks;
}

struct Slice64 {
  int64_t begin = 0, end = 0;
  size_t size() const { return static_cast<size_t>(end - begin); }
};
// Slice k of `count` over `pieces`.
Slice64 SliceOfPart(int64_t count, int64_t pieces, int64_t k) {
  return {count * k / pieces, count * (k + 1) / pieces};
}

int64_t Sum(std::span<const int64_t> values) {
  int64_t sum = 0;
  for (const int64_t value : values) sum += value;
  return sum;
}

// Where each part begins.
std::vector<int64_t> Offsets(std::span<const int64_t> sizes) {
  std::vector<int64_t> offsets(sizes.size());
  int64_t sum = 0;
  for (size_t i = 0; i < sizes.size(); ++i) {
    offsets[i] = sum;
    sum += sizes[i];
  }
  return offsets;
}

int64_t RoundsFor(int64_t amount, int64_t capacity) {
  return std::max<int64_t>(1, (amount + capacity - 1) / capacity);
}

template <typename T>
void Move(std::span<const T> from, T* to) {
  if (!from.empty() && from.data() != to) std::memmove(to, from.data(), from.size_bytes());
}

}  // namespace

Places::Places(int rank, const std::vector<int>& node_of) : rank_(rank) {
  std::map<int, int> numbers;
  for (const int node : node_of) {
    const auto [it, is_new] = numbers.try_emplace(node, static_cast<int>(nodes_.size()));
    if (is_new) nodes_.emplace_back();
    std::vector<int>& members = nodes_[it->second];
    local_index_.push_back(static_cast<int>(members.size()));
    members.push_back(static_cast<int>(node_of_.size()));
    node_of_.push_back(it->second);
  }
  carried_.resize(local().size());
  for (int member = 0; member < size(); ++member) carried_[local_index_[Carrier(member)]].push_back(member);
}

int Places::Carrier(int member, int node) const {
  const std::vector<int>& members = nodes_[node];
  return node_of_[member] == node ? member : members[local_index_[member] % members.size()];
}

Collectives::Collectives(Places places, std::optional<LocalGroup> local, std::optional<RemoteGroup> remote)
    : places_(std::move(places)), local_(std::move(local)), remote_(std::move(remote)) {}

void Collectives::Break(std::string_view why) const {
  if (local_) local_->Break(why);
  if (remote_) remote_->Break(why);
}

// Writes into this member's buffer of the next round.
void Collectives::Publish(std::span<const std::byte> bytes, size_t offset) {
  const std::span<std::byte> buffer = local_->own_data();
  CHECK(offset <= buffer.size() && bytes.size() <= buffer.size() - offset);
  if (!bytes.empty()) std::memcpy(buffer.data() + offset, bytes.data(), bytes.size());
  payload_bytes_ += bytes.size();
}

// --- Reductions ---

Status Collectives::AllReduce(const Operation& operation, std::span<int64_t> values, Deadline deadline) {
  if (places_.size() == 1) return {};
  if (!remote_ && IsBetterAtOnce(values.size_bytes(), places_.size()))
    return AllReduceAtOnce(operation, values, deadline);
  const int64_t pieces = places_.size();
  const auto total = static_cast<int64_t>(values.size());
  std::vector<int64_t> counts(places_.size()), sizes(places_.size());
  for (int i = 0; i < places_.size(); ++i) {
    counts[i] = static_cast<int64_t>(SliceOfPart(total, pieces, i).size());
    sizes[i] = counts[i] * static_cast<int64_t>(sizeof(int64_t));
  }
  const auto own = values.subspan(SliceOfPart(total, pieces, places_.rank()).begin, counts[places_.rank()]);
  RETURN_IF_ERROR(ReduceScatter(operation, values, counts, own, deadline));
  return AllGather(operation, std::as_bytes(own), sizes, std::as_writable_bytes(values), deadline);
}

Status Collectives::AllReduceAtOnce(const Operation& operation, std::span<int64_t> values,
                                    Deadline deadline) {
  Publish(std::as_bytes(values), 0);
  RETURN_IF_ERROR(local_->Meet(operation, deadline));
  std::vector<const int64_t*> rows = {values.data()};
  for (int member = 0; member < local_->size(); ++member)
    if (member != local_->index())
      rows.push_back(reinterpret_cast<const int64_t*>(local_->Data(member).data()));
  SumRows(values, rows);
  return {};
}

Status Collectives::ReduceScatter(const Operation& operation, std::span<const int64_t> values,
                                  std::span<const int64_t> counts, std::span<int64_t> own,
                                  Deadline deadline) {
  const auto own_part = values.subspan(Sum(counts.first(places_.rank())), own.size());
  const bool inside = own.data() < values.data() + values.size() && values.data() < own.data() + own.size();
  std::vector<int64_t> apart;  // where the caller's `own` lies over parts that are still to be read
  std::span<int64_t> sum = own;
  if (inside && own.data() != own_part.data()) {
    apart.resize(own.size());
    sum = apart;
  }
  if (local_)
    RETURN_IF_ERROR(AddLocally(operation, values, counts, sum, deadline));
  else
    Move(own_part, sum.data());
  if (remote_) RETURN_IF_ERROR(ExchangeSums(operation, values, counts, sum, deadline));
  Move<int64_t>(sum, own.data());
  return {};
}

// own := the sum of this node's values for this member; sums_ := those for the others that it carries.
Status Collectives::AddLocally(const Operation& operation, std::span<const int64_t> values,
                               std::span<const int64_t> counts, std::span<int64_t> own, Deadline deadline) {
  // A slice may be one value longer than its share.
  const int64_t capacity = static_cast<int64_t>(kBufferValues) - places_.size();
  CHECK(capacity > 0);
  const int64_t num_rounds = RoundsFor(static_cast<int64_t>(values.size()), capacity);
  const std::vector<int64_t> offsets = Offsets(counts);
  int64_t num_carried = 0;
  for (const int member : places_.carried(places_.local_index()))
    if (member != places_.rank()) num_carried += counts[member];
  sums_.resize(num_carried);
  std::vector<const int64_t*> rows;
  for (int64_t k = 0; k < num_rounds; ++k) {
    size_t place = 0;
    for (int member = 0; member < places_.size(); ++member) {
      const Slice64 slice = SliceOfPart(counts[member], num_rounds, k);
      if (places_.Carrier(member) != places_.rank())
        Publish(std::as_bytes(values.subspan(offsets[member] + slice.begin, slice.size())),
                place * sizeof(int64_t));
      place += slice.size();
    }
    RETURN_IF_ERROR(local_->Meet(operation, deadline));
    place = 0;
    int64_t* carried = sums_.data();
    for (int member = 0; member < places_.size(); ++member) {
      const Slice64 slice = SliceOfPart(counts[member], num_rounds, k);
      if (places_.Carrier(member) == places_.rank()) {
        int64_t* to = member == places_.rank() ? own.data() : carried;
        if (member != places_.rank()) carried += counts[member];
        rows.assign(1, values.data() + offsets[member] + slice.begin);
        for (int other = 0; other < local_->size(); ++other)
          if (other != local_->index())
            rows.push_back(reinterpret_cast<const int64_t*>(local_->Data(other).data()) + place);
        SumRows({to + slice.begin, slice.size()}, rows);
      }
      place += slice.size();
    }
  }
  return {};
}

// Sends this node's sums to the members of other nodes that this one carries, and adds what their nodes have.
Status Collectives::ExchangeSums(const Operation& operation, std::span<const int64_t> values,
                                 std::span<const int64_t> counts, std::span<int64_t> own, Deadline deadline) {
  const std::vector<int64_t> offsets = Offsets(counts);
  std::vector<OutgoingSums> outgoing;
  size_t place = 0;
  for (const int member : places_.carried(places_.local_index())) {
    if (member == places_.rank()) continue;
    const auto count = static_cast<size_t>(counts[member]);
    outgoing.push_back({member, local_ ? std::span<const int64_t>(sums_).subspan(place, count)
                                       : values.subspan(offsets[member], count)});
    place += count;
    payload_bytes_ += count * sizeof(int64_t);
  }
  std::vector<int> from;
  for (int node = 0; node < places_.num_nodes(); ++node)
    if (node != places_.own_node()) from.push_back(places_.Carrier(places_.rank(), node));
  return remote_->ExchangeSums(operation, outgoing, from, own, deadline);
}

// --- Copies ---

Status Collectives::AllGather(const Operation& operation, std::span<const std::byte> own,
                              std::span<const int64_t> sizes, std::span<std::byte> all, Deadline deadline) {
  Move(own, all.data() + Sum(sizes.first(places_.rank())));
  if (remote_) RETURN_IF_ERROR(ExchangeBlocks(operation, sizes, all, deadline));
  if (local_) RETURN_IF_ERROR(ShareBlocks(operation, sizes, all, deadline));
  return {};
}

// Own block to one member of each other node; the blocks of those that this member carries come in.
Status Collectives::ExchangeBlocks(const Operation& operation, std::span<const int64_t> sizes,
                                   std::span<std::byte> all, Deadline deadline) {
  const std::vector<int64_t> offsets = Offsets(sizes);
  const int rank = places_.rank();
  std::vector<Outgoing> outgoing;
  std::vector<Incoming> incoming;
  for (int node = 0; node < places_.num_nodes(); ++node) {
    if (node == places_.own_node()) continue;
    outgoing.push_back({places_.Carrier(rank, node), all.subspan(offsets[rank], sizes[rank])});
    payload_bytes_ += static_cast<uint64_t>(sizes[rank]);
  }
  for (const int member : places_.carried(places_.local_index()))
    if (member != rank) incoming.push_back({member, all.subspan(offsets[member], sizes[member])});
  return remote_->Exchange(operation, outgoing, incoming, deadline);
}

namespace {

// Walks bytes [begin, end) of the concatenation of `blocks`: visit(place in `all`, size, distance from
// begin).
template <typename Visit>
void ForEachPiece(std::span<const int> blocks, std::span<const int64_t> sizes,
                  std::span<const int64_t> offsets, int64_t begin, int64_t end, const Visit& visit) {
  int64_t block_begin = 0;
  for (const int block : blocks) {
    const int64_t from = std::max(begin, block_begin), to = std::min(end, block_begin + sizes[block]);
    if (from < to) visit(offsets[block] + from - block_begin, to - from, from - begin);
    block_begin += sizes[block];
  }
}

}  // namespace

// Each member shows the node the blocks that it carries: its own, and those that came from other nodes.
Status Collectives::ShareBlocks(const Operation& operation, std::span<const int64_t> sizes,
                                std::span<std::byte> all, Deadline deadline) {
  const std::vector<int64_t> offsets = Offsets(sizes);
  int64_t largest = 0;
  for (int member = 0; member < local_->size(); ++member) {
    int64_t carried = 0;
    for (const int block : places_.carried(member)) carried += sizes[block];
    largest = std::max(largest, carried);
  }
  const int64_t step = kBufferBytes, num_rounds = RoundsFor(largest, step);
  for (int64_t k = 0; k < num_rounds; ++k) {
    ForEachPiece(places_.carried(local_->index()), sizes, offsets, k * step, (k + 1) * step,
                 [&](int64_t place, int64_t size, int64_t at) { Publish(all.subspan(place, size), at); });
    RETURN_IF_ERROR(local_->Meet(operation, deadline));
    for (int member = 0; member < local_->size(); ++member) {
      if (member == local_->index()) continue;
      const std::span<const std::byte> data = local_->Data(member);
      ForEachPiece(places_.carried(member), sizes, offsets, k * step, (k + 1) * step,
                   [&](int64_t place, int64_t size, int64_t at) {
                     std::memcpy(all.data() + place, data.data() + at, static_cast<size_t>(size));
                   });
    }
  }
  return {};
}

Status Collectives::AllToAll(const Operation& operation, std::span<const std::byte> send,
                             std::span<const int64_t> send_sizes, std::span<std::byte> receive,
                             std::span<const int64_t> receive_sizes, Deadline deadline) {
  const std::vector<int64_t> from = Offsets(send_sizes), to = Offsets(receive_sizes);
  const int rank = places_.rank();
  Move(send.subspan(from[rank], send_sizes[rank]), receive.data() + to[rank]);
  if (remote_) {
    std::vector<Outgoing> outgoing;
    std::vector<Incoming> incoming;
    for (int member = 0; member < places_.size(); ++member) {
      if (places_.IsLocal(member)) continue;
      outgoing.push_back({member, send.subspan(from[member], send_sizes[member])});
      incoming.push_back({member, receive.subspan(to[member], receive_sizes[member])});
      payload_bytes_ += static_cast<uint64_t>(send_sizes[member]);
    }
    RETURN_IF_ERROR(remote_->Exchange(operation, outgoing, incoming, deadline));
  }
  if (local_) RETURN_IF_ERROR(SwapLocally(operation, send, send_sizes, receive, receive_sizes, deadline));
  return {};
}

// The buffer of each member has one slot per local member. How many rounds there are is learnt in the first,
// in which all publish all sizes.
Status Collectives::SwapLocally(const Operation& operation, std::span<const std::byte> send,
                                std::span<const int64_t> send_sizes, std::span<std::byte> receive,
                                std::span<const int64_t> receive_sizes, Deadline deadline) {
  const std::vector<int64_t> from = Offsets(send_sizes), to = Offsets(receive_sizes);
  const std::vector<int>& members = places_.local();
  const int own = local_->index(), size = local_->size();
  const int64_t slot = static_cast<int64_t>(kBufferBytes) / size / 64 * 64;
  const auto piece_of = [slot](int64_t bytes, int64_t k) {
    return Slice64{std::min(bytes, k * slot), std::min(bytes, (k + 1) * slot)};
  };
  int64_t num_rounds = 1;
  for (int64_t k = 0; k < num_rounds; ++k) {
    for (int other = 0; other < size; ++other) {
      if (k == 0) {
        local_->own_sizes()[other] = static_cast<uint64_t>(send_sizes[members[other]]);
        local_->own_sizes()[size + other] = static_cast<uint64_t>(receive_sizes[members[other]]);
      }
      if (other == own) continue;
      const Slice64 piece = piece_of(send_sizes[members[other]], k);
      Publish(send.subspan(from[members[other]] + piece.begin, piece.size()), other * slot);
    }
    RETURN_IF_ERROR(local_->Meet(operation, deadline));
    if (k == 0) {
      ASSIGN_OR_RETURN(const int64_t largest, LargestSwap(operation));
      num_rounds = RoundsFor(largest, slot);
    }
    for (int other = 0; other < size; ++other) {
      const Slice64 piece = piece_of(receive_sizes[members[other]], k);
      if (other == own || piece.size() == 0) continue;
      std::memcpy(receive.data() + to[members[other]] + piece.begin, local_->Data(other).data() + own * slot,
                  piece.size());
    }
  }
  return {};
}

// The largest array that one local member sends another; kInvalid when a receiver expects another size. Every
// member looks at every pair, so that all find the same.
Result<int64_t> Collectives::LargestSwap(const Operation& operation) const {
  const int size = local_->size();
  uint64_t largest = 0;
  for (int sender = 0; sender < size; ++sender) {
    for (int receiver = 0; receiver < size; ++receiver) {
      const uint64_t sent = local_->Sizes(sender)[receiver];
      const uint64_t expected = local_->Sizes(receiver)[size + sender];
      if (sent != expected)
        return Invalid("{}: member {} sends {} bytes to member {}, which expects {}", operation.Text(),
                       places_.local()[sender], sent, places_.local()[receiver], expected);
      if (sender != receiver) largest = std::max(largest, sent);
    }
  }
  return static_cast<int64_t>(std::min<uint64_t>(largest, int64_t{1} << 48));
}

Status Collectives::Broadcast(const Operation& operation, std::span<std::byte> bytes, int root,
                              Deadline deadline) {
  const int rank = places_.rank(), carrier = places_.Carrier(root);
  if (remote_) {
    std::vector<Outgoing> outgoing;
    std::vector<Incoming> incoming;
    for (int node = 0; node < places_.num_nodes() && rank == root; ++node) {
      if (node == places_.own_node()) continue;
      outgoing.push_back({places_.Carrier(root, node), bytes});
      payload_bytes_ += bytes.size();
    }
    if (rank == carrier && rank != root) incoming.push_back({root, bytes});
    RETURN_IF_ERROR(remote_->Exchange(operation, outgoing, incoming, deadline));
  }
  if (!local_) return {};
  const int64_t num_rounds = RoundsFor(static_cast<int64_t>(bytes.size()), kBufferBytes);
  const auto& members = places_.local();
  const auto source = static_cast<int>(std::ranges::find(members, carrier) - members.begin());
  for (int64_t k = 0; k < num_rounds; ++k) {
    const size_t begin = std::min(bytes.size(), k * kBufferBytes);
    const auto piece = bytes.subspan(begin, std::min(kBufferBytes, bytes.size() - begin));
    if (rank == carrier) Publish(piece, 0);
    RETURN_IF_ERROR(local_->Meet(operation, deadline));
    if (rank != carrier && !piece.empty())
      std::memcpy(piece.data(), local_->Data(source).data(), piece.size());
  }
  return {};
}

// All of a node are here; then all nodes; then all of a node know.
Status Collectives::Barrier(const Operation& operation, Deadline deadline) {
  if (local_) RETURN_IF_ERROR(local_->Meet(operation, deadline));
  if (!remote_) return {};
  if (places_.local_index() == 0) {
    std::vector<Outgoing> outgoing;
    std::vector<Incoming> incoming;
    for (int node = 0; node < places_.num_nodes(); ++node) {
      if (node == places_.own_node()) continue;
      outgoing.push_back({places_.members(node).front(), {}});
      incoming.push_back({places_.members(node).front(), {}});
    }
    RETURN_IF_ERROR(remote_->Exchange(operation, outgoing, incoming, deadline));
  }
  if (local_) RETURN_IF_ERROR(local_->Meet(operation, deadline));
  return {};
}

}  // namespace tessera
