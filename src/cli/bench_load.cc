// Three things in turn, with the same threads: the weights are loaded as a server does; the files are read
// into memory that nobody has touched, which is what any loading costs at least; and they are read into small
// buffers, which is the speed of the page cache, or with --cold of the disk. Before each, memory is taken and
// given back: a host that takes free memory from its virtual machines then has given it before time counts.
#include "cli/bench_load.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "base/clock.h"
#include "base/file.h"
#include "base/format.h"
#include "base/log.h"
#include "base/memory.h"
#include "base/threads.h"
#include "cli/flags.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/jobs.h"
#include "model/weights.h"

namespace tessera::cli {
namespace {

constexpr uint64_t kJobBytes = uint64_t{4} << 20;
constexpr uint64_t kReadBytes = uint64_t{256} << 10;

struct LoadFlags {
  std::string model;
  int64_t threads = 0;
  int64_t num_iters = 3;
  bool cold = false;
  std::string output_json;
};

FlagTable LoadTable(LoadFlags& o) {
  const char* group = "Benchmark";
  return {
      .command = "tessera bench load",
      .summary = "Time and memory of loading a checkpoint, beside plain reading of its files.",
      .positional_name = "MODEL",
      .positional = &o.model,
      .flags = {
          {"threads", "", IntFlag{&o.threads, 0, 1024}, "that read; 0: the cores of the cgroup", group},
          {"num-iters", "", IntFlag{&o.num_iters, 1, 1000}, "rounds; the best of each thing counts", group},
          {"cold", "", BoolFlag{&o.cold}, "drop the files from the page cache before each reading", group},
          {"output-json", "", TextFlag{&o.output_json}, "file for the result", group},
      }};
}

// Best times of the three, in seconds.
struct Times {
  double load = 1e30, new_memory = 1e30, plain = 1e30;
};
struct Sizes {
  uint64_t files = 0, weights = 0, peak = 0;
};

Result<std::vector<RandomAccessFile>> OpenShards(const std::string& folder) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFiles(folder));
  std::vector<RandomAccessFile> files;
  for (const std::string& name : names) {
    if (!name.ends_with(".safetensors")) continue;
    ASSIGN_OR_RETURN(RandomAccessFile file, RandomAccessFile::Open(folder + "/" + name));
    files.push_back(std::move(file));
  }
  return files;
}

// Reads every byte of the files once, into `target` or, where that is null, into a small buffer per thread.
Status ReadAll(const std::vector<RandomAccessFile>& files, std::byte* target, ThreadPool& threads) {
  std::vector<std::vector<std::byte>> buffers(static_cast<size_t>(threads.num_threads()),
                                              std::vector<std::byte>(kReadBytes));
  std::vector<Job> jobs;
  for (const RandomAccessFile& file : files) {
    for (uint64_t begin = 0; begin < file.size_bytes(); begin += kJobBytes) {
      const uint64_t end = std::min(file.size_bytes(), begin + kJobBytes);
      jobs.push_back({end - begin, [&buffers, &file, begin, end, target](int thread) -> Status {
                        for (uint64_t at = begin; at < end; at += kReadBytes) {
                          const uint64_t count = std::min(kReadBytes, end - at);
                          std::byte* to = target == nullptr ? buffers[static_cast<size_t>(thread)].data()
                                                            : target + at - begin;
                          RETURN_IF_ERROR(file.Read(at, {to, count}));
                        }
                        return {};
                      }});
      if (target != nullptr) target += end - begin;
    }
  }
  return RunJobs(jobs, threads, {});
}

// Clean pages leave the cache; no rights are needed.
void DropFromCache(const std::vector<RandomAccessFile>& files) {
  for (const RandomAccessFile& file : files) {
    const int descriptor = open(file.path().c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) continue;
    posix_fadvise(descriptor, 0, 0, POSIX_FADV_DONTNEED);
    close(descriptor);
  }
}

uint64_t PeakBytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

class LoadBench {
 public:
  LoadBench(const LoadFlags& options, std::vector<RandomAccessFile> files)
      : options_(options),
        files_(std::move(files)),
        threads_(options.threads > 0 ? static_cast<int>(options.threads) : AvailableCores()) {
    for (const RandomAccessFile& file : files_) sizes_.files += file.size_bytes();
  }

  Status Run() {
    RETURN_IF_ERROR(LoadWeights());
    sizes_.peak = PeakBytes();
    for (int64_t i = 0; i < options_.num_iters; ++i) {
      RETURN_IF_ERROR(Measure("loading", times_.load, [this] { return LoadWeights(); }));
      RETURN_IF_ERROR(Measure("reading into new memory", times_.new_memory, [this]() -> Status {
        ASSIGN_OR_RETURN(const Arena arena, Arena::Allocate(sizes_.files));
        return ReadAll(files_, arena.data(), threads_);
      }));
      RETURN_IF_ERROR(
          Measure("plain reading", times_.plain, [this] { return ReadAll(files_, nullptr, threads_); }));
    }
    fmt::print("best: loading is at {:.0f} % of reading into new memory, {:.0f} % of plain reading\n",
               100 * times_.new_memory / times_.load, 100 * times_.plain / times_.load);
    fmt::print("memory: {:.3f} GB of weights, {:.3f} GB at the peak, {:.3f} times as much\n",
               static_cast<double>(sizes_.weights) / 1e9, static_cast<double>(sizes_.peak) / 1e9,
               PeakRatio());
    return options_.output_json.empty() ? Status() : WriteFile(options_.output_json, Json());
  }

 private:
  template <typename Body>
  Status Measure(const char* name, double& best, const Body& body) {
    if (options_.cold) DropFromCache(files_);
    RETURN_IF_ERROR(TouchMemory());
    const TimeNs begin = clock_.Now();
    RETURN_IF_ERROR(body());
    const double seconds = Seconds(clock_.Now() - begin);
    best = std::min(best, seconds);
    fmt::print("  {:<24}{:>8.3f} s {:>8.2f} GB/s\n", name, seconds, Rate(seconds));
    std::fflush(stdout);
    return {};
  }

  // As much as what is measured takes: the weights, and where they come from the disk, the page cache. That
  // may give way; other programs' memory may not.
  Status TouchMemory() {
    const uint64_t wanted = sizes_.weights + (options_.cold ? sizes_.files : 0);
    ASSIGN_OR_RETURN(const Arena arena, Arena::Allocate(std::min(wanted, MemoryAvailableBytes() / 10 * 9)));
    constexpr size_t kPage = 4096;
    const size_t num_pages = arena.size_bytes() / kPage;
    threads_.ParallelFor(static_cast<int>(num_pages / 512), [&](int part, int) {
      for (size_t page = size_t{512} * part; page < size_t{512} * (part + 1); ++page)
        arena.data()[page * kPage] = std::byte{1};
    });
    return {};
  }
  Status LoadWeights() {
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options_.model));
    ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(options_.model, config, ""));
    ASSIGN_OR_RETURN(const Weights weights,
                     Weights::Load(checkpoint, config, WholeShare(config), threads_, {}));
    sizes_.weights = weights.size_bytes;
    return {};
  }

  double Rate(double seconds) const { return static_cast<double>(sizes_.files) / seconds / 1e9; }
  double PeakRatio() const {
    return static_cast<double>(sizes_.peak) / static_cast<double>(std::max<uint64_t>(sizes_.weights, 1));
  }
  std::string Json() const {
    return Format(
        "{{\"threads\": {}, \"cold\": {}, \"file_bytes\": {}, \"weight_bytes\": {}, \"peak_bytes\": {}, "
        "\"peak_over_weights\": {}, \"load_s\": {}, \"new_memory_s\": {}, \"plain_s\": {}, "
        "\"load_gb_per_s\": {}, \"new_memory_gb_per_s\": {}, \"plain_gb_per_s\": {}}}\n",
        threads_.num_threads(), options_.cold, sizes_.files, sizes_.weights, sizes_.peak, PeakRatio(),
        times_.load, times_.new_memory, times_.plain, Rate(times_.load), Rate(times_.new_memory),
        Rate(times_.plain));
  }

  const LoadFlags& options_;
  const std::vector<RandomAccessFile> files_;
  ThreadPool threads_;
  const SteadyClock clock_;
  Times times_;
  Sizes sizes_;
};

}  // namespace

int RunBenchLoad(std::span<const std::string> arguments) {
  LoadFlags options;
  const FlagTable table = LoadTable(options);
  const std::string help = HelpText(table);
  const auto parsed = ParseFlags(table, arguments);
  if (parsed && parsed->help) {
    fmt::print("{}", help);
    return 0;
  }
  SetLogLevel(LogLevel::kWarning);
  Status status = parsed ? Status() : Status(std::unexpected(parsed.error()));
  if (status) {
    auto files = OpenShards(options.model);
    status = files ? LoadBench(options, std::move(*files)).Run() : std::unexpected(files.error());
  }
  if (status) return 0;
  fmt::print(stderr, "{}: {}\n", table.command, status.error().message);
  return parsed ? 1 : 2;
}

}  // namespace tessera::cli
