// One thread polls the processes' pidfds and their stderr.
#include "cluster/node_agent.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "base/check.h"
#include "base/log.h"
#include "cluster/spawn.h"
#include "comm/shared_memory.h"

namespace tessera {
namespace {

constexpr size_t kLastLines = 8;
constexpr size_t kMaxLineBytes = 2000;

// What a rank writes, line by line, and the last of it.
class Words {
 public:
  void Add(int rank, const char* text, size_t size) {
    for (size_t i = 0; i < size; ++i) {
      if (text[i] != '\n' && line_.size() < kMaxLineBytes) {
        line_ += text[i];
        continue;
      }
      Finish(rank);
    }
  }
  void Finish(int rank) {
    if (line_.empty()) return;
    fmt::print(stderr, "[rank {}] {}\n", rank, line_);
    last_.push_back(std::move(line_));
    if (last_.size() > kLastLines) last_.pop_front();
    line_.clear();
  }
  std::string Last() const { return Format("{}", fmt::join(last_, " | ")); }

 private:
  std::string line_;
  std::deque<std::string> last_;
};

struct Process {
  int rank = 0;
  pid_t id = -1;
  Socket pidfd;     // readable when it has ended
  Socket words_in;  // its stderr
  FrameLink link;
  Words words;
  bool ended = false;
};

std::string HowItEnded(const siginfo_t& info) {
  if (info.si_code == CLD_EXITED) return Format("exited with code {}", info.si_status);
  return Format("was killed by signal {} ({})", info.si_status, strsignal(info.si_status));
}

// Starts `tessera rank R dp D tp T` with the link, the memory and a pipe for its words.
Result<pid_t> SpawnRank(const Topology& topology, int link_end, int memory_end, int words_end) {
  const auto text = [](int number) { return std::to_string(number); };
  const int descriptors[] = {-1, words_end, words_end, link_end, memory_end};
  static_assert(kRankLinkDescriptor == 3 && kRankMemoryDescriptor == 4);
  auto process = Spawn("/proc/self/exe",
                       {"tessera", "rank", text(topology.rank()), "dp", text(topology.dp_rank()), "tp",
                        text(topology.tp_rank())},
                       descriptors);
  if (!process) return Fail(ErrorKind::kUnavailable, "rank {}: {}", topology.rank(), process.error().message);
  return process;
}

}  // namespace

struct NodeAgent::Content {
  NodeAgentOptions options;
  OnExit on_exit;
  std::vector<std::unique_ptr<Process>> processes;
  std::atomic<bool> stopping{false};
  std::mutex mutex;
  std::condition_variable ended;
  int num_running = 0;  // guarded by mutex
  std::thread thread;

  Status StartRank(int local_rank, int memory);
  void Watch();
  void ReadWords(Process& process);
  void End(Process& process);
};

Status NodeAgent::Content::StartRank(int local_rank, int memory) {
  auto process = std::make_unique<Process>();
  process->rank = options.first_rank + local_rank;
  ASSIGN_OR_RETURN(auto pair, SocketPair());
  int words[2];
  if (pipe2(words, O_CLOEXEC | O_NONBLOCK) != 0)
    return Fail(ErrorKind::kExhausted, "a pipe: {}", strerror(errno));
  process->words_in = Socket(words[0]);
  const Socket words_out(words[1]);
  // The rank's end may block; what it writes must not be lost.
  fcntl(words[1], F_SETFL, fcntl(words[1], F_GETFL) & ~O_NONBLOCK);
  ASSIGN_OR_RETURN(process->id, SpawnRank(Topology(options.degrees, process->rank), pair.second.descriptor(),
                                          memory, words_out.descriptor()));
  process->pidfd = OpenPidfd(process->id);
  process->link = FrameLink(std::move(pair.first), 0);
  ++num_running;  // no thread yet
  processes.push_back(std::move(process));
  return {};
}

void NodeAgent::Content::ReadWords(Process& process) {
  char text[4096];
  for (;;) {
    const ssize_t got = read(process.words_in.descriptor(), text, sizeof text);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return;
    process.words.Add(process.rank, text, static_cast<size_t>(got));
  }
}

void NodeAgent::Content::End(Process& process) {
  siginfo_t info = {};
  if (waitid(P_PIDFD, static_cast<id_t>(process.pidfd.descriptor()), &info, WEXITED) != 0) return;
  ReadWords(process);
  process.words.Finish(process.rank);
  process.ended = true;
  if (!stopping) {
    const Topology topology(options.degrees, process.rank);
    std::string text = Format("rank {} (dp {}, tp {}, process {}) {}", process.rank, topology.dp_rank(),
                              topology.tp_rank(), process.id, HowItEnded(info));
    if (const std::string last = process.words.Last(); !last.empty()) text += "; its last words: " + last;
    on_exit(text);
  }
  const std::lock_guard lock(mutex);
  --num_running;
  ended.notify_all();
}

void NodeAgent::Content::Watch() {
  for (;;) {
    std::vector<pollfd> waits;
    std::vector<Process*> running;
    for (const auto& process : processes) {
      if (process->ended) continue;
      running.push_back(process.get());
      waits.push_back({.fd = process->pidfd.descriptor(), .events = POLLIN, .revents = 0});
      waits.push_back({.fd = process->words_in.descriptor(), .events = POLLIN, .revents = 0});
    }
    if (running.empty()) return;
    if (poll(waits.data(), waits.size(), -1) < 0 && errno != EINTR) return;
    for (size_t i = 0; i < running.size(); ++i) {
      if (waits[2 * i + 1].revents != 0) ReadWords(*running[i]);
      if (waits[2 * i].revents != 0) {
        End(*running[i]);
      } else if ((waits[2 * i + 1].revents & (POLLHUP | POLLERR)) != 0) {
        running[i]->words_in = Socket();  // closed by the rank, which still runs
      }
    }
  }
}

NodeAgent::NodeAgent(std::unique_ptr<Content> content) : content_(std::move(content)) {}

Result<std::unique_ptr<NodeAgent>> NodeAgent::Start(const NodeAgentOptions& options, OnExit on_exit) {
  auto content = std::make_unique<Content>();
  content->options = options;
  content->on_exit = std::move(on_exit);
  std::unique_ptr<NodeAgent> agent(new NodeAgent(std::move(content)));
  if (options.num_ranks == 0) return agent;
  ASSIGN_OR_RETURN(const int descriptor, SharedMemory::Create(options.num_ranks));
  const Socket memory(descriptor);
  for (int i = 0; i < options.num_ranks; ++i) {
    RETURN_IF_ERROR(agent->content_->StartRank(i, memory.descriptor()));
  }
  agent->content_->thread = std::thread([content = agent->content_.get()] { content->Watch(); });
  return agent;
}

NodeAgent::~NodeAgent() {
  Stop(std::chrono::milliseconds(0));
}

int NodeAgent::num_ranks() const {
  return static_cast<int>(content_->processes.size());
}
FrameLink& NodeAgent::link(int local_rank) {
  return content_->processes[static_cast<size_t>(local_rank)]->link;
}
pid_t NodeAgent::process(int local_rank) const {
  return content_->processes[static_cast<size_t>(local_rank)]->id;
}

void NodeAgent::Stop(std::chrono::milliseconds grace) {
  Content& content = *content_;
  content.stopping = true;
  {
    std::unique_lock lock(content.mutex);
    content.ended.wait_for(lock, grace, [&] { return content.num_running == 0; });
  }
  // By pidfd: an id could belong to somebody else by now.
  for (const auto& process : content.processes)
    syscall(SYS_pidfd_send_signal, process->pidfd.descriptor(), SIGKILL, nullptr, 0);
  if (content.thread.joinable()) {
    content.thread.join();
  } else {
    for (const auto& process : content.processes) {
      if (!process->ended) content.End(*process);
    }
  }
}

}  // namespace tessera
