// One thread passes frames on; the agent's thread says which rank has ended.
#include "cluster/node.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <mutex>
#include <optional>
#include <thread>

#include "base/bytes.h"
#include "base/log.h"
#include "cluster/frame.h"
#include "cluster/node_agent.h"

namespace tessera {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kPatienceLine{10};
constexpr seconds kHandshakeLimit{5};
constexpr seconds kSendLimit{30};
constexpr milliseconds kLeaveLimit{3000};
constexpr milliseconds kLingerLimit{1000};
constexpr milliseconds kPause{200};  // between tries, and between looks at `stopped`

class Node {
 public:
  Node(const NodeOptions& options, const std::function<bool()>& stopped)
      : options_(options), stopped_(stopped) {}

  Status Run();

 private:
  Result<Socket> FindHead(Deadline limit);
  Status Greet(Socket socket);
  Status Join();
  Status StartRanks();
  Status Relay();
  void Linger();
  Status FromHead(Frame frame);
  Status Setup(Frame& frame);
  std::optional<std::string> Ended() {
    const std::lock_guard lock(mutex_);
    return ended_;
  }

  const NodeOptions& options_;
  const std::function<bool()>& stopped_;
  FrameLink head_;
  const std::string name_ = Format("{}:{}", HostName(), getpid());
  std::string data_address_;
  std::unique_ptr<NodeAgent> agent_;
  bool leaving_ = false;
  std::mutex mutex_;
  std::optional<std::string> ended_;                           // how the first rank to end did
  const Socket wake_{eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};  // readable when one has
};

// The head may start later than its nodes.
Result<Socket> Node::FindHead(Deadline limit) {
  Deadline next_line = After(kPatienceLine);
  for (;;) {
    auto socket = Connect(options_.head, After(seconds(2)), options_.source);
    if (socket) return socket;
    if (stopped_()) return Fail(ErrorKind::kUnavailable, "stopped while looking for the head");
    const auto now = std::chrono::steady_clock::now();
    if (now >= limit) {
      return Fail(ErrorKind::kDeadline, "the head did not appear within {} s: {}",
                  std::chrono::duration_cast<seconds>(options_.join_limit).count(), socket.error().message);
    }
    if (now >= next_line) {
      LogInfo("still looking for the head: {}", socket.error().message);
      next_line = After(kPatienceLine);
    }
    std::this_thread::sleep_for(kPause);
  }
}

Status Node::Greet(Socket socket) {
  const Deadline deadline = After(kHandshakeLimit);
  RETURN_IF_ERROR(Authenticate(socket, 1, options_.secret, deadline));
  data_address_ = options_.data_address;
  if (data_address_.empty()) {
    ASSIGN_OR_RETURN(const Endpoint local, LocalEndpoint(socket));
    data_address_ = local.address;
  }
  head_ = FrameLink(std::move(socket), 0);
  const Hello hello{.first_rank = static_cast<uint32_t>(options_.ranks.first),
                    .num_ranks = static_cast<uint32_t>(options_.ranks.count),
                    .process = static_cast<uint32_t>(getpid()),
                    .name = name_,
                    .data_address = data_address_,
                    .agreement = options_.agreement};
  RETURN_IF_ERROR(head_.Send(FrameType::kHello, kAllRanks, Encode(hello), deadline));
  ASSIGN_OR_RETURN(const Frame frame, head_.Receive(deadline));
  if (frame.type == FrameType::kRefuse) {
    ASSIGN_OR_RETURN(const std::string text, DecodeText(frame.bytes));
    return Invalid("the head at {} refuses this node: {}", options_.head.Text(), text);
  }
  ASSIGN_OR_RETURN(const Welcome welcome, DecodeWelcome(frame.bytes));
  head_.set_epoch(welcome.epoch);
  LogInfo("joined cluster {} at {}", welcome.cluster, options_.head.Text());
  return {};
}

// A head that says nothing in time is busy with somebody who does not: there is another try.
Status Node::Join() {
  const Deadline limit = After(options_.join_limit);
  for (;;) {
    ASSIGN_OR_RETURN(Socket socket, FindHead(limit));
    const Status greeted = Greet(std::move(socket));
    if (greeted || greeted.error().kind != ErrorKind::kDeadline) return greeted;
    if (stopped_() || std::chrono::steady_clock::now() >= limit) return greeted;
    LogInfo("trying again to join the head at {}: {}", options_.head.Text(), greeted.error().message);
  }
}

Status Node::StartRanks() {
  const NodeAgentOptions of_agent{
      .degrees = options_.degrees, .first_rank = options_.ranks.first, .num_ranks = options_.ranks.count};
  ASSIGN_OR_RETURN(agent_, NodeAgent::Start(of_agent, [this](const std::string& text) {
                     const std::lock_guard lock(mutex_);
                     if (!ended_) ended_ = text;
                     eventfd_write(wake_.descriptor(), 1);
                   }));
  for (int i = 0; i < agent_->num_ranks(); ++i) {
    ByteWriter process;
    process.Write(static_cast<int32_t>(agent_->process(i)));
    RETURN_IF_ERROR(head_.Send(FrameType::kStarted, static_cast<uint16_t>(options_.ranks.first + i),
                               process.bytes(), After(kSendLimit)));
  }
  return {};
}

// This host's part of what a rank is told.
Status Node::Setup(Frame& frame) {
  ASSIGN_OR_RETURN(RankSetup setup, DecodeRankSetup(frame.bytes));
  setup.model = options_.model;
  setup.isa = options_.isa;
  setup.secret = options_.secret;
  setup.decode_threads = options_.decode_threads;
  SetLocalPart(setup, setup.rank - options_.ranks.first, options_.ranks.count, options_.threads);
  frame.bytes = Encode(setup);
  return {};
}

Status Node::FromHead(Frame frame) {
  if (frame.type == FrameType::kStop) leaving_ = true;
  for (int i = 0; i < agent_->num_ranks(); ++i) {
    const int rank = options_.ranks.first + i;
    if (frame.rank != kAllRanks && frame.rank != rank) continue;
    if (frame.type == FrameType::kSetup) RETURN_IF_ERROR(Setup(frame));
    const Status sent =
        agent_->link(i).Send(frame.type, static_cast<uint16_t>(rank), frame.bytes, After(kSendLimit));
    // Where the link is closed, the agent knows why in a moment.
    if (!sent && sent.error().kind == ErrorKind::kDeadline) {
      return Fail(ErrorKind::kDeadline, "rank {} reads nothing: {}", rank, sent.error().message);
    }
  }
  return {};
}

Status Node::Relay() {
  std::vector<pollfd> waits = {{.fd = head_.socket().descriptor(), .events = POLLIN, .revents = 0}};
  for (int i = 0; i < agent_->num_ranks(); ++i)
    waits.push_back({.fd = agent_->link(i).socket().descriptor(), .events = POLLIN, .revents = 0});
  waits.push_back({.fd = wake_.descriptor(), .events = POLLIN, .revents = 0});
  while (!leaving_ && !stopped_()) {
    if (const auto text = Ended()) return Fail(ErrorKind::kUnavailable, "{}", *text);
    poll(waits.data(), waits.size(), static_cast<int>(kPause.count()));
    if (waits[0].revents != 0) {
      for (;;) {
        auto frame = head_.TryReceive();
        if (!frame) return Fail(ErrorKind::kUnavailable, "the head is gone: {}", frame.error().message);
        if (!*frame) break;
        RETURN_IF_ERROR(FromHead(**std::move(frame)));
        if (leaving_) return {};  // the head closes after its order to stop
      }
    }
    for (int i = 0; i < agent_->num_ranks(); ++i) {
      if (waits[i + 1].revents == 0) continue;
      for (;;) {
        auto frame = agent_->link(i).TryReceive();
        if (!frame) {  // the agent knows why in a moment
          waits[i + 1].fd = -1;
          break;
        }
        if (!*frame) break;
        RETURN_IF_ERROR(head_.Send((*frame)->type, static_cast<uint16_t>(options_.ranks.first + i),
                                   (*frame)->bytes, After(kSendLimit)));
      }
    }
  }
  return {};
}

// Closing with unread steps would reset the connection, and the head could lose this node's last words.
void Node::Linger() {
  shutdown(head_.socket().descriptor(), SHUT_WR);
  const Deadline limit = After(kLingerLimit);
  pollfd wait = {.fd = head_.socket().descriptor(), .events = POLLIN, .revents = 0};
  char nobody_reads[4096];
  while (std::chrono::steady_clock::now() < limit) {
    if (poll(&wait, 1, static_cast<int>(kPause.count())) <= 0) continue;
    if (recv(wait.fd, nobody_reads, sizeof nobody_reads, 0) <= 0) return;
  }
}

Status Node::Run() {
  RETURN_IF_ERROR(Join());
  RETURN_IF_ERROR(StartRanks());
  Status status = Relay();
  if (!leaving_) {  // it is not the head that ends this
    const std::string text =
        status ? Format("node {} was told to stop by a signal", name_) : status.error().message;
    (void)head_.Send(FrameType::kGone, static_cast<uint16_t>(options_.ranks.first), EncodeText(text),
                     After(seconds(1)));
    if (status) {
      for (int i = 0; i < agent_->num_ranks(); ++i)
        (void)agent_->link(i).Send(FrameType::kStop, kAllRanks, {}, After(milliseconds(500)));
    }
  }
  agent_->Stop(status ? kLeaveLimit : milliseconds(0));
  if (!leaving_) Linger();
  return status;
}

}  // namespace

Status RunNode(const NodeOptions& options, const std::function<bool()>& stopped) {
  return Node(options, stopped).Run();
}

}  // namespace tessera
