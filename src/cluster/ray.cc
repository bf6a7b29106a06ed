// The driver's process, its lines in both directions, and what they mean.
#include "cluster/ray.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <mutex>
#include <set>
#include <string_view>
#include <thread>

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "base/net.h"
#include "base/sha256.h"
#include "cluster/ray_driver.h"
#include "cluster/spawn.h"

namespace tessera {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

constexpr int kDriverDescriptor = 3;  // of the socket, in the driver
constexpr int kSourceDescriptor = 4;
constexpr size_t kMaxLineBytes = size_t{1} << 20;
constexpr size_t kLastWords = 6;
constexpr uint64_t kMaxBinaryBytes = uint64_t{1} << 31;
constexpr seconds kConnectLimit{90}, kStartLimit{90}, kChecksLimit{120}, kStopLimit{12}, kEndLimit{3};

// ------------------------------------------------------------------------------------------ the interpreter

bool ImportsRay(const std::string& python) {
  constexpr char kTry[] = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ray') is None)";
  const auto process = Spawn(python, {python, "-c", kTry}, std::vector{-1, -1, -1});
  int status = 0;
  return process && waitpid(*process, &status, 0) == *process && WIFEXITED(status) &&
         WEXITSTATUS(status) == 0;
}

std::string OwnPath() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).string();
}

// The interpreter that the user named, or else the first that would do.
Result<std::string> FindPython(const std::string& named) {
  constexpr char kWanted[] = "wanted one that imports ray, as `./dev deps --ray` makes it";
  const char* variable = std::getenv("TESSERA_RAY_PYTHON");
  const bool by_flag = !named.empty();
  if (by_flag || (variable != nullptr && *variable != '\0')) {
    const std::string python = by_flag ? named : variable;
    const char* source = by_flag ? "--ray-python" : "TESSERA_RAY_PYTHON";
    if (access(python.c_str(), X_OK) != 0)
      return Invalid("{}: '{}' is no program: {}; {}", source, python, strerror(errno), kWanted);
    if (!ImportsRay(python)) return Invalid("{}: '{}' does not import ray; {}", source, python, kWanted);
    return python;
  }
  std::vector<std::string> candidates;
  std::string_view path = std::getenv("PATH") == nullptr ? "" : std::getenv("PATH");
  while (!path.empty()) {
    const size_t end = std::min(path.find(':'), path.size());
    if (end > 0) candidates.push_back(std::string(path.substr(0, end)) + "/python3");
    path.remove_prefix(std::min(end + 1, path.size()));
  }
  // build/release/tessera, build/ray
  candidates.push_back(std::filesystem::path(OwnPath()).parent_path().parent_path() / "ray/bin/python3");
  for (const std::string& python : candidates) {
    if (access(python.c_str(), X_OK) == 0 && ImportsRay(python)) return python;
  }
  return Fail(ErrorKind::kUnavailable,
              "Ray is not installed: no python3 on PATH imports ray. Run `./dev deps --ray`, or name an "
              "interpreter by --ray-python or TESSERA_RAY_PYTHON");
}

// The driver's source as a file that only its descriptor names.
Result<Socket> SourceFile() {
  Socket file(memfd_create("tessera-ray-driver", MFD_CLOEXEC));
  if (!file.open() ||
      write(file.descriptor(), kRayDriver.data(), kRayDriver.size()) !=
          static_cast<ssize_t>(kRayDriver.size()) ||
      lseek(file.descriptor(), 0, SEEK_SET) != 0) {
    return Fail(ErrorKind::kExhausted, "memory for the Ray driver: {}", strerror(errno));
  }
  return file;
}

// ------------------------------------------------------------------------------------------------ its lines

std::string TextOf(const JsonValue& event, std::string_view key) {
  const JsonValue* value = event.Find(key);
  return value == nullptr ? "" : value->text();
}

int64_t NumberOf(const JsonValue& event, std::string_view key) {
  const JsonValue* value = event.Find(key);
  return value == nullptr ? 0 : static_cast<int64_t>(value->number());
}

void AppendMember(std::string& out, std::string_view key, std::string_view text) {
  out += out.ends_with('{') ? "" : ", ";
  AppendJsonString(out, key);
  out += ": ";
  AppendJsonString(out, text);
}

// "exited with code 2: last | words"
std::string HowItEnded(const JsonValue& event) {
  const auto code = static_cast<int>(NumberOf(event, "code"));
  std::string text = code < 0 ? Format("was killed by signal {} ({})", -code, strsignal(-code))
                              : Format("exited with code {}", code);
  std::vector<std::string> tail;
  if (const JsonValue* lines = event.Find("tail"); lines != nullptr)
    for (const JsonValue& line : lines->items()) tail.push_back(line.text());
  if (!tail.empty()) text += Format("; its last words: {}", fmt::join(tail, " | "));
  return text;
}

}  // namespace

struct RayCluster::Content {
  std::function<bool()> cancelled;
  pid_t process = -1;
  Socket pidfd;
  Socket link;      // to the driver
  Socket words_in;  // what it prints
  Socket wake;      // an eventfd for the reader
  std::string address, ray_version, python_version;
  std::vector<RayNode> nodes;

  mutable std::mutex mutex;
  std::condition_variable heard;
  std::deque<JsonValue> answers;       // guarded by mutex
  bool closed = false;                 // guarded by mutex: the driver says nothing any more
  bool started = false;                // guarded by mutex: an end is a loss
  bool stopping = false;               // guarded by mutex
  std::deque<std::string> last_words;  // guarded by mutex
  std::optional<Error> news;           // guarded by mutex: a loss that is not told yet
  Deadline tell_at = Deadline::max();  // guarded by mutex
  std::optional<Error> told;           // guarded by mutex
  milliseconds patience{0};
  std::function<void(const Error&)> on_loss;
  std::thread reader;

  Status Launch(const std::string& python);
  void Read();
  void Hear(JsonValue event);
  void Lose(std::string text);
  void TellLoss();
  Status Ask(std::string_view line);
  Result<JsonValue> Await(std::string_view event, milliseconds limit);
  std::string Ending() const;
  Status CheckNodes(const RayRequest& request, const JsonArray& placed);
};

Status RayCluster::Content::Launch(const std::string& python) {
  ASSIGN_OR_RETURN(auto pair, SocketPair());
  ASSIGN_OR_RETURN(const Socket source, SourceFile());
  int words[2];
  if (pipe2(words, O_CLOEXEC) != 0) return Fail(ErrorKind::kExhausted, "a pipe: {}", strerror(errno));
  words_in = Socket(words[0]);
  const Socket words_out(words[1]);
  fcntl(words[0], F_SETFL, fcntl(words[0], F_GETFL) | O_NONBLOCK);
  // The driver's end blocks.
  fcntl(pair.second.descriptor(), F_SETFL, fcntl(pair.second.descriptor(), F_GETFL) & ~O_NONBLOCK);
  const std::vector<std::string> arguments = {python, Format("/proc/self/fd/{}", kSourceDescriptor),
                                              std::to_string(kDriverDescriptor)};
  const std::vector<int> descriptors = {-1, words_out.descriptor(), words_out.descriptor(),
                                        pair.second.descriptor(), source.descriptor()};
  ASSIGN_OR_RETURN(process, Spawn(python, arguments, descriptors));
  pidfd = OpenPidfd(process);
  link = std::move(pair.first);
  wake = Socket(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  reader = std::thread([this] { Read(); });
  return {};
}

// The reader's thread: lines of both kinds, and the news of a loss when its time has come.
void RayCluster::Content::Read() {
  std::string line, words;
  pollfd waits[] = {
      {link.descriptor(), POLLIN, 0}, {words_in.descriptor(), POLLIN, 0}, {wake.descriptor(), POLLIN, 0}};
  const auto read_some = [](int descriptor, std::string& into) {
    char text[4096];
    const ssize_t got = read(descriptor, text, sizeof text);
    if (got > 0) into.append(text, static_cast<size_t>(got));
    return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
  };
  const auto each_line = [](std::string& text, const auto& use) {
    for (size_t end; (end = text.find('\n')) != std::string::npos; text.erase(0, end + 1))
      use(std::string_view(text).substr(0, end));
  };
  while (waits[0].fd >= 0 || waits[1].fd >= 0) {
    poll(waits, 3, 100);
    TellLoss();
    if (waits[2].revents != 0) return;
    if (waits[1].revents != 0) {
      if (!read_some(words_in.descriptor(), words)) waits[1].fd = -1;
      each_line(words, [&](std::string_view text) {
        LogDebug("ray driver: {}", text);
        const std::lock_guard lock(mutex);
        last_words.emplace_back(text.substr(0, 400));
        if (last_words.size() > kLastWords) last_words.pop_front();
      });
    }
    if (waits[0].revents == 0) continue;
    if (!read_some(link.descriptor(), line) || line.size() > kMaxLineBytes) {
      waits[0].fd = -1;
      {
        const std::lock_guard lock(mutex);
        closed = true;
        heard.notify_all();
      }
      Lose(Ending());
      continue;
    }
    each_line(line, [&](std::string_view text) {
      if (auto event = ParseJson(text, "a line of the Ray driver")) Hear(*std::move(event));
    });
  }
}

void RayCluster::Content::Hear(JsonValue event) {
  const std::string what = TextOf(event, "event");
  if (what == "waiting") {
    LogInfo("{}", TextOf(event, "text"));
    return;
  }
  if (what == "exited" || what == "lost") {
    const auto number = static_cast<size_t>(NumberOf(event, "node"));
    const std::string where =
        number < nodes.size() ? Format("{} ({})", nodes[number].address, nodes[number].host) : "a node";
    if (what == "lost") {
      Lose(Format("Ray has lost the agent on {}: {}", where, TextOf(event, "text")));
    } else if (NumberOf(event, "code") != 0) {
      Lose(Format("`tessera serve --headless` on {} {}", where, HowItEnded(event)));
    }
    return;
  }
  const std::lock_guard lock(mutex);
  answers.push_back(std::move(event));
  heard.notify_all();
}

void RayCluster::Content::Lose(std::string text) {
  const std::lock_guard lock(mutex);
  if (!started || stopping || news) return;
  LogWarning("{}", text);
  news = Error{ErrorKind::kUnavailable, std::move(text)};
  tell_at = After(patience);
}

void RayCluster::Content::TellLoss() {
  {
    const std::lock_guard lock(mutex);
    if (!news || told || stopping || Clock::now() < tell_at) return;
    told = news;
  }
  on_loss(*told);
}

std::string RayCluster::Content::Ending() const {
  const std::lock_guard lock(mutex);
  return Format("the Ray driver has ended; its last words: {}",
                last_words.empty() ? "none" : Format("{}", fmt::join(last_words, " | ")));
}

Status RayCluster::Content::Ask(std::string_view line) {
  const std::string text = std::string(line) + "\n";
  if (!WriteAll(link, std::as_bytes(std::span(text)), After(seconds(5))))
    return Fail(ErrorKind::kUnavailable, "{}", Ending());
  return {};
}

// The next answer, which must be that event.
Result<JsonValue> RayCluster::Content::Await(std::string_view event, milliseconds limit) {
  const Deadline deadline = After(limit);
  std::unique_lock lock(mutex);
  for (;;) {
    if (!answers.empty()) break;
    if (closed) {
      lock.unlock();
      return Fail(ErrorKind::kUnavailable, "{}", Ending());
    }
    if (Clock::now() >= deadline) {
      return Fail(ErrorKind::kDeadline, "the Ray driver did not answer '{}' within {} s", event,
                  std::chrono::duration_cast<seconds>(limit).count());
    }
    lock.unlock();
    if (cancelled()) return Fail(ErrorKind::kUnavailable, "stopped while Ray was asked");
    lock.lock();
    if (answers.empty()) heard.wait_for(lock, milliseconds(100));
  }
  JsonValue answer = std::move(answers.front());
  answers.pop_front();
  const std::string what = TextOf(answer, "event");
  if (what == "failed") return Fail(ErrorKind::kUnavailable, "{}", TextOf(answer, "text"));
  if (what != event)
    return Fail(ErrorKind::kUnavailable, "the Ray driver says '{}' where '{}' is wanted", what, event);
  return answer;
}

// Every node must be able to run what this host runs; what merely differs is said.
Status RayCluster::Content::CheckNodes(const RayRequest& request, const JsonArray& placed) {
  ASSIGN_OR_RETURN(const std::string binary, ReadFile("/proc/self/exe", kMaxBinaryBytes));
  const std::string hash = Hex(HashSha256(std::as_bytes(std::span(binary))));
  std::vector<std::string> wrong;
  std::set<int> cores;
  bool monitored = false;
  for (size_t i = 0; i < placed.size(); ++i) {
    const JsonValue* probe = placed[i].Find("probe");
    if (probe == nullptr) return Fail(ErrorKind::kUnavailable, "the Ray driver gives no probe of node {}", i);
    RayNode& node = nodes[i];
    const std::string where = Format("{} ({})", node.address, node.host);
    const JsonValue *model = probe->Find("model"), *monitor = probe->Find("monitor");
    if (model == nullptr || model->AsBool() == nullptr || !*model->AsBool())
      wrong.push_back(Format("{} has no model at {}", where, request.model));
    const std::string theirs = TextOf(*probe, "binary");
    if (theirs.empty()) {
      wrong.push_back(Format("{} has no program at {}", where, OwnPath()));
    } else if (theirs != hash) {
      wrong.push_back(Format("{} has another program at {}: {}, SHA-256 {}; here {}", where, OwnPath(),
                             TextOf(*probe, "version"), theirs.substr(0, 12), hash.substr(0, 12)));
    }
    if (const std::string python = TextOf(*probe, "python"); python != python_version)
      wrong.push_back(Format("{} runs Python {}; here {}", where, python, python_version));
    node.cores = static_cast<int>(NumberOf(*probe, "cores"));
    node.memory_bytes = static_cast<uint64_t>(NumberOf(*probe, "memory"));
    cores.insert(node.cores);
    monitored = monitored || monitor == nullptr || monitor->AsBool() == nullptr || *monitor->AsBool();
  }
  if (!wrong.empty()) return Invalid("Ray's nodes differ: {}", fmt::join(wrong, "; "));
  if (cores.size() > 1) LogWarning("Ray's nodes have different numbers of cores: {}", fmt::join(cores, ", "));
  if (monitored) {
    LogWarning(
        "Ray's memory monitor is on: it ends Ray's workers, and with them the ranks, when a node's memory is "
        "95 % full; run `ray start` with RAY_memory_monitor_refresh_ms=0");
  }
  const auto [least, most] = std::ranges::minmax_element(nodes, {}, &RayNode::memory_bytes);
  if (least->memory_bytes < most->memory_bytes / 10 * 9) {
    LogWarning(
        "Ray's nodes have different amounts of memory: {} GiB on {}, {} GiB on {}; the least counts for all",
        least->memory_bytes >> 30, least->address, most->memory_bytes >> 30, most->address);
  }
  return {};
}

// -- The face

RayCluster::RayCluster(std::unique_ptr<Content> content) : content_(std::move(content)) {}

Result<std::unique_ptr<RayCluster>> RayCluster::Connect(const std::string& python,
                                                        std::function<bool()> cancelled) {
  ASSIGN_OR_RETURN(const std::string interpreter, FindPython(python));
  std::unique_ptr<RayCluster> cluster(new RayCluster(std::make_unique<Content>()));
  Content& content = *cluster->content_;
  content.cancelled = std::move(cancelled);
  RETURN_IF_ERROR(content.Launch(interpreter));
  RETURN_IF_ERROR(content.Ask(R"({"do": "connect"})"));
  ASSIGN_OR_RETURN(const JsonValue answer, content.Await("connected", kConnectLimit));
  content.address = TextOf(answer, "address");
  content.ray_version = TextOf(answer, "ray");
  content.python_version = TextOf(answer, "python");
  const JsonValue* nodes = answer.Find("nodes");
  LogInfo("Ray {} at {} with {} nodes, by {} (Python {})", content.ray_version, TextOf(answer, "cluster"),
          nodes == nullptr ? 0 : nodes->items().size(), interpreter, content.python_version);
  return cluster;
}

RayCluster::~RayCluster() {
  Stop();
}

const std::string& RayCluster::address() const {
  return content_->address;
}

Result<std::vector<RayNode>> RayCluster::Reserve(const RayRequest& request) {
  Content& content = *content_;
  std::string line = "{";
  AppendMember(line, "do", "reserve");
  AppendMember(line, "strategy", request.strategy);
  AppendMember(line, "resource", request.resource);
  AppendMember(line, "model", request.model);
  AppendMember(line, "binary", OwnPath());
  line += Format(
      R"(, "groups": {}, "ranks_per_group": {}, "local_groups": {}, "cores_per_rank": {}, "timeout_s": {}}})",
      request.groups, request.ranks_per_group,
      request.local_groups > 0 ? std::to_string(request.local_groups) : "null", request.cores_per_rank,
      request.timeout.count());
  RETURN_IF_ERROR(content.Ask(line));
  ASSIGN_OR_RETURN(const JsonValue answer, content.Await("placed", request.timeout + kChecksLimit));
  const JsonValue* placed = answer.Find("nodes");
  int world = 0;
  if (placed == nullptr) return Fail(ErrorKind::kUnavailable, "the Ray driver names no nodes");
  for (const JsonValue& node : placed->items()) {
    const NodeRanks ranks = {static_cast<int>(NumberOf(node, "first")),
                             static_cast<int>(NumberOf(node, "count"))};
    if (ranks.first != world || ranks.count < 1)
      return Fail(ErrorKind::kUnavailable, "the Ray driver places rank {} where {} is wanted", ranks.first,
                  world);
    world += ranks.count;
    content.nodes.push_back({TextOf(node, "address"), TextOf(node, "host"), ranks});
  }
  if (world != request.groups * request.ranks_per_group)
    return Fail(ErrorKind::kUnavailable, "the Ray driver places {} ranks", world);
  RETURN_IF_ERROR(content.CheckNodes(request, placed->items()));
  return content.nodes;
}

Status RayCluster::Start(const std::vector<std::vector<std::string>>& commands,
                         const std::map<std::string, std::optional<std::string>>& set,
                         const std::map<std::string, std::string>& defaults, milliseconds patience,
                         std::function<void(const Error&)> on_loss) {
  Content& content = *content_;
  std::string line = R"({"do": "start", "commands": [)";
  for (const auto& command : commands) {
    line += line.ends_with('[') ? "[" : ", [";
    AppendJsonString(line, OwnPath());
    for (const std::string& word : command) {
      line += ", ";
      AppendJsonString(line, word);
    }
    line += "]";
  }
  std::string changes = "{", additions = "{";
  for (const auto& [name, text] : set) {
    if (text) {
      AppendMember(changes, name, *text);
      continue;
    }
    changes += changes.ends_with('{') ? "" : ", ";
    AppendJsonString(changes, name);
    changes += ": null";
  }
  for (const auto& [name, text] : defaults) AppendMember(additions, name, text);
  line += Format(R"(], "set": {}}}, "default": {}}}}})", changes, additions);
  {
    const std::lock_guard lock(content.mutex);
    content.patience = patience;
    content.on_loss = std::move(on_loss);
    content.started = true;
  }
  RETURN_IF_ERROR(content.Ask(line));
  for (size_t i = 0; i < commands.size(); ++i) {
    ASSIGN_OR_RETURN(const JsonValue started, content.Await("started", kStartLimit));
    if (const JsonValue* notes = started.Find("notes"); notes != nullptr)
      for (const JsonValue& note : notes->items())
        LogWarning("{}: {}", content.nodes[i].address, note.text());
  }
  return {};
}

std::optional<Error> RayCluster::loss() const {
  const std::lock_guard lock(content_->mutex);
  return content_->told;
}

void RayCluster::Stop() {
  Content& content = *content_;
  if (content.process < 0) return;
  {
    const std::lock_guard lock(content.mutex);
    content.stopping = true;
  }
  const auto ended_within = [&](milliseconds limit) {
    pollfd wait = {.fd = content.pidfd.descriptor(), .events = POLLIN, .revents = 0};
    return poll(&wait, 1, static_cast<int>(limit.count())) > 0;
  };
  if (!content.Ask(R"({"do": "stop"})") || !ended_within(kStopLimit)) content.link.Shutdown();
  if (!ended_within(kEndLimit))
    syscall(SYS_pidfd_send_signal, content.pidfd.descriptor(), SIGKILL, nullptr, 0);
  siginfo_t info = {};
  waitid(P_PIDFD, static_cast<id_t>(content.pidfd.descriptor()), &info, WEXITED);
  content.process = -1;
  const uint64_t one = 1;
  (void)!write(content.wake.descriptor(), &one, sizeof one);
  if (content.reader.joinable()) content.reader.join();
}

}  // namespace tessera
