// From the setup to the loop of steps; see fleet.h for the order of messages.
#include "cluster/rank_process.h"

#include <poll.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <span>
#include <thread>

#include "base/bytes.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/threads.h"
#include "cluster/frame.h"
#include "cluster/messages.h"
#include "cluster/node_agent.h"
#include "cluster/rank.h"
#include "comm/shared_memory.h"
#include "comm/tcp_mesh.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"

namespace tessera {
namespace {

using std::chrono::minutes;

constexpr minutes kSetupLimit{1};
constexpr std::chrono::milliseconds kModesty{700};

class RankProcess {
 public:
  RankProcess() : link_(Socket(kRankLinkDescriptor), 0) {}

  // The agent may die while this rank computes or waits for another one: then it leaves at once.
  void LeaveWithAgent() {
    std::thread([this] {
      pollfd wait{.fd = kRankLinkDescriptor, .events = POLLRDHUP, .revents = 0};
      while (poll(&wait, 1, -1) < 0) {
      }
      if (!leaving_) _exit(1);
    }).detach();
  }

  int Run() {
    if (const Status status = Serve(); !status) {
      const std::string& message = status.error().message;
      // A rank that died breaks the exchanges of all others: its own agent should be the first to tell.
      if (hands_ != nullptr) std::this_thread::sleep_for(kModesty);
      LogError("{}", message);
      (void)link_.Send(FrameType::kFailed, rank_, EncodeText(message), After(std::chrono::seconds(1)));
      return 1;
    }
    return 0;
  }

 private:
  Status Serve();
  Status Meet();
  Status Load();
  Status MakeRank();
  Status Steps();
  Result<Frame> Expect(FrameType type, Deadline deadline);
  Status Send(FrameType type, std::span<const std::byte> bytes) {
    return link_.Send(type, rank_, bytes, After(minutes(1)));
  }
  Deadline Forever() const { return Deadline::max(); }

  FrameLink link_;
  std::atomic<bool> leaving_{false};
  uint16_t rank_ = kAllRanks;
  RankSetup setup_;
  Topology topology_;
  const kernels::Kernels* kernels_ = nullptr;
  std::unique_ptr<SharedMemory> memory_;
  std::unique_ptr<TcpMesh> mesh_;
  std::unique_ptr<Communicator> world_, group_;
  std::unique_ptr<ThreadPool> threads_;
  ModelConfig config_;
  Weights weights_;
  std::unique_ptr<Rank> hands_;
};

// The next frame, which is of that type; or the order to stop.
Result<Frame> RankProcess::Expect(FrameType type, Deadline deadline) {
  ASSIGN_OR_RETURN(Frame frame, link_.Receive(deadline));
  if (frame.type == FrameType::kStop) {
    leaving_ = true;
    _exit(0);
  }
  if (frame.type != type) {
    return Fail(ErrorKind::kInternal, "rank {} got frame {}, frame {} is wanted", rank_,
                static_cast<int>(frame.type), static_cast<int>(type));
  }
  return frame;
}

Status RankProcess::Serve() {
  ASSIGN_OR_RETURN(const Frame frame, Expect(FrameType::kSetup, After(kSetupLimit)));
  ASSIGN_OR_RETURN(setup_, DecodeRankSetup(frame.bytes));
  rank_ = static_cast<uint16_t>(setup_.rank);
  topology_ = Topology(setup_.degrees, setup_.rank);
  SetLogLevel(static_cast<LogLevel>(setup_.log_level));
  ASSIGN_OR_RETURN(kernels_, kernels::Choose(setup_.isa));
  if (!setup_.cores.empty() && setup_.cores.size() != static_cast<size_t>(setup_.threads)) {
    return Fail(ErrorKind::kInternal, "rank {} got {} cores for {} threads", rank_, setup_.cores.size(),
                setup_.threads);
  }
  // This thread is the first of the pool's, and the one that waits for other ranks.
  if (!setup_.cores.empty()) PinThread(std::span(setup_.cores).first(1));
  threads_ = std::make_unique<ThreadPool>(setup_.threads, !setup_.cores.empty(), setup_.cores);
  RETURN_IF_ERROR(Meet());
  RETURN_IF_ERROR(Load());
  RETURN_IF_ERROR(MakeRank());
  return Steps();
}

Status RankProcess::Meet() {
  Socket listener;
  std::string endpoint;
  if (!setup_.data_address.empty()) {
    ASSIGN_OR_RETURN(listener, Listen({setup_.data_address, 0}));
    ASSIGN_OR_RETURN(const Endpoint local, LocalEndpoint(listener));
    endpoint = local.Text();
  }
  RETURN_IF_ERROR(Send(FrameType::kListening, EncodeText(endpoint)));
  ASSIGN_OR_RETURN(const Frame frame, Expect(FrameType::kConnect, Forever()));
  ASSIGN_OR_RETURN(const std::vector<std::string> addresses, DecodeTexts(frame.bytes));
  const std::vector<int> nodes(setup_.node_of_rank.begin(), setup_.node_of_rank.end());
  const std::chrono::milliseconds limit(setup_.deadline_ms);
  if (listener.open()) {
    const MeshOptions options{.rank = setup_.rank,
                              .node_of_rank = nodes,
                              .addresses = addresses,
                              .secret = setup_.secret,
                              .epoch = setup_.epoch};
    ASSIGN_OR_RETURN(mesh_, TcpMesh::Connect(listener, options, After(limit)));
  }
  // Each rank has its cores for itself: waiting may spin.
  const bool spin = !setup_.cores.empty();
  ASSIGN_OR_RETURN(memory_, SharedMemory::Attach(kRankMemoryDescriptor, setup_.local_rank, spin));
  ASSIGN_OR_RETURN(world_, Communicator::Create({.rank = setup_.rank,
                                                 .node_of_rank = nodes,
                                                 .memory = memory_.get(),
                                                 .mesh = mesh_.get(),
                                                 .deadline = limit}));
  ASSIGN_OR_RETURN(group_, world_->Split(topology_.dp_rank(), topology_.tp_rank()));
  return {};
}

Status RankProcess::Load() {
  ASSIGN_OR_RETURN(config_, LoadModelConfig(setup_.model));
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(setup_.model, config_, setup_.quantization));
  const RankShare share = ShareOfRank(config_, topology_, setup_.split_embedding);
  int tenth = 0;
  const auto progress = [&](uint64_t done, uint64_t total) {
    const int now = total == 0 ? 10 : static_cast<int>(10 * done / total);
    if (now > tenth && total >= uint64_t{1} << 30) LogInfo("loading weights: {} %", 10 * now);
    tenth = now;
  };
  ASSIGN_OR_RETURN(weights_, Weights::Load(checkpoint, config_, share, *threads_, progress));
  const RankLoaded loaded{.weight_bytes = weights_.size_bytes,
                          .memory_bytes = MemoryLimitBytes() / static_cast<uint64_t>(setup_.num_local),
                          .isa = std::string(kernels::IsaName(kernels_->isa))};
  return Send(FrameType::kLoaded, Encode(loaded));
}

Status RankProcess::MakeRank() {
  ASSIGN_OR_RETURN(const Frame frame, Expect(FrameType::kStart, Forever()));
  ByteReader reader(frame.bytes);
  const RankOptions options{.num_blocks = reader.Read<int32_t>(),
                            .block_size = setup_.block_size,
                            .max_model_len = setup_.max_model_len,
                            .num_tokens = setup_.num_tokens,
                            .decode_threads = setup_.decode_threads};
  RETURN_IF_ERROR(reader.Finish("the order to start"));
  ASSIGN_OR_RETURN(
      hands_, Rank::Create(config_, weights_, {topology_, *world_, *group_}, options, *kernels_, *threads_));
  return Send(FrameType::kReady, {});
}

Status RankProcess::Steps() {
  for (;;) {
    ASSIGN_OR_RETURN(const Frame frame, Expect(FrameType::kStep, Forever()));
    ASSIGN_OR_RETURN(const Step step, DecodeStep(frame.bytes));
    if (step.groups.size() != static_cast<size_t>(setup_.degrees.dp)) {
      return Fail(ErrorKind::kInternal, "a step has {} groups, {} are wanted", step.groups.size(),
                  setup_.degrees.dp);
    }
    RankReport report;
    ASSIGN_OR_RETURN(report.output, hands_->Run(step));
    report.counts = world_->Counts();
    RETURN_IF_ERROR(Send(FrameType::kOutput, Encode(report)));
  }
}

}  // namespace

int RunRankProcess() {
  RankProcess process;
  process.LeaveWithAgent();
  const int code = process.Run();
  // Threads may wait for peers that are gone: nothing is left to tidy that the kernel does not.
  _exit(code);
}

}  // namespace tessera
