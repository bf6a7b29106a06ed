// Timing of the cases: medians, and their distance from the machine's peaks.
#include "kernels/bench.h"

#include <algorithm>

#include "base/check.h"
#include "base/clock.h"

namespace tessera::kernels {
namespace {

constexpr TimeNs kTimePerCase = 60'000'000;
constexpr size_t kMostTimes = 9;

using Call = std::function<void(int part, int parts, int call)>;

double Median(std::vector<double> values) {
  std::ranges::sort(values);
  return values[values.size() / 2];
}

// Nanoseconds of a call of each, taken in turns: where memory changes its speed, all see the same. Call
// numbers run through all of them. Gives one list per entry of `calls`, in the order of measuring.
std::vector<std::vector<double>> TimesInTurns(std::span<const Call> calls, ThreadPool& threads) {
  const SteadyClock clock;
  const int parts = threads.num_threads();
  int call = 0;
  const auto run = [&](const Call& work, int count) {
    const TimeNs begin = clock.Now();
    for (int i = 0; i < count; ++i, ++call)
      threads.ParallelFor(parts, [&](int part, int) { work(part, parts, call); });
    return std::max<TimeNs>(clock.Now() - begin, 1);
  };
  // The first call warms up. Then as many calls at a time as fill a share of the time.
  std::vector<int> counts;
  for (const Call& work : calls) {
    const TimeNs warm = std::min(run(work, 1), run(work, 1));
    counts.push_back(static_cast<int>(std::clamp<TimeNs>(kTimePerCase / kMostTimes / warm, 1, 1'000'000)));
  }
  std::vector<std::vector<double>> times(calls.size());
  const TimeNs begin = clock.Now();
  const auto most_time = kTimePerCase * static_cast<TimeNs>(calls.size());
  while (times[0].size() < 3 || (times[0].size() < kMostTimes && clock.Now() - begin < most_time)) {
    for (size_t i = 0; i < calls.size(); ++i)
      times[i].push_back(static_cast<double>(run(calls[i], counts[i])) / counts[i]);
  }
  return times;
}

// Plain reading of as many bytes as a call, in so many streams of each thread.
Call Reading(std::span<const std::byte> stream, double bytes, int num_streams) {
  const size_t size = std::min(static_cast<size_t>(bytes), stream.size());
  const size_t pieces = std::max<size_t>(stream.size() / std::max<size_t>(size, 1), 1);
  return [=](int part, int parts, int call) {
    ReadPart(stream.subspan(static_cast<size_t>(call) % pieces * size, size), part, parts, num_streams);
  };
}

// The least nanoseconds of a call, and what sets them; `read_ns` is what reading its bytes takes.
std::pair<double, const char*> LeastTime(const BenchCase& test, const BenchPeaks& peaks, double read_ns) {
  std::pair<double, const char*> least = {0, ""};
  const auto consider = [&](double ns, const char* name) {
    if (ns > least.first) least = {ns, name};
  };
  const auto at_rate = [&](double work, double per_ns, const char* name) {
    if (per_ns > 0) consider(work / per_ns, name);
  };
  if (test.from_memory) consider(read_ns, "memory");
  if (test.bound == Bound::kInt8) at_rate(test.operations, peaks.multiply.int8, "int8");
  if (test.bound == Bound::kBf16) at_rate(test.operations, peaks.multiply.bf16, "bf16");
  if (test.bound == Bound::kFp32) at_rate(test.operations, peaks.multiply.fp32, "fp32");
  if (test.bound == Bound::kCache && !test.from_memory) at_rate(test.bytes, peaks.cache_read, "cache");
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

BenchPeaks MeasurePeaks(Isa isa, ThreadPool& threads, std::span<const std::byte> stream) {
  constexpr size_t kCacheBytes = 16 << 10;  // per thread: half of the first cache
  return {.isa = isa,
          .num_threads = threads.num_threads(),
          .multiply = MeasureMultiply(isa, threads),
          .memory_read = MeasureRead(stream, threads),
          .cache_read = MeasureRead(stream.first(kCacheBytes * threads.num_threads()), threads)};
}

BenchRow MeasureCase(const BenchCase& test, const BenchPeaks& peaks, ThreadPool& threads,
                     std::span<const std::byte> stream) {
  const Kernels& kernels = **ForIsa(peaks.isa);
  std::vector<Call> calls = {[&](int part, int parts, int call) { test.run(kernels, part, parts, call); }};
  if (test.from_memory && peaks.memory_read > 0) {
    for (const int num_streams : {1, 2}) calls.push_back(Reading(stream, test.bytes, num_streams));
  }
  const auto times = TimesInTurns(calls, threads);
  std::vector<double> reads(times[0].size(), 0);
  if (times.size() > 1) std::ranges::transform(times[1], times[2], reads.begin(), std::ranges::min);
  std::vector<double> fractions;
  for (size_t i = 0; i < reads.size(); ++i)
    fractions.push_back(LeastTime(test, peaks, reads[i]).first / times[0][i]);
  const double ns = Median(times[0]);
  return {.name = test.name,
          .isa = peaks.isa,
          .num_threads = peaks.num_threads,
          .ns = ns,
          .operations_per_ns = test.operations / ns,
          .bytes_per_ns = test.bytes / ns,
          .bound = LeastTime(test, peaks, Median(reads)).second,
          .fraction = Median(fractions)};
}

}  // namespace

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
      BenchRow row = MeasureCase(test, peaks[i], *pools[i % pools.size()], stream);
      if (row.num_threads == 1 && test.reference_parts > 0) {
        if (!reference) reference = TimeOfReference(one);
        row.over_reference = *reference / row.ns;
      }
      report(row);
    }
  }
}

}  // namespace tessera::kernels
