// Loops with one task of two microseconds per thread, less what one such task takes: what remains is two
// barriers, the start and the end of a loop. Pinned and not.
#include "cli/bench_threads.h"

#include <x86intrin.h>

#include <chrono>
#include <cstdio>
#include <vector>

#include "base/clock.h"
#include "base/file.h"
#include "base/format.h"
#include "base/threads.h"
#include "cli/flags.h"
#include "cli/statistics.h"

namespace tessera::cli {
namespace {

struct ThreadFlags {
  int64_t threads = 0;
  std::string output_json;
};

FlagTable ThreadTable(ThreadFlags& o) {
  const char* group = "Benchmark";
  return {
      .command = "tessera bench threads",
      .summary = "What a loop over 2, 4, 8 ... threads costs beside its tasks.",
      .flags = {{"threads", "", IntFlag{&o.threads, 0, 1024}, "at most; 0: the cores of the cgroup", group},
                {"output-json", "", TextFlag{&o.output_json}, "file for the result", group}}};
}

// About two microseconds that no other thread can shorten.
void Work() {
  for (const uint64_t end = __rdtsc() + 5000; __rdtsc() < end;) {
  }
}

// Nanoseconds of one loop of `num_tasks` tasks, the median of runs.
double TimeOfLoop(ThreadPool& pool, int num_tasks) {
  constexpr int kRuns = 25;
  constexpr int kLoops = 4000;
  const SteadyClock clock;
  std::vector<double> times;
  for (int run = 0; run < kRuns; ++run) {
    const TimeNs begin = clock.Now();
    for (int loop = 0; loop < kLoops; ++loop) pool.ParallelFor(num_tasks, [](int, int) { Work(); });
    times.push_back(static_cast<double>(clock.Now() - begin) / kLoops);
  }
  return Statistics(times).Percentile(50);
}

// The same for single loops after a pause, in which workers may fall asleep.
double TimeAfterPause(ThreadPool& pool, std::chrono::microseconds pause) {
  const SteadyClock clock;
  std::vector<double> times;
  for (int run = 0; run < 200; ++run) {
    const TimeNs paused = clock.Now();
    while (clock.Now() - paused < std::chrono::nanoseconds(pause).count()) {
    }
    const TimeNs begin = clock.Now();
    pool.ParallelFor(pool.num_threads(), [](int, int) { Work(); });
    times.push_back(static_cast<double>(clock.Now() - begin));
  }
  return Statistics(times).Percentile(50);
}

Status Measure(const ThreadFlags& o) {
  const std::vector<int> cores = AllowedCores();
  const int most = o.threads > 0 ? static_cast<int>(o.threads) : AvailableCores();
  std::vector<int> counts;
  for (int count = 2; count < most; count *= 2) counts.push_back(count);
  if (most > 1) counts.push_back(most);
  std::string rows;
  for (const int count : counts) {
    for (const bool pinned : {false, true}) {
      if (pinned && cores.size() < static_cast<size_t>(count)) continue;
      PinThread(pinned ? std::span(cores).first(1) : std::span(cores));
      ThreadPool pool(count, pinned, pinned ? std::span(cores) : std::span<const int>());
      const double work = TimeOfLoop(pool, 1);
      const double loop = TimeOfLoop(pool, count) - work;
      const double soon = TimeAfterPause(pool, std::chrono::microseconds(500)) - work;
      const double late = TimeAfterPause(pool, std::chrono::milliseconds(5)) - work;
      fmt::print("{:>4} threads {:<9}{:>8.0f} ns a loop,{:>8.0f} after 0.5 ms,{:>8.0f} after 5 ms\n", count,
                 pinned ? "pinned" : "not", loop, soon, late);
      rows += Format(
          "{}{{\"threads\": {}, \"pinned\": {}, \"loop_ns\": {:.1f}, \"after_500_us_ns\": {:.1f}, "
          "\"after_5_ms_ns\": {:.1f}}}",
          rows.empty() ? "" : ",\n ", count, pinned, loop, soon, late);
    }
  }
  return o.output_json.empty() ? Status() : WriteFile(o.output_json, "[" + rows + "]\n");
}

}  // namespace

int RunBenchThreads(std::span<const std::string> arguments) {
  ThreadFlags options;
  const FlagTable table = ThreadTable(options);
  const std::string help = HelpText(table);
  const auto parsed = ParseFlags(table, arguments);
  if (parsed && parsed->help) {
    fmt::print("{}", help);
    return 0;
  }
  const Status status = parsed ? Measure(options) : Status(std::unexpected(parsed.error()));
  if (status) return 0;
  fmt::print(stderr, "{}: {}\n", table.command, status.error().message);
  return parsed ? 1 : 2;
}

}  // namespace tessera::cli
