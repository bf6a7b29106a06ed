// Timing of the cases: medians, and their distance from the machine's peaks.
#include "kernels/bench.h"

#include <algorithm>

#include "base/check.h"
#include "base/clock.h"

namespace tessera::kernels {
namespace {

constexpr TimeNs kTimePerCase = 60'000'000;
constexpr size_t kMostTimes = 9;

// The least nanoseconds of a call, and what sets them.
std::pair<double, const char*> LeastTime(const BenchCase& test, const BenchPeaks& peaks) {
  std::pair<double, const char*> least = {0, ""};
  const auto consider = [&](double work, double per_ns, const char* name) {
    if (per_ns > 0 && work / per_ns > least.first) least = {work / per_ns, name};
  };
  if (test.from_memory) consider(test.bytes, peaks.memory_read, "memory");
  if (test.bound == Bound::kInt8) consider(test.operations, peaks.multiply.int8, "int8");
  if (test.bound == Bound::kBf16) consider(test.operations, peaks.multiply.bf16, "bf16");
  if (test.bound == Bound::kFp32) consider(test.operations, peaks.multiply.fp32, "fp32");
  if (test.bound == Bound::kCache && !test.from_memory) consider(test.bytes, peaks.cache_read, "cache");
  return least;
}

double TimeOfReference(const BenchCase& test) {
  const SteadyClock clock;
  const Kernels& reference = **ForIsa(Isa::kScalar);
  const TimeNs begin = clock.Now();
  int calls = 0;
  do {
    test.run(reference, 0, test.reference_parts, calls++);
  } while (clock.Now() - begin < 2'000'000);
  return static_cast<double>(clock.Now() - begin) / calls * test.reference_parts;
}

}  // namespace

double TimeOfCall(const std::function<void(int part, int parts, int call)>& run, ThreadPool& threads) {
  const SteadyClock clock;
  const int parts = threads.num_threads();
  int call = 0;
  const auto run_calls = [&](int count) {
    const TimeNs begin = clock.Now();
    for (int i = 0; i < count; ++i, ++call)
      threads.ParallelFor(parts, [&](int part, int) { run(part, parts, call); });
    return std::max<TimeNs>(clock.Now() - begin, 1);
  };
  // The first call warms up. Then as many calls at a time as fill a share of the time.
  const TimeNs warm = std::min(run_calls(1), run_calls(1));
  const auto count = static_cast<int>(std::clamp<TimeNs>(kTimePerCase / kMostTimes / warm, 1, 1'000'000));
  std::vector<double> times;
  const TimeNs begin = clock.Now();
  while (times.size() < 3 || (times.size() < kMostTimes && clock.Now() - begin < kTimePerCase))
    times.push_back(static_cast<double>(run_calls(count)) / count);
  std::ranges::sort(times);
  return times[times.size() / 2];
}

BenchPeaks MeasurePeaks(Isa isa, ThreadPool& threads, std::span<const std::byte> stream) {
  constexpr size_t kCacheBytes = 16 << 10;  // per thread: half of the first cache
  return {.isa = isa,
          .num_threads = threads.num_threads(),
          .multiply = MeasureMultiply(isa, threads),
          .memory_read = MeasureRead(stream, threads),
          .cache_read = MeasureRead(stream.first(kCacheBytes * threads.num_threads()), threads)};
}

void BenchKernels(const BenchOptions& options, std::span<const BenchCase> cases,
                  std::span<const std::byte> stream,
                  const std::function<void(const BenchPeaks&)>& report_peaks,
                  const std::function<void(const BenchRow&)>& report) {
  SetFlushToZero();
  std::vector<std::unique_ptr<ThreadPool>> pools;
  for (const int count : options.num_threads) pools.push_back(std::make_unique<ThreadPool>(count));
  std::vector<BenchPeaks> peaks;
  for (const Isa isa : options.isas) {
    for (const auto& pool : pools) {
      peaks.push_back(MeasurePeaks(isa, *pool, stream));
      report_peaks(peaks.back());
    }
  }
  for (const BenchCase& one : cases) {
    if (one.name.find(options.filter) == std::string::npos) continue;
    std::optional<double> reference;
    for (size_t i = 0; i < peaks.size(); ++i) {
      if (one.only_one_thread && peaks[i].num_threads != 1) continue;
      BenchCase test = one;
      if (test.is_per_thread) {
        test.operations *= peaks[i].num_threads;
        test.bytes *= peaks[i].num_threads;
      }
      const Kernels& kernels = **ForIsa(peaks[i].isa);
      const double ns =
          TimeOfCall([&](int part, int parts, int call) { test.run(kernels, part, parts, call); },
                     *pools[i % pools.size()]);
      const auto [least, bound] = LeastTime(test, peaks[i]);
      BenchRow row = {.name = test.name,
                      .isa = peaks[i].isa,
                      .num_threads = peaks[i].num_threads,
                      .ns = ns,
                      .operations_per_ns = test.operations / ns,
                      .bytes_per_ns = test.bytes / ns,
                      .bound = bound,
                      .fraction = least / ns};
      if (row.num_threads == 1 && test.reference_parts > 0) {
        if (!reference) reference = TimeOfReference(one);
        row.over_reference = *reference / ns;
      }
      report(row);
    }
  }
}

}  // namespace tessera::kernels
