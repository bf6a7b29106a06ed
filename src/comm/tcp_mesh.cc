// Making the links: connect downwards, accept from above, prove the secret, compare epoch and ranks.
#include "comm/tcp_mesh.h"

#include <poll.h>

#include <algorithm>
#include <deque>
#include <thread>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "comm/tcp_frames.h"

namespace tessera {
namespace {

using std::chrono::milliseconds;

// Of one connection that has begun to speak; a stranger may waste this much of our time, and one that says
// nothing none at all.
constexpr milliseconds kHandshakeTime{2000};
constexpr milliseconds kFirstPause{20}, kLongestPause{500};  // between tries to connect
constexpr size_t kMaxWaiting = 1024;                         // connections that have not spoken yet

template <typename T>
std::span<const std::byte> BytesOf(const T& value) {
  return std::as_bytes(std::span(&value, 1));
}
template <typename T>
std::span<std::byte> WritableBytesOf(T& value) {
  return std::as_writable_bytes(std::span(&value, 1));
}

class MeshBuilder {
 public:
  MeshBuilder(const Socket& listener, const MeshOptions& options, Deadline deadline)
      : listener_(listener), options_(options), deadline_(deadline), links_(options.node_of_rank.size()) {}

  Status Build();
  std::vector<TcpLink> TakeLinks() { return std::move(links_); }

 private:
  int world() const { return static_cast<int>(links_.size()); }
  bool IsRemote(int rank) const {
    return options_.node_of_rank[rank] != options_.node_of_rank[options_.rank];
  }
  std::string NameOf(int rank) const {
    return rank < static_cast<int>(options_.addresses.size()) && !options_.addresses[rank].empty()
               ? Format("rank {} ({})", rank, options_.addresses[rank])
               : Format("rank {}", rank);
  }
  MeshHello HelloFor(uint32_t peer) const;
  Status CompareHello(const MeshHello& hello) const;
  Result<Socket> ConnectTo(int rank);
  Result<Socket> ConnectPatiently(int rank);
  Status AcceptAll();
  std::vector<int> MissingRanks() const;
  Status TurnAwayOrTake(Socket socket);
  void Keep(int rank, Socket socket);

  const Socket& listener_;
  const MeshOptions& options_;
  const Deadline deadline_;
  std::vector<TcpLink> links_;
  std::string last_refusal_;
};

MeshHello MeshBuilder::HelloFor(uint32_t peer) const {
  MeshHello hello;
  hello.world = static_cast<uint32_t>(world());
  hello.epoch = options_.epoch;
  hello.rank = static_cast<uint32_t>(options_.rank);
  hello.peer = peer;
  return hello;
}

// What does not depend on who of the two connected.
Status MeshBuilder::CompareHello(const MeshHello& hello) const {
  if (hello.magic != MeshHello::kMagic) return Invalid("a peer that is not a rank");
  if (hello.version != MeshHello::kVersion)
    return Invalid("rank {} speaks version {} of the protocol, rank {} version {}", hello.rank, hello.version,
                   options_.rank, MeshHello::kVersion);
  if (hello.epoch != options_.epoch)
    return Invalid("rank {} is in epoch {}, rank {} in epoch {}", hello.rank, hello.epoch, options_.rank,
                   options_.epoch);
  if (hello.world != links_.size())
    return Invalid("rank {} is in a world of {} ranks, rank {} in one of {}", hello.rank, hello.world,
                   options_.rank, links_.size());
  if (hello.peer != static_cast<uint32_t>(options_.rank))
    return Invalid("rank {} looks for rank {}, here is rank {}", hello.rank, hello.peer, options_.rank);
  return {};
}

void MeshBuilder::Keep(int rank, Socket socket) {
  links_[rank].socket = std::move(socket);
  links_[rank].name = NameOf(rank);
  links_[rank].buffer.resize(TcpLink::kBufferBytes);
}

Result<Socket> MeshBuilder::ConnectPatiently(int rank) {
  ASSIGN_OR_RETURN(const Endpoint endpoint, ParseEndpoint(options_.addresses[rank]));
  milliseconds pause = kFirstPause;
  while (true) {
    auto socket = tessera::Connect(endpoint, deadline_);
    if (socket || socket.error().kind != ErrorKind::kUnavailable) return socket;
    if (Deadline::clock::now() + pause >= deadline_)
      return Fail(ErrorKind::kDeadline, "rank {} cannot reach rank {} in time: {}", options_.rank, rank,
                  socket.error().message);
    std::this_thread::sleep_for(pause);  // nothing tells when somebody begins to listen
    pause = std::min(2 * pause, kLongestPause);
  }
}

Result<Socket> MeshBuilder::ConnectTo(int rank) {
  ASSIGN_OR_RETURN(Socket socket, ConnectPatiently(rank));
  RETURN_IF_ERROR(Authenticate(socket, 1, options_.secret, deadline_));
  RETURN_IF_ERROR(WriteAll(socket, BytesOf(HelloFor(static_cast<uint32_t>(rank))), deadline_));
  MeshHello hello;
  RETURN_IF_ERROR(ReadAll(socket, WritableBytesOf(hello), deadline_));
  if (hello.magic == MeshHello::kMagic && hello.rank != static_cast<uint32_t>(rank))
    return Invalid("{} is rank {}", NameOf(rank), hello.rank);
  RETURN_IF_ERROR(CompareHello(hello));
  if (hello.accepted == 0)
    return Invalid("{} has turned rank {} away: it has that link already, or wants none", NameOf(rank),
                   options_.rank);
  return socket;
}

// An authenticated peer is answered with our own hello before it is turned away, so that it can name both
// values.
Status MeshBuilder::TurnAwayOrTake(Socket socket) {
  const Deadline deadline = std::min(deadline_, After(kHandshakeTime));
  RETURN_IF_ERROR(Authenticate(socket, 0, options_.secret, deadline));
  MeshHello hello;
  RETURN_IF_ERROR(ReadAll(socket, WritableBytesOf(hello), deadline));
  Status verdict = CompareHello(hello);
  if (verdict) {
    const bool possible = hello.rank < links_.size() && hello.rank > static_cast<uint32_t>(options_.rank) &&
                          IsRemote(static_cast<int>(hello.rank));
    if (!possible)
      verdict = Invalid("rank {} expects no link from rank {}", options_.rank, hello.rank);
    else if (links_[hello.rank].socket.open())
      verdict = Invalid("rank {} connected to rank {} twice", hello.rank, options_.rank);
  }
  MeshHello answer = HelloFor(hello.rank);
  answer.accepted = verdict ? 1 : 0;
  RETURN_IF_ERROR(WriteAll(socket, BytesOf(answer), deadline));
  if (verdict) Keep(static_cast<int>(hello.rank), std::move(socket));
  return verdict;
}

std::vector<int> MeshBuilder::MissingRanks() const {
  std::vector<int> missing;
  for (int rank = options_.rank + 1; rank < world(); ++rank)
    if (IsRemote(rank) && !links_[rank].socket.open()) missing.push_back(rank);
  return missing;
}

// Connections wait in a list until they speak; only then a handshake with a short deadline of its own begins.
Status MeshBuilder::AcceptAll() {
  std::deque<Socket> waiting;
  while (!MissingRanks().empty()) {
    std::vector<pollfd> entries;
    for (const Socket& socket : waiting) entries.push_back({socket.descriptor(), POLLIN, 0});
    entries.push_back({listener_.descriptor(), POLLIN, 0});
    const auto left = std::chrono::ceil<milliseconds>(deadline_ - Deadline::clock::now()).count();
    if (left <= 0)
      return Fail(ErrorKind::kDeadline, "rank {}: rank {} did not connect in time{}", options_.rank,
                  fmt::join(MissingRanks(), ", "),
                  last_refusal_.empty() ? "" : "; last turned away: " + last_refusal_);
    poll(entries.data(), entries.size(), static_cast<int>(std::min<int64_t>(left, 60'000)));
    for (size_t i = waiting.size(); i-- > 0;) {
      if (entries[i].revents == 0) continue;
      Socket socket = std::move(waiting[i]);
      waiting.erase(waiting.begin() + static_cast<int64_t>(i));
      if (const Status taken = TurnAwayOrTake(std::move(socket)); !taken) {
        last_refusal_ = taken.error().message;
        LogWarning("rank {} turned a connection away: {}", options_.rank, last_refusal_);
      }
    }
    if (entries.back().revents == 0) continue;
    auto socket = Accept(listener_, Deadline::clock::now());
    if (socket)
      waiting.push_back(std::move(*socket));
    else if (socket.error().kind != ErrorKind::kDeadline)
      return std::unexpected(socket.error());
    if (waiting.size() > kMaxWaiting) waiting.pop_front();
  }
  return {};
}

Status MeshBuilder::Build() {
  CHECK(options_.rank >= 0 && options_.rank < world());
  CHECK_EQ(options_.addresses.size(), links_.size());
  for (int rank = 0; rank < options_.rank; ++rank) {
    if (!IsRemote(rank)) continue;
    ASSIGN_OR_RETURN(Socket socket, ConnectTo(rank));
    Keep(rank, std::move(socket));
  }
  return AcceptAll();
}

}  // namespace

Result<std::unique_ptr<TcpMesh>> TcpMesh::Connect(const Socket& listener, const MeshOptions& options,
                                                  Deadline deadline) {
  MeshBuilder builder(listener, options, deadline);
  RETURN_IF_ERROR(builder.Build());
  auto content = std::make_unique<Content>();
  content->rank = options.rank;
  content->epoch = options.epoch;
  content->links = builder.TakeLinks();
  return std::unique_ptr<TcpMesh>(new TcpMesh(std::move(content)));
}

TcpMesh::TcpMesh(std::unique_ptr<Content> content) : content_(std::move(content)) {}
TcpMesh::~TcpMesh() = default;

void TcpMesh::Abort() {
  content_->aborted = true;
  for (const TcpLink& link : content_->links) link.socket.Shutdown();
}

}  // namespace tessera
