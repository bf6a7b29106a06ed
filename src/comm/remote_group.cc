// Frames in both directions on all links of a group at once.
#include "comm/remote_group.h"

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "comm/sums.h"
#include "comm/tcp_frames.h"

namespace tessera {

// One frame out and one in, of one link.
struct RemoteGroup::Transfer {
  TcpLink* link = nullptr;
  int world_rank = 0;

  bool sends = false;
  FrameHeader out;
  std::span<const std::byte> out_bytes;
  size_t sent = 0;  // header included

  bool receives = false;
  FrameHeader in;
  std::span<std::byte> in_bytes;  // room for the payload; then the payload
  bool exact = true;              // else the payload may be shorter than the room
  size_t received = 0;            // header included
  std::vector<std::byte> text;    // of a broken peer

  void SetOut(std::span<const std::byte> bytes) {
    sends = true;
    out_bytes = bytes;
    out.bytes = bytes.size();
  }
  bool Sent() const { return !sends || sent == sizeof(out) + out_bytes.size(); }
  bool Received() const { return !receives || (received >= sizeof(in) && received == sizeof(in) + in.bytes); }
};

namespace {

std::unexpected<Error> Gone(const TcpLink& link, const Operation& operation, bool aborted, int error) {
  if (aborted) return Fail(ErrorKind::kUnavailable, "{}: the links were aborted", operation.Text());
  return Fail(ErrorKind::kUnavailable, "{}: {} is gone: {}", operation.Text(), link.name,
              error == 0 ? "it closed the connection" : std::strerror(error));
}

// Takes what is there, at most to.size() bytes; 0: nothing now; -1: closed; or -errno - 1.
int64_t TakeBytes(TcpLink& link, std::span<std::byte> to) {
  if (link.begin == link.end) {
    const bool direct = to.size() >= link.buffer.size();
    const std::span<std::byte> room = direct ? to : std::span<std::byte>(link.buffer);
    const ssize_t got = recv(link.socket.descriptor(), room.data(), room.size(), 0);
    if (got < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ? 0 : -errno - 1;
    if (got == 0) return -1;
    if (direct) return got;
    link.begin = 0;
    link.end = static_cast<size_t>(got);
  }
  const size_t size = std::min(to.size(), link.end - link.begin);
  std::memcpy(to.data(), link.buffer.data() + link.begin, size);
  link.begin += size;
  return static_cast<int64_t>(size);
}

}  // namespace

RemoteGroup::RemoteGroup(TcpMesh& mesh, int channel, std::vector<int> world_ranks)
    : mesh_(*mesh.content_), channel_(channel), world_ranks_(std::move(world_ranks)) {}

RemoteGroup::Transfer& RemoteGroup::TransferOf(const Operation& operation, int member,
                                               std::vector<Transfer>& transfers) {
  const int world_rank = world_ranks_[member];
  for (Transfer& transfer : transfers)
    if (transfer.world_rank == world_rank) return transfer;
  Transfer transfer;
  transfer.link = &mesh_.links[world_rank];
  CHECK(transfer.link->socket.open());
  transfer.world_rank = world_rank;
  transfer.out.channel = static_cast<uint16_t>(channel_);
  transfer.out.epoch = mesh_.epoch;
  transfer.out.operation = operation;
  return transfers.emplace_back(std::move(transfer));
}

Status RemoteGroup::Exchange(const Operation& operation, std::span<const Outgoing> outgoing,
                             std::span<const Incoming> incoming, Deadline deadline) {
  std::vector<Transfer> transfers;
  for (const Outgoing& one : outgoing) {
    Transfer& transfer = TransferOf(operation, one.member, transfers);
    transfer.SetOut(one.bytes);
  }
  for (const Incoming& one : incoming) {
    Transfer& transfer = TransferOf(operation, one.member, transfers);
    transfer.receives = true;
    transfer.in_bytes = one.bytes;
  }
  return Run(operation, transfers, deadline);
}

Status RemoteGroup::ExchangeSums(const Operation& operation, std::span<const OutgoingSums> outgoing,
                                 std::span<const int> from, std::span<int64_t> sums, Deadline deadline) {
  std::vector<Transfer> transfers;
  packed_.resize(std::max(packed_.size(), outgoing.size() + from.size()));
  size_t used = 0;
  for (const OutgoingSums& one : outgoing) {
    std::vector<std::byte>& packed = packed_[used++];
    packed.clear();
    PackInt64(one.values, packed);
    Transfer& transfer = TransferOf(operation, one.member, transfers);
    transfer.SetOut(packed);
  }
  for (const int member : from) {
    std::vector<std::byte>& packed = packed_[used++];
    packed.resize(MaxPackedBytes(sums.size()));
    Transfer& transfer = TransferOf(operation, member, transfers);
    transfer.receives = true;
    transfer.in_bytes = packed;
    transfer.exact = false;
  }
  RETURN_IF_ERROR(Run(operation, transfers, deadline));
  for (const Transfer& transfer : transfers) {
    if (!transfer.receives) continue;
    if (const Status added = UnpackAddInt64(transfer.in_bytes.first(transfer.in.bytes), sums); !added)
      return Invalid("{}: {} sent {} values that are none: {}", operation.Text(), transfer.link->name,
                     sums.size(), added.error().message);
  }
  return {};
}

// Whether bytes moved.
Result<bool> RemoteGroup::Send(Transfer& transfer) {
  if (transfer.Sent()) return false;
  std::array<iovec, 2> pieces{};
  size_t num_pieces = 0;
  const auto header = std::as_bytes(std::span(&transfer.out, 1));
  for (const auto rest : {header.subspan(std::min(transfer.sent, header.size())),
                          transfer.out_bytes.subspan(std::max(transfer.sent, header.size()) - header.size())})
    if (!rest.empty()) pieces[num_pieces++] = {const_cast<std::byte*>(rest.data()), rest.size()};
  msghdr message{};
  message.msg_iov = pieces.data();
  message.msg_iovlen = num_pieces;
  const ssize_t sent = sendmsg(transfer.link->socket.descriptor(), &message, MSG_NOSIGNAL);
  if (sent > 0) {
    transfer.sent += static_cast<size_t>(sent);
    wire_bytes_ += static_cast<uint64_t>(sent);
    return true;
  }
  if (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR) return false;
  const int error = errno;
  // The peer may have said why before it closed.
  while (transfer.receives && !transfer.Received()) {
    ASSIGN_OR_RETURN(const bool moved, Receive(transfer));
    if (!moved) break;
  }
  return Gone(*transfer.link, transfer.out.operation, mesh_.aborted, error);
}

Result<bool> RemoteGroup::Receive(Transfer& transfer) {
  if (transfer.Received()) return false;
  constexpr size_t kHeader = sizeof(transfer.in);
  const auto room = transfer.received < kHeader
                        ? std::as_writable_bytes(std::span(&transfer.in, 1)).subspan(transfer.received)
                        : transfer.in_bytes.first(transfer.in.bytes).subspan(transfer.received - kHeader);
  const int64_t got = TakeBytes(*transfer.link, room);
  if (got == 0) return false;
  if (got < 0) return Gone(*transfer.link, transfer.out.operation, mesh_.aborted, static_cast<int>(-got - 1));
  const bool header_came = transfer.received < kHeader && transfer.received + got >= kHeader;
  transfer.received += static_cast<size_t>(got);
  if (header_came) RETURN_IF_ERROR(CheckHeader(transfer));
  if (transfer.Received() && transfer.in.kind == FrameHeader::kBroken)
    return Fail(ErrorKind::kUnavailable, "{}: {} broke: {}", transfer.out.operation.Text(),
                transfer.link->name,
                std::string_view(reinterpret_cast<const char*>(transfer.text.data()), transfer.in.bytes));
  return true;
}

// Everything in a header is foreign; afterwards `in.bytes` fits into `in_bytes`.
Status RemoteGroup::CheckHeader(Transfer& transfer) const {
  const FrameHeader& in = transfer.in;
  const FrameHeader& out = transfer.out;
  if (in.magic != FrameHeader::kMagic)
    return Invalid("{} sent something that is not a frame (it begins with {:08x})", transfer.link->name,
                   in.magic);
  if (in.epoch != out.epoch)
    return Invalid("{} sent a frame of epoch {}, this is epoch {}", transfer.link->name, in.epoch, out.epoch);
  if (in.kind == FrameHeader::kBroken && in.bytes <= FrameHeader::kMaxText) {
    transfer.text.resize(in.bytes);
    transfer.in_bytes = transfer.text;
    return {};
  }
  if (in.channel != out.channel)
    return Invalid(
        "the ranks disagree: rank {} is at {} of communicator {}, rank {} at {} of communicator {}",
        transfer.world_rank, in.operation.Text(), in.channel, mesh_.rank, out.operation.Text(), out.channel);
  if (in.operation != out.operation)
    return Invalid("{}", MismatchText(transfer.world_rank, in.operation, mesh_.rank, out.operation));
  const bool fits =
      transfer.exact ? in.bytes == transfer.in_bytes.size() : in.bytes <= transfer.in_bytes.size();
  if (in.kind != FrameHeader::kPayload || !fits)
    return Invalid("{}: rank {} sends {} bytes to rank {}, which expects {}{}", out.operation.Text(),
                   transfer.world_rank, in.bytes, mesh_.rank, transfer.exact ? "" : "at most ",
                   transfer.in_bytes.size());
  return {};
}

Status RemoteGroup::Run(const Operation& operation, std::span<Transfer> transfers, Deadline deadline) {
  const Status status = MoveAll(operation, transfers, deadline);
  if (!status)
    for (const Transfer& transfer : transfers)
      transfer.link->inside_frame |= transfer.sends && transfer.sent > 0 && !transfer.Sent();
  return status;
}

// The other links of the group, while this exchange waits: nothing is expected on them now, but a member may
// have broken, or be at another operation, and then it does not come.
struct RemoteGroup::Bystander {
  TcpLink* link = nullptr;
  int world_rank = 0;
  bool ready = false;  // something may be there
};

std::vector<RemoteGroup::Bystander> RemoteGroup::BystandersOf(std::span<const Transfer> transfers) const {
  std::vector<Bystander> bystanders;
  for (const int rank : world_ranks_) {
    const bool receives = std::ranges::any_of(transfers, [rank](const Transfer& transfer) {
      return transfer.world_rank == rank && transfer.receives;
    });
    TcpLink& link = mesh_.links[rank];
    if (!receives && link.socket.open()) bystanders.push_back({&link, rank, link.begin < link.end});
  }
  return bystanders;
}

// Looks at the next frame of a bystander without taking it. True: there is nothing more to see before this
// exchange is over. A closed link is left to those who need it: its owner may be done.
Result<bool> RemoteGroup::Look(const Operation& operation, const Bystander& bystander) const {
  TcpLink& link = *bystander.link;
  FrameHeader header;
  if (link.end - link.begin < sizeof(header)) {
    std::memmove(link.buffer.data(), link.buffer.data() + link.begin, link.end - link.begin);
    link.end -= std::exchange(link.begin, 0);
    const ssize_t got =
        recv(link.socket.descriptor(), link.buffer.data() + link.end, link.buffer.size() - link.end, 0);
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return false;
    if (got <= 0) return true;
    link.end += static_cast<size_t>(got);
    if (link.end < sizeof(header)) return false;
  }
  std::memcpy(&header, link.buffer.data() + link.begin, sizeof(header));
  const bool valid = header.magic == FrameHeader::kMagic && header.epoch == mesh_.epoch;
  if (valid && header.kind == FrameHeader::kBroken) {
    const size_t size = std::min<size_t>(header.bytes, link.end - link.begin - sizeof(header));
    const auto* text = reinterpret_cast<const char*>(link.buffer.data() + link.begin + sizeof(header));
    return Fail(ErrorKind::kUnavailable, "{}: {} broke: {}", operation.Text(), link.name,
                std::string_view(text, size));
  }
  const Operation& theirs = header.operation;
  if (valid && header.channel == channel_ && theirs.sequence <= operation.sequence && theirs != operation)
    return Invalid("{}", MismatchText(bystander.world_rank, theirs, mesh_.rank, operation));
  return true;
}

Status RemoteGroup::MoveAll(const Operation& operation, std::span<Transfer> transfers, Deadline deadline) {
  std::vector<Bystander> bystanders = BystandersOf(transfers);
  std::vector<pollfd> entries;
  std::vector<int> late;
  while (true) {
    bool moved = false;
    entries.clear();
    late.clear();
    for (Transfer& transfer : transfers) {
      ASSIGN_OR_RETURN(const bool sent, Send(transfer));
      ASSIGN_OR_RETURN(const bool received, Receive(transfer));
      moved |= sent || received;
      if (transfer.Sent() && transfer.Received()) continue;
      const int events = (transfer.Sent() ? 0 : POLLOUT) | (transfer.Received() ? 0 : POLLIN);
      entries.push_back({transfer.link->socket.descriptor(), static_cast<short>(events), 0});
      late.push_back(transfer.world_rank);
    }
    if (late.empty()) return {};
    if (moved) continue;
    for (size_t i = bystanders.size(); i-- > 0;) {
      if (!bystanders[i].ready) continue;
      ASSIGN_OR_RETURN(const bool seen, Look(operation, bystanders[i]));
      if (seen) bystanders.erase(bystanders.begin() + static_cast<int64_t>(i));
    }
    for (const Bystander& one : bystanders) entries.push_back({one.link->socket.descriptor(), POLLIN, 0});
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Deadline::clock::now()).count();
    if (left <= 0)
      return Fail(ErrorKind::kDeadline, "{}: rank {} did not come in time", operation.Text(),
                  fmt::join(late, ", "));
    poll(entries.data(), entries.size(), static_cast<int>(std::min<int64_t>(left, 60'000)));
    for (size_t i = 0; i < bystanders.size(); ++i)
      bystanders[i].ready = entries[late.size() + i].revents != 0;
  }
}

void RemoteGroup::Break(std::string_view why) const {
  FrameHeader header;
  header.kind = FrameHeader::kBroken;
  header.channel = static_cast<uint16_t>(channel_);
  header.epoch = mesh_.epoch;
  why = why.substr(0, FrameHeader::kMaxText);
  header.bytes = why.size();
  std::vector<std::byte> frame(sizeof(header) + why.size());
  std::memcpy(frame.data(), &header, sizeof(header));
  std::memcpy(frame.data() + sizeof(header), why.data(), why.size());
  for (const int rank : world_ranks_) {
    const TcpLink& link = mesh_.links[rank];
    if (!link.socket.open()) continue;
    // What does not go at once does not go: the end of the stream says enough.
    if (!link.inside_frame)
      (void)!send(link.socket.descriptor(), frame.data(), frame.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    shutdown(link.socket.descriptor(), SHUT_WR);
  }
}

}  // namespace tessera
