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
// The next two are estimates that hold on the machines we measured (`tessera bench comm`, 2 to 16 ranks).
// A barrier is worth reading this much more from the memory of the others.
constexpr size_t kBytesPerBarrier = 128 << 10;
// An exchange over TCP is worth sending this much more, unpacked.
constexpr size_t kBytesPerExchange = 64 << 10;
// Of a broadcast: the root writes one while the others read the one before.
constexpr size_t kBroadcastPiece = 128 << 10;

// Whether all ranks of a node shall add everything, in one round. Each then reads n - 1 arrays; by parts,
// twice (n - 1) / n of one.
bool IsBetterAtOnce(size_t bytes, size_t num_ranks) {
  return bytes <= kBufferBytes && bytes * (num_ranks - 1) * (num_ranks - 2) <= kBytesPerBarrier * num_ranks;
}
// Whether each node shall send its sums to each other node, in one exchange: that is (N - 1) / L arrays per
// rank. By parts, twice (N - 1) / (N * L).
bool IsBetterByNode(size_t bytes, size_t num_nodes, size_t ranks_per_node) {
  return bytes * (num_nodes - 1) * (num_nodes - 2) <= kBytesPerExchange * num_nodes * ranks_per_node;
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

int Places::smallest_node() const {
  size_t smallest = nodes_.front().size();
  for (const std::vector<int>& members : nodes_) smallest = std::min(smallest, members.size());
  return static_cast<int>(smallest);
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
  // Where nodes differ, large arrays would leave members idle.
  const bool spread = places_.smallest_node() * places_.num_nodes() == places_.size();
  if ((spread || values.size_bytes() <= kBytesPerExchange) &&
      IsBetterByNode(values.size_bytes(), places_.num_nodes(), places_.smallest_node()))
    return AllReduceByNode(operation, values, deadline);
  return AllReduceByMember(operation, values, deadline);
}

// The members of a node add a slice each; equal slices of all nodes are exchanged; then the node shares them.
Status Collectives::AllReduceByNode(const Operation& operation, std::span<int64_t> values,
                                    Deadline deadline) {
  const int num_slices = places_.smallest_node(), index = places_.local_index();
  Cut cut;
  cut.parts_of.resize(places_.local().size());
  for (int i = 0; i < num_slices; ++i) {
    const Slice64 slice = SliceOfPart(static_cast<int64_t>(values.size()), num_slices, i);
    cut.sizes.push_back(slice.end - slice.begin);
    cut.offsets.push_back(slice.begin);
    cut.parts_of[i].push_back(i);
  }
  std::span<int64_t> own;
  if (index < num_slices) own = values.subspan(cut.offsets[index], cut.sizes[index]);
  if (local_) {
    int64_t* const sum = own.data();
    const std::span<int64_t* const> sums(&sum, index < num_slices ? 1 : 0);
    RETURN_IF_ERROR(AddLocally(operation, values, cut, sums, deadline));
  }
  if (remote_ && index < num_slices) {
    std::vector<OutgoingSums> outgoing;
    std::vector<int> from;
    for (int node = 0; node < places_.num_nodes(); ++node) {
      if (node == places_.own_node()) continue;
      from.push_back(places_.members(node)[index]);
      outgoing.push_back({from.back(), own});
      payload_bytes_ += own.size_bytes();
    }
    RETURN_IF_ERROR(remote_->ExchangeSums(operation, outgoing, from, own, deadline));
  }
  if (!local_) return {};
  for (int i = 0; i < num_slices; ++i) {
    cut.sizes[i] *= sizeof(int64_t);
    cut.offsets[i] *= sizeof(int64_t);
  }
  return ShareBlocks(operation, cut, std::as_writable_bytes(values), deadline);
}

// A scatter of sums over all members, then a gather: the fewest bytes.
Status Collectives::AllReduceByMember(const Operation& operation, std::span<int64_t> values,
                                      Deadline deadline) {
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

Collectives::Cut Collectives::CutByCarrier(std::span<const int64_t> sizes) const {
  Cut cut{.sizes = {sizes.begin(), sizes.end()}, .offsets = Offsets(sizes), .parts_of = {}};
  for (size_t i = 0; i < places_.local().size(); ++i)
    cut.parts_of.push_back(places_.carried(static_cast<int>(i)));
  return cut;
}

// What a node has for a member of another node is added up by its carrier, which sends it there.
Status Collectives::ReduceScatter(const Operation& operation, std::span<const int64_t> values,
                                  std::span<const int64_t> counts, std::span<int64_t> own,
                                  Deadline deadline) {
  const Cut cut = CutByCarrier(counts);
  const auto own_part = values.subspan(cut.offsets[places_.rank()], own.size());
  const bool inside = own.data() < values.data() + values.size() && values.data() < own.data() + own.size();
  std::vector<int64_t> apart;  // where the caller's `own` lies over parts that are still to be read
  std::span<int64_t> own_sum = own;
  if (inside && own.data() != own_part.data()) {
    apart.resize(own.size());
    own_sum = apart;
  }
  const std::vector<int>& carried = places_.carried(places_.local_index());
  std::vector<int64_t*> sums;
  std::vector<OutgoingSums> outgoing;
  int64_t num_carried = 0;
  for (const int member : carried)
    if (member != places_.rank()) num_carried += counts[member];
  if (local_) sums_.resize(num_carried);
  int64_t* next = sums_.data();
  for (const int member : carried) {
    sums.push_back(member == places_.rank() ? own_sum.data() : next);
    if (member == places_.rank()) continue;
    const auto count = static_cast<size_t>(counts[member]);
    outgoing.push_back({member, local_ ? std::span<const int64_t>(next, count)
                                       : values.subspan(cut.offsets[member], count)});
    if (local_) next += count;
    payload_bytes_ += count * sizeof(int64_t);
  }
  if (local_)
    RETURN_IF_ERROR(AddLocally(operation, values, cut, sums, deadline));
  else
    Move(own_part, own_sum.data());
  if (remote_) {
    std::vector<int> from;
    for (int node = 0; node < places_.num_nodes(); ++node)
      if (node != places_.own_node()) from.push_back(places_.Carrier(places_.rank(), node));
    RETURN_IF_ERROR(remote_->ExchangeSums(operation, outgoing, from, own_sum, deadline));
  }
  Move<int64_t>(own_sum, own.data());
  return {};
}

// sums[i] := this node's sum of the i-th of the parts that this member adds. A sum may be written over its
// own part of `values`, not over others.
Status Collectives::AddLocally(const Operation& operation, std::span<const int64_t> values, const Cut& cut,
                               std::span<int64_t* const> sums, Deadline deadline) {
  // A slice may be one value longer than its share.
  const auto num_parts = static_cast<int64_t>(cut.sizes.size());
  const int64_t capacity = static_cast<int64_t>(kBufferValues) - num_parts;
  CHECK(capacity > 0);
  const int64_t num_rounds = RoundsFor(static_cast<int64_t>(values.size()), capacity);
  const std::vector<int>& own_parts = cut.parts_of[local_->index()];
  std::vector<int64_t> places(cut.sizes.size());
  std::vector<const int64_t*> rows;
  for (int64_t k = 0; k < num_rounds; ++k) {
    int64_t place = 0;
    for (int64_t part = 0; part < num_parts; ++part) {
      places[part] = place;
      place += static_cast<int64_t>(SliceOfPart(cut.sizes[part], num_rounds, k).size());
    }
    for (int member = 0; member < local_->size(); ++member) {
      if (member == local_->index()) continue;
      for (const int part : cut.parts_of[member]) {
        const Slice64 slice = SliceOfPart(cut.sizes[part], num_rounds, k);
        Publish(std::as_bytes(values.subspan(cut.offsets[part] + slice.begin, slice.size())),
                places[part] * sizeof(int64_t));
      }
    }
    RETURN_IF_ERROR(local_->Meet(operation, deadline));
    for (size_t i = 0; i < own_parts.size(); ++i) {
      const int part = own_parts[i];
      const Slice64 slice = SliceOfPart(cut.sizes[part], num_rounds, k);
      rows.assign(1, values.data() + cut.offsets[part] + slice.begin);
      for (int member = 0; member < local_->size(); ++member)
        if (member != local_->index())
          rows.push_back(reinterpret_cast<const int64_t*>(local_->Data(member).data()) + places[part]);
      SumRows({sums[i] + slice.begin, slice.size()}, rows);
    }
  }
  return {};
}

// --- Copies ---

Status Collectives::AllGather(const Operation& operation, std::span<const std::byte> own,
                              std::span<const int64_t> sizes, std::span<std::byte> all, Deadline deadline) {
  Move(own, all.data() + Sum(sizes.first(places_.rank())));
  if (remote_) RETURN_IF_ERROR(ExchangeBlocks(operation, sizes, all, deadline));
  if (local_) RETURN_IF_ERROR(ShareBlocks(operation, CutByCarrier(sizes), all, deadline));
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

// Walks bytes [begin, end) of the concatenation of `parts`: visit(place in the array, size, distance from
// begin).
template <typename Visit>
void ForEachPiece(std::span<const int> parts, std::span<const int64_t> sizes,
                  std::span<const int64_t> offsets, int64_t begin, int64_t end, const Visit& visit) {
  int64_t part_begin = 0;
  for (const int part : parts) {
    const int64_t from = std::max(begin, part_begin), to = std::min(end, part_begin + sizes[part]);
    if (from < to) visit(offsets[part] + from - part_begin, to - from, from - begin);
    part_begin += sizes[part];
  }
}

}  // namespace

// Each member shows the node its parts, which are in `all` already.
Status Collectives::ShareBlocks(const Operation& operation, const Cut& cut, std::span<std::byte> all,
                                Deadline deadline) {
  int64_t largest = 0;
  for (const std::vector<int>& parts : cut.parts_of) {
    int64_t bytes = 0;
    for (const int part : parts) bytes += cut.sizes[part];
    largest = std::max(largest, bytes);
  }
  const int64_t step = kBufferBytes, num_rounds = RoundsFor(largest, step);
  for (int64_t k = 0; k < num_rounds; ++k) {
    ForEachPiece(cut.parts_of[local_->index()], cut.sizes, cut.offsets, k * step, (k + 1) * step,
                 [&](int64_t place, int64_t size, int64_t at) { Publish(all.subspan(place, size), at); });
    RETURN_IF_ERROR(local_->Meet(operation, deadline));
    for (int member = 0; member < local_->size(); ++member) {
      if (member == local_->index()) continue;
      const std::span<const std::byte> data = local_->Data(member);
      ForEachPiece(cut.parts_of[member], cut.sizes, cut.offsets, k * step, (k + 1) * step,
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
  const int64_t num_rounds = RoundsFor(static_cast<int64_t>(bytes.size()), kBroadcastPiece);
  const auto& members = places_.local();
  const auto source = static_cast<int>(std::ranges::find(members, carrier) - members.begin());
  for (int64_t k = 0; k < num_rounds; ++k) {
    const size_t begin = std::min(bytes.size(), k * kBroadcastPiece);
    const auto piece = bytes.subspan(begin, std::min(kBroadcastPiece, bytes.size() - begin));
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
