// Every collective at a few sizes, between forked ranks over shared memory or over TCP (loopback, one node
// per rank). Rank 0 reads the clock; calls follow each other without pause, so a figure is the time of a call
// in a stream of calls. bench/comm.py runs this and Open MPI side by side.
#include "cli/bench_comm.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <utility>
#include <vector>

#include "base/file.h"
#include "base/format.h"
#include "base/log.h"
#include "base/threads.h"
#include "cli/flags.h"
#include "comm/thread_world.h"

namespace tessera::cli {
namespace {

using Clock = std::chrono::steady_clock;

struct CommFlags {
  std::vector<std::string> ranks = {"2", "4", "8", "16"};
  std::vector<std::string> bytes = {"256", "14336", "1048576"};
  std::string transport = "both";
  int64_t time_ms = 100;
  std::string json;
};

FlagTable CommTable(CommFlags& o) {
  const char* group = "Benchmark";
  return {
      .command = "tessera bench comm",
      .summary = "Time of each collective between processes of this machine.",
      .flags = {
          {"ranks", "", ListFlag{&o.ranks}, "numbers of ranks", group},
          {"bytes", "", ListFlag{&o.bytes}, "sizes of the whole array", group},
          {"transport", "", TextFlag{&o.transport, {"shm", "tcp", "both"}}, "how ranks are joined", group},
          {"time-ms", "", IntFlag{&o.time_ms, 1, 60000}, "of each measurement, in 25 runs", group},
          {"json", "", TextFlag{&o.json}, "file for the result", group},
      }};
}

struct Row {
  std::string transport;
  int num_ranks = 0;
  Collective collective = Collective::kBarrier;
  int64_t bytes = 0;
  double median_us = 0, best_us = 0;  // of a call
};
struct Times {
  double median_us = 0, best_us = 0;
};
constexpr int kNumRuns = 25;

// One collective on arrays of `bytes` altogether, cut evenly; again and again on the same memory.
class Shape {
 public:
  Shape(Communicator& group, Collective collective, int64_t bytes)
      : group_(group), collective_(collective), counts_(group.size()), sizes_(group.size()) {
    const int64_t values = bytes / static_cast<int64_t>(sizeof(int64_t));
    for (int i = 0; i < group.size(); ++i) {
      counts_[i] = values * (i + 1) / group.size() - values * i / group.size();
      sizes_[i] = counts_[i] * static_cast<int64_t>(sizeof(int64_t));
    }
    // Like sums of fixed point: some 30 bits of either sign.
    source_.resize(values);
    for (int64_t i = 0; i < values; ++i) source_[i] = (i * 0x9E3779B97F4A7C15LL) >> 34;
    receive_.resize(values * group.size());
  }

  Status Call() {
    const auto bytes = std::as_bytes(std::span(source_));
    const auto own_size = static_cast<size_t>(sizes_[group_.rank()]);
    switch (collective_) {
      case Collective::kAllReduce:
        std::ranges::copy(source_, receive_.begin());  // sums would grow from call to call
        return group_.AllReduce(std::span(receive_).first(source_.size()));
      case Collective::kReduceScatter:
        return group_.ReduceScatter(source_, counts_, std::span(receive_).first(counts_[group_.rank()]));
      case Collective::kAllGather:
        return group_.AllGather(bytes.first(own_size), sizes_, Room(bytes.size()));
      case Collective::kAllToAll: {
        const std::vector<int64_t> from_each(group_.size(), sizes_[group_.rank()]);
        return group_.AllToAll(bytes, sizes_, Room(own_size * group_.size()), from_each);
      }
      case Collective::kBroadcast:
        return group_.Broadcast(std::as_writable_bytes(std::span(source_)), 0);
      case Collective::kBarrier:
        return group_.Barrier();
    }
    return {};
  }

 private:
  std::span<std::byte> Room(size_t bytes) { return std::as_writable_bytes(std::span(receive_)).first(bytes); }
  Communicator& group_;
  const Collective collective_;
  std::vector<int64_t> counts_, sizes_;
  std::vector<int64_t> source_, receive_;
};

// Every rank makes as many calls as rank 0 says. Many short runs: on a shared machine the best of them saw
// free cores.
Result<Times> Measure(Communicator& group, Collective collective, int64_t bytes, int64_t time_ms) {
  Shape shape(group, collective, bytes);
  std::vector<double> runs;
  int64_t num_calls = 10;
  for (int run = -1; run < kNumRuns; ++run) {  // the first one warms up and finds the number of calls
    RETURN_IF_ERROR(group.Broadcast(std::as_writable_bytes(std::span(&num_calls, 1)), 0));
    RETURN_IF_ERROR(group.Barrier());
    const auto begin = Clock::now();
    for (int64_t i = 0; i < num_calls; ++i) RETURN_IF_ERROR(shape.Call());
    RETURN_IF_ERROR(group.Barrier());
    const double each = std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / num_calls;
    if (run >= 0) runs.push_back(each);
    if (run < 0)
      num_calls = std::clamp<int64_t>(static_cast<int64_t>(1000.0 * time_ms / kNumRuns / each), 5, 100'000);
  }
  std::ranges::sort(runs);
  return Times{runs[runs.size() / 2], runs.front()};
}

struct Plan {
  std::vector<std::pair<Collective, int64_t>> shapes;
  int64_t time_ms = 0;
};

// A core of its own for each rank, as a node agent gives it, while there are enough.
void Pin(int rank, int num_ranks) {
  cpu_set_t allowed, own;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0 || CPU_COUNT(&allowed) < num_ranks) return;
  int core = -1;
  for (int seen = -1; seen < rank; seen += CPU_ISSET(core, &allowed) ? 1 : 0) ++core;
  CPU_ZERO(&own);
  CPU_SET(core, &own);
  sched_setaffinity(0, sizeof(own), &own);
}

Status RunRank(ThreadWorld& world, int rank, const Plan& plan, std::span<Times> results) {
  Pin(rank, world.size());
  ASSIGN_OR_RETURN(const auto group, world.Join(rank));
  for (size_t i = 0; i < plan.shapes.size(); ++i) {
    const auto [collective, bytes] = plan.shapes[i];
    ASSIGN_OR_RETURN(const Times each, Measure(*group, collective, bytes, plan.time_ms));
    if (rank == 0) results[i] = each;
  }
  return {};
}

// Forks the ranks, and collects what rank 0 measured.
Status RunProcesses(const std::string& transport, int num_ranks, const Plan& plan, std::vector<Row>& rows) {
  std::vector<int> nodes(num_ranks, 0);
  if (transport == "tcp")
    for (int rank = 0; rank < num_ranks; ++rank) nodes[rank] = rank;
  ThreadWorld world(nodes, std::chrono::minutes(2), /*spin=*/num_ranks <= AvailableCores());
  const size_t bytes = plan.shapes.size() * sizeof(Times);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    return Fail(ErrorKind::kExhausted, "no memory for {} results", plan.shapes.size());
  const std::span<Times> results(static_cast<Times*>(memory), plan.shapes.size());
  std::fflush(nullptr);
  std::vector<pid_t> children;
  for (int rank = 0; rank < num_ranks; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      const Status status = RunRank(world, rank, plan, results);
      if (!status) LogError("rank {}: {}", rank, status.error().message);
      _exit(status ? 0 : 1);
    }
    children.push_back(pid);
  }
  bool all_well = true;
  for (const pid_t pid : children) {
    int status = 0;
    const bool ended = pid > 0 && waitpid(pid, &status, 0) == pid;
    all_well &= ended && WIFEXITED(status) && WEXITSTATUS(status) == 0;
  }
  for (size_t i = 0; i < plan.shapes.size(); ++i)
    rows.push_back({transport, num_ranks, plan.shapes[i].first, plan.shapes[i].second, results[i].median_us,
                    results[i].best_us});
  munmap(memory, bytes);
  if (!all_well) return Fail(ErrorKind::kUnavailable, "a rank of {} over {} failed", num_ranks, transport);
  return {};
}

Result<std::vector<int64_t>> Numbers(const std::vector<std::string>& texts, const char* flag, int64_t max) {
  std::vector<int64_t> numbers;
  for (const std::string& text : texts) {
    const auto number = ParseCount(text, true);
    if (!number || *number < 1 || *number > max)
      return Invalid("--{}: '{}' is not a number from 1 to {}", flag, text, max);
    numbers.push_back(*number);
  }
  return numbers;
}

std::string Json(const std::vector<Row>& rows) {
  std::string text;
  for (const Row& row : rows)
    text += Format(
        "{}{{\"transport\": \"{}\", \"ranks\": {}, \"collective\": \"{}\", \"bytes\": {}, "
        "\"median_us\": {:.3f}, \"best_us\": {:.3f}}}",
        text.empty() ? "" : ",\n ", row.transport, row.num_ranks, CollectiveName(row.collective), row.bytes,
        row.median_us, row.best_us);
  return Format("{{\"cores\": {}, \"rows\": [\n {}]}}\n", AvailableCores(), text);
}

Status RunAll(const CommFlags& o) {
  ASSIGN_OR_RETURN(const auto ranks, Numbers(o.ranks, "ranks", SharedMemory::kMaxRanks));
  ASSIGN_OR_RETURN(const auto sizes, Numbers(o.bytes, "bytes", int64_t{1} << 30));
  Plan plan{.shapes = {{Collective::kBarrier, 0}}, .time_ms = o.time_ms};
  for (const Collective collective : {Collective::kAllReduce, Collective::kReduceScatter,
                                      Collective::kAllGather, Collective::kAllToAll, Collective::kBroadcast})
    for (const int64_t bytes : sizes) plan.shapes.emplace_back(collective, bytes / 8 * 8);
  std::vector<Row> rows;
  fmt::print("{} cores; microseconds per call, and bytes of the array per second\n", AvailableCores());
  for (const char* transport : {"shm", "tcp"}) {
    if (o.transport != "both" && o.transport != transport) continue;
    for (const int64_t num_ranks : ranks) {
      const size_t before = rows.size();
      RETURN_IF_ERROR(RunProcesses(transport, static_cast<int>(num_ranks), plan, rows));
      for (size_t i = before; i < rows.size(); ++i)
        fmt::print("  {}  {:>3} ranks  {:<14}  {:>9} bytes  {:>10.2f} us (best {:>9.2f})  {:>7.3f} GB/s\n",
                   transport, num_ranks, CollectiveName(rows[i].collective), rows[i].bytes, rows[i].median_us,
                   rows[i].best_us, static_cast<double>(rows[i].bytes) / rows[i].median_us / 1000);
      std::fflush(stdout);
    }
  }
  return o.json.empty() ? Status() : WriteFile(o.json, Json(rows));
}

}  // namespace

int RunBenchComm(std::span<const std::string> arguments) {
  CommFlags options;
  return RunCommand(CommTable(options), arguments, [&](const ParsedFlags&) { return RunAll(options); });
}

}  // namespace tessera::cli
