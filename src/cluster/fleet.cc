// Nodes join, ranks come up, steps go out and outputs come back.
#include "cluster/fleet.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "base/bytes.h"
#include "base/check.h"
#include "base/log.h"
#include "base/random.h"
#include "base/sha256.h"
#include "base/threads.h"
#include "cluster/frame.h"
#include "cluster/node_agent.h"

namespace tessera {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kHandshakeLimit{4};      // of one node
constexpr seconds kSendLimit{30};          // a rank that reads nothing for so long is broken
constexpr seconds kPatienceLine{10};       // between lines that say who is waited for
constexpr milliseconds kCauseLimit{1000};  // a closed link comes shortly before the news of the rank's end
constexpr milliseconds kLeaveLimit{3000};

std::string RanksText(NodeRanks ranks) {
  return ranks.count == 1 ? Format("rank {}", ranks.first)
                          : Format("ranks {} to {}", ranks.first, ranks.first + ranks.count - 1);
}

}  // namespace

int ThreadsPerRank(int threads_flag, int num_local) {
  return threads_flag > 0 ? threads_flag : std::max(1, AvailableCores() / std::max(1, num_local));
}

void SetLocalPart(RankSetup& setup, int local_rank, int num_local, int threads_flag) {
  setup.local_rank = local_rank;
  setup.num_local = num_local;
  setup.threads = ThreadsPerRank(threads_flag, num_local);
  setup.cores.clear();
  if (setup.threads * num_local > AvailableCores()) return;
  const std::vector<int> cores = AllowedCores();
  if (static_cast<int>(cores.size()) < setup.threads * num_local) return;
  const auto first = cores.begin() + int64_t{local_rank} * setup.threads;
  setup.cores.assign(first, first + setup.threads);
}

struct Fleet::Content {
  struct Node {
    FrameLink link;
    Hello hello;
    NodeRanks ranks() const {
      return {static_cast<int>(hello.first_rank), static_cast<int>(hello.num_ranks)};
    }
  };
  // A connection that frames come from: a rank of this node, or another node.
  struct Source {
    FrameLink* link = nullptr;
    int rank = -1;  // its only one
    std::string name;
    NodeRanks ranks;
  };

  FleetOptions options;
  std::function<bool()> cancelled;
  std::function<void(const Error&)> on_failure;
  uint64_t epoch = 0;
  std::vector<std::unique_ptr<Node>> nodes;
  std::unique_ptr<NodeAgent> agent;
  std::vector<Source> sources;
  std::vector<RankLoaded> loaded;

  std::mutex talking;  // held while frames are exchanged
  mutable std::mutex mutex;
  std::condition_variable failed;
  std::optional<Error> failure;            // guarded by mutex; the first cause
  bool running = false;                    // guarded by mutex: failures are told
  bool leaving = false;                    // guarded by mutex: ranks end because they were told to
  std::vector<RankStatus> statuses;        // guarded by mutex
  std::vector<CommunicatorCounts> counts;  // guarded by mutex; [world], of the last step
  std::thread monitor;
  Socket wake;  // an eventfd for the monitor

  int world() const { return options.setup.degrees.world(); }
  Status Join();
  Status Admit(Socket socket, std::vector<bool>& taken);
  Status CheckNode(const Hello& hello, const std::vector<bool>& taken) const;
  Status Spawn();
  Status BringUp();
  Status SetUp();
  Status SendTo(int rank, FrameType type, std::span<const std::byte> bytes);
  Status SendToAll(FrameType type, std::span<const std::byte> bytes);
  // One frame of that type from every rank.
  Result<std::vector<Frame>> Collect(FrameType type, Deadline deadline);
  Status Take(const Source& source, Frame frame, FrameType type, std::vector<std::optional<Frame>>& frames);
  Error Cause(const Error& seen);
  Error CauseOfLoss(const Source& source, const Error& seen);
  Error EndOfNode(Node& node, std::string why);
  void Break(const Error& error);
  void Monitor();
};

// -- Nodes

// What a node says must fit what it asks for.
Status Fleet::Content::CheckNode(const Hello& hello, const std::vector<bool>& taken) const {
  RETURN_IF_ERROR(CompareAgreements(options.agreement, hello.agreement));
  const uint64_t end = uint64_t{hello.first_rank} + hello.num_ranks;
  if (hello.num_ranks == 0 || end > static_cast<uint64_t>(world())) {
    return Invalid("the node brings ranks {} to {}, but there are ranks 0 to {}", hello.first_rank,
                   static_cast<int64_t>(end) - 1, world() - 1);
  }
  for (uint64_t rank = hello.first_rank; rank < end; ++rank) {
    const bool here = static_cast<int>(rank) >= options.local.first &&
                      static_cast<int>(rank) < options.local.first + options.local.count;
    if (taken[rank]) {
      return Invalid("the node brings rank {}, which {}", rank,
                     here ? "the head runs itself" : "another node has brought already");
    }
  }
  return {};
}

// A stranger who cannot prove the secret is no reason to stop; a node of this cluster that differs is.
Status Fleet::Content::Admit(Socket socket, std::vector<bool>& taken) {
  const auto peer = PeerEndpoint(socket);
  const std::string from = peer ? peer->Text() : "somewhere";
  const Deadline deadline = After(kHandshakeLimit);
  if (const Status proven = Authenticate(socket, 0, options.secret, deadline); !proven) {
    LogWarning("refused a node at {}: {}", from, proven.error().message);
    return {};
  }
  auto node = std::make_unique<Node>();
  node->link = FrameLink(std::move(socket), 0);
  const auto frame = node->link.Receive(deadline);
  if (!frame || frame->type != FrameType::kHello) {
    LogWarning("refused a node at {}: {}", from, frame ? "it does not say hello" : frame.error().message);
    return {};
  }
  Result<Hello> hello = DecodeHello(frame->bytes);
  Status checked = hello ? CheckNode(*hello, taken) : std::unexpected(hello.error());
  if (!checked) {
    const std::string text = checked.error().message;
    (void)node->link.Send(FrameType::kRefuse, kAllRanks, EncodeText(text), deadline);
    return Invalid("refused the node at {}: {}", from, text);
  }
  node->hello = *std::move(hello);
  const Welcome welcome{.cluster = Format("{:016x}", epoch), .epoch = epoch};
  RETURN_IF_ERROR(node->link.Send(FrameType::kWelcome, kAllRanks, Encode(welcome), deadline));
  node->link.set_epoch(epoch);
  const NodeRanks ranks = node->ranks();
  for (int rank = ranks.first; rank < ranks.first + ranks.count; ++rank) taken[rank] = true;
  LogInfo("{} at {} brings {}", node->hello.name, from, RanksText(ranks));
  nodes.push_back(std::move(node));
  return {};
}

Status Fleet::Content::Join() {
  std::vector<bool> taken(static_cast<size_t>(world()));
  for (int i = 0; i < options.local.count; ++i) taken[options.local.first + i] = true;
  const auto missing = [&] {
    std::vector<int> ranks;
    for (int rank = 0; rank < world(); ++rank) {
      if (!taken[rank]) ranks.push_back(rank);
    }
    return ranks;
  };
  if (missing().empty()) return {};
  ASSIGN_OR_RETURN(const Socket listener, Listen(options.control));
  ASSIGN_OR_RETURN(const Endpoint bound, LocalEndpoint(listener));
  if (IsLoopback(bound.address) && !IsLoopback(options.control.address)) {
    LogWarning(
        "'{}' is {} on this host, which no other host can reach: give the head's address on the network, "
        "or its interface in GLOO_SOCKET_IFNAME",
        options.control.address, bound.address);
  }
  const Endpoint control = {.address = options.control.address, .port = bound.port};
  LogInfo("waiting on {} for nodes that bring ranks {}", control.Text(), fmt::join(missing(), ", "));
  if (options.on_listening) RETURN_IF_ERROR(options.on_listening(control));
  const Deadline limit = After(options.join_limit);
  Deadline next_line = After(kPatienceLine);
  while (!missing().empty()) {
    if (cancelled()) return Fail(ErrorKind::kUnavailable, "stopped while waiting for nodes");
    Result<Socket> socket = Accept(listener, After(milliseconds(100)));
    if (socket) {
      RETURN_IF_ERROR(Admit(*std::move(socket), taken));
    } else if (socket.error().kind != ErrorKind::kDeadline) {
      return std::unexpected(socket.error());
    }
    const auto now = std::chrono::steady_clock::now();
    if (now >= limit) {
      return Fail(ErrorKind::kDeadline, "ranks {} did not join {} within {} s", fmt::join(missing(), ", "),
                  control.Text(), std::chrono::duration_cast<seconds>(options.join_limit).count());
    }
    if (now >= next_line) {
      LogInfo("still waiting on {} for ranks {}", control.Text(), fmt::join(missing(), ", "));
      next_line = After(kPatienceLine);
    }
  }
  return {};
}

// -- Ranks

Status Fleet::Content::Spawn() {
  const NodeAgentOptions of_agent{
      .degrees = options.setup.degrees, .first_rank = options.local.first, .num_ranks = options.local.count};
  ASSIGN_OR_RETURN(agent, NodeAgent::Start(of_agent, [this](const std::string& text) {
                     Break({ErrorKind::kUnavailable, text});
                   }));
  const std::lock_guard lock(mutex);  // a rank may end already
  statuses.resize(static_cast<size_t>(world()));
  counts.resize(static_cast<size_t>(world()));
  for (int rank = 0; rank < world(); ++rank) {
    const Topology topology(options.setup.degrees, rank);
    statuses[rank] = {.rank = rank,
                      .dp = topology.dp_rank(),
                      .tp = topology.tp_rank(),
                      .ep = topology.moe_ep_rank(),
                      .up = true};
  }
  for (int i = 0; i < options.local.count; ++i) {
    const int rank = options.local.first + i;
    statuses[rank].process = agent->process(i);
    statuses[rank].node = HostName();
    sources.push_back({&agent->link(i), rank, Format("rank {}", rank), {rank, 1}});
  }
  for (const auto& node : nodes) {
    const NodeRanks ranks = node->ranks();
    sources.push_back(
        {&node->link, -1, Format("node {} with {}", node->hello.name, RanksText(ranks)), ranks});
    for (int rank = ranks.first; rank < ranks.first + ranks.count; ++rank)
      statuses[rank].node = node->hello.name;
  }
  return {};
}

Status Fleet::Content::SetUp() {
  RankSetup setup = options.setup;
  setup.epoch = epoch;
  setup.secret = options.secret;
  setup.node_of_rank.assign(static_cast<size_t>(world()), 0);
  for (size_t n = 0; n < nodes.size(); ++n) {
    const NodeRanks ranks = nodes[n]->ranks();
    std::fill_n(setup.node_of_rank.begin() + ranks.first, ranks.count, static_cast<int32_t>(n) + 1);
  }
  const bool several = nodes.size() + (options.local.count > 0 ? 1 : 0) > 1;
  for (int i = 0; i < options.local.count; ++i) {
    setup.rank = options.local.first + i;
    setup.data_address = several ? options.data_address : "";
    SetLocalPart(setup, i, options.local.count, options.setup.threads);
    RETURN_IF_ERROR(SendTo(setup.rank, FrameType::kSetup, Encode(setup)));
  }
  for (const auto& node : nodes) {
    const NodeRanks ranks = node->ranks();
    for (int rank = ranks.first; rank < ranks.first + ranks.count; ++rank) {
      setup.rank = rank;  // the node's agent fills in its own part, and the secret, which does not travel
      setup.secret.clear();
      setup.data_address = several ? node->hello.data_address : "";
      RETURN_IF_ERROR(SendTo(rank, FrameType::kSetup, Encode(setup)));
    }
  }
  return {};
}

Status Fleet::Content::BringUp() {
  RETURN_IF_ERROR(SetUp());
  ASSIGN_OR_RETURN(const std::vector<Frame> listening, Collect(FrameType::kListening, After(seconds(60))));
  std::vector<std::string> addresses;
  for (const Frame& frame : listening) {
    ASSIGN_OR_RETURN(std::string address, DecodeText(frame.bytes));
    addresses.push_back(std::move(address));
  }
  RETURN_IF_ERROR(SendToAll(FrameType::kConnect, Encode(addresses)));
  ASSIGN_OR_RETURN(const std::vector<Frame> frames, Collect(FrameType::kLoaded, After(options.load_limit)));
  for (size_t rank = 0; rank < frames.size(); ++rank) {
    ASSIGN_OR_RETURN(RankLoaded report, DecodeRankLoaded(frames[rank].bytes));
    const std::lock_guard lock(mutex);
    statuses[rank].weight_bytes = report.weight_bytes;
    loaded.push_back(std::move(report));
  }
  return {};
}

Status Fleet::Content::SendTo(int rank, FrameType type, std::span<const std::byte> bytes) {
  const auto source = std::ranges::find_if(sources, [&](const Source& s) {
    return rank >= s.ranks.first && rank < s.ranks.first + s.ranks.count;
  });
  if (const Status sent = source->link->Send(type, static_cast<uint16_t>(rank), bytes, After(kSendLimit));
      !sent) {
    return std::unexpected(CauseOfLoss(*source, sent.error()));
  }
  return {};
}

Status Fleet::Content::SendToAll(FrameType type, std::span<const std::byte> bytes) {
  for (const Source& source : sources) {
    if (const Status sent = source.link->Send(type, kAllRanks, bytes, After(kSendLimit)); !sent) {
      return std::unexpected(CauseOfLoss(source, sent.error()));
    }
  }
  return {};
}

Status Fleet::Content::Take(const Source& source, Frame frame, FrameType type,
                            std::vector<std::optional<Frame>>& frames) {
  const int rank = source.rank >= 0 ? source.rank : frame.rank;
  if (rank < source.ranks.first || rank >= source.ranks.first + source.ranks.count) {
    return Fail(ErrorKind::kUnavailable, "{} speaks for rank {}", source.name, rank);
  }
  if (frame.type == FrameType::kFailed || frame.type == FrameType::kGone) {
    ASSIGN_OR_RETURN(const std::string text, DecodeText(frame.bytes));
    if (frame.type == FrameType::kFailed) return Fail(ErrorKind::kUnavailable, "rank {}: {}", rank, text);
    const Error gone{ErrorKind::kUnavailable, Format("{}, on node {}", text, statuses[rank].node)};
    Break(gone);  // the cause, whatever else is heard
    return std::unexpected(gone);
  }
  if (frame.type == FrameType::kStarted) {
    ByteReader reader(frame.bytes);
    const std::lock_guard lock(mutex);
    statuses[rank].process = reader.Read<int32_t>();
    return {};
  }
  if (frame.type != type || frames[rank]) {
    return Fail(ErrorKind::kUnavailable, "rank {} sent frame {} where frame {} is wanted", rank,
                static_cast<int>(frame.type), static_cast<int>(type));
  }
  frames[rank] = std::move(frame);
  return {};
}

Result<std::vector<Frame>> Fleet::Content::Collect(FrameType type, Deadline deadline) {
  std::vector<std::optional<Frame>> frames(static_cast<size_t>(world()));
  std::vector<pollfd> waits;
  for (const Source& source : sources)
    waits.push_back({.fd = source.link->socket().descriptor(), .events = POLLIN, .revents = 0});
  const auto complete = [&] {
    return std::ranges::all_of(frames, [](const auto& frame) { return frame.has_value(); });
  };
  while (!complete()) {
    if (cancelled()) return Fail(ErrorKind::kUnavailable, "stopped while the ranks start");
    if (std::chrono::steady_clock::now() >= deadline) {
      std::vector<int> silent;
      for (int rank = 0; rank < world(); ++rank) {
        if (!frames[rank]) silent.push_back(rank);
      }
      return Fail(ErrorKind::kDeadline, "ranks {} did not answer in time", fmt::join(silent, ", "));
    }
    poll(waits.data(), waits.size(), 200);
    for (size_t i = 0; i < sources.size(); ++i) {
      if (waits[i].revents == 0) continue;
      for (;;) {
        auto frame = sources[i].link->TryReceive();
        if (!frame) return std::unexpected(CauseOfLoss(sources[i], frame.error()));
        if (!*frame) break;
        if (Status taken = Take(sources[i], **std::move(frame), type, frames); !taken)
          return std::unexpected(Cause(taken.error()));
      }
    }
  }
  std::vector<Frame> all;
  for (auto& frame : frames) all.push_back(*std::move(frame));
  return all;
}

// -- Failures

// What a broken link comes from, when the agent tells soon.
Error Fleet::Content::Cause(const Error& seen) {
  std::unique_lock lock(mutex);
  failed.wait_for(lock, kCauseLimit, [&] { return failure.has_value(); });
  return failure.value_or(seen);
}

// A link that broke: this host's agent will tell how the rank ended. A node can have told already; else it is
// the cause itself, and the ranks that end for want of it must not be named instead.
Error Fleet::Content::CauseOfLoss(const Source& source, const Error& seen) {
  for (const auto& node : nodes) {
    if (&node->link != source.link) continue;
    Break(EndOfNode(*node, seen.message));
    break;
  }
  return Cause({seen.kind, source.name + ": " + seen.message});
}

// What a node whose link is closing said last, or else `why`.
Error Fleet::Content::EndOfNode(Node& node, std::string why) {
  for (;;) {
    const auto frame = node.link.TryReceive();
    if (!frame && why.empty()) why = frame.error().message;  // a socket tells its error once, then its end
    if (!frame || !*frame) break;
    if ((*frame)->type != FrameType::kGone) continue;
    if (const auto text = DecodeText((*frame)->bytes))
      return {ErrorKind::kUnavailable, Format("{}, on node {}", *text, node.hello.name)};
  }
  return {ErrorKind::kUnavailable,
          Format("node {} with {} is gone: {}", node.hello.name, RanksText(node.ranks()), why)};
}

void Fleet::Content::Break(const Error& error) {
  bool tell = false;
  {
    const std::lock_guard lock(mutex);
    if (failure || leaving) return;
    failure = error;
    tell = running;
    for (RankStatus& status : statuses) status.up = false;
    for (const Source& source : sources) source.link->socket().Shutdown();
    failed.notify_all();
  }
  if (tell) on_failure(error);
}

// Between steps nobody reads the nodes' links: this thread sees them close.
void Fleet::Content::Monitor() {
  std::vector<pollfd> waits = {{.fd = wake.descriptor(), .events = POLLIN, .revents = 0}};
  for (const auto& node : nodes)
    waits.push_back({.fd = node->link.socket().descriptor(), .events = POLLRDHUP, .revents = 0});
  for (;;) {
    if (poll(waits.data(), waits.size(), -1) < 0) continue;
    if (waits[0].revents != 0) return;
    const std::lock_guard lock(talking);
    for (size_t i = 0; i < nodes.size(); ++i) {
      if (waits[i + 1].revents == 0) continue;
      Break(EndOfNode(*nodes[i], ""));
      return;
    }
  }
}

// -- The face

Fleet::Fleet(std::unique_ptr<Content> content) : content_(std::move(content)) {}

Result<std::unique_ptr<Fleet>> Fleet::Start(const FleetOptions& options,
                                            const std::function<bool()>& cancelled,
                                            std::function<void(const Error&)> on_failure) {
  std::unique_ptr<Fleet> fleet(new Fleet(std::make_unique<Content>()));
  Content& content = *fleet->content_;
  content.options = options;
  content.cancelled = cancelled;
  content.on_failure = std::move(on_failure);
  FillRandom(std::as_writable_bytes(std::span(&content.epoch, 1)));
  content.wake = Socket(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  RETURN_IF_ERROR(content.Join());
  RETURN_IF_ERROR(content.Spawn());
  RETURN_IF_ERROR(content.BringUp());
  content.cancelled = [] { return false; };  // from now on a step runs to its end
  content.monitor = std::thread([&content] { content.Monitor(); });
  return fleet;
}

Fleet::~Fleet() {
  Stop();
}

const std::vector<RankLoaded>& Fleet::loaded() const {
  return content_->loaded;
}

Status Fleet::Begin(int num_blocks) {
  Content& content = *content_;
  const std::lock_guard talking(content.talking);
  ByteWriter order;
  order.Write(static_cast<int32_t>(num_blocks));
  RETURN_IF_ERROR(content.SendToAll(FrameType::kStart, order.bytes()));
  ASSIGN_OR_RETURN(const auto ready, content.Collect(FrameType::kReady, After(std::chrono::minutes(10))));
  const std::lock_guard lock(content.mutex);
  content.running = true;
  return {};
}

Result<StepOutput> Fleet::Run(const Step& step) {
  Content& content = *content_;
  const std::lock_guard talking(content.talking);
  const auto run = [&]() -> Result<StepOutput> {
    RETURN_IF_ERROR(content.SendToAll(FrameType::kStep, Encode(step)));
    const milliseconds limit(content.options.setup.deadline_ms);
    ASSIGN_OR_RETURN(const auto frames, content.Collect(FrameType::kOutput, After(2 * limit)));
    std::vector<RankOutput> outputs;
    for (size_t rank = 0; rank < frames.size(); ++rank) {
      ASSIGN_OR_RETURN(RankReport report, DecodeRankReport(frames[rank].bytes));
      outputs.push_back(std::move(report.output));
      const std::lock_guard lock(content.mutex);
      content.counts[rank] = report.counts;
    }
    return MergeOutputs(step, content.options.setup.degrees, outputs);
  };
  Result<StepOutput> output = run();
  if (!output) content.Break(output.error());
  return output;
}

std::vector<RankStatus> Fleet::Ranks() const {
  const std::lock_guard lock(content_->mutex);
  std::vector<RankStatus> statuses = content_->statuses;
  for (size_t rank = 0; rank < statuses.size(); ++rank) {
    for (int i = 0; i < kNumCollectives; ++i) {
      const CollectiveCounts& counts = content_->counts[rank][i];
      statuses[rank].exchanges.push_back({std::string(CollectiveName(static_cast<Collective>(i))),
                                          counts.calls, counts.bytes, counts.wire_bytes});
    }
  }
  return statuses;
}

void Fleet::Stop() {
  Content& content = *content_;
  bool broken = false;
  {
    const std::lock_guard lock(content.mutex);
    content.running = false;
    content.leaving = true;
    broken = content.failure.has_value();
  }
  if (content.monitor.joinable()) {
    const uint64_t one = 1;
    (void)!write(content.wake.descriptor(), &one, sizeof one);
    content.monitor.join();
  }
  for (const Content::Source& source : content.sources)
    (void)source.link->Send(FrameType::kStop, kAllRanks, {}, After(milliseconds(500)));
  if (content.agent != nullptr) content.agent->Stop(broken ? milliseconds(0) : kLeaveLimit);
  content.sources.clear();
  content.nodes.clear();
  content.agent.reset();
}

}  // namespace tessera
