// `tessera bench kernels`: what each kernel does per second on this machine, by instruction set, beside what
// the machine can do. Measures only; the tests hold the results.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/threads.h"
#include "kernels/kernels.h"
#include "kernels/peaks.h"

namespace tessera::kernels {

// What bounds a case, beside the memory it streams.
enum class Bound { kInt8, kBf16, kFp32, kCache };

// One kernel at one size.
struct BenchCase {
  std::string name;
  double operations = 0;     // of a call; a multiply-accumulate is two
  double bytes = 0;          // that a call reads and writes
  bool from_memory = false;  // those bytes lie in memory, not in a cache
  Bound bound = Bound::kCache;
  // Part `part` of `parts` equal ones of call number `call`; threads take parts. Successive calls use other
  // weights, so that none is still in a cache.
  std::function<void(const Kernels&, int part, int parts, int call)> run;
  // The scalar reference runs one of so many parts: it takes its time. 0: it is not asked.
  int reference_parts = 1;
  bool is_per_thread = false;    // a part is a whole call, on data of its own
  bool only_one_thread = false;  // has no parts
};

struct BenchPeaks {
  Isa isa = Isa::kScalar;
  int num_threads = 0;
  MultiplyPeaks multiply;
  double memory_read = 0, cache_read = 0;  // 10^9 bytes per second
};

struct BenchRow {
  std::string name;
  Isa isa = Isa::kScalar;
  int num_threads = 0;
  double ns = 0;                 // of a call, the median
  double operations_per_ns = 0;  // 10^9 per second
  double bytes_per_ns = 0;
  std::string bound;    // the nearest limit: "memory", "int8", "bf16", "fp32", "cache", or empty
  double fraction = 0;  // the least time that the limits allow, over the time taken; 0 without a limit
  std::optional<double> over_reference;  // speed over the scalar reference; one thread only
};

struct BenchOptions {
  std::vector<Isa> isas;
  std::vector<int> num_threads;
  std::string filter;  // part of the name; empty: all
};

// Every case of the room at the sizes of DeepSeek-R1. Takes about 300 MB, and touches them.
class KernelCases {
 public:
  KernelCases();
  ~KernelCases();
  const std::vector<BenchCase>& cases() const;
  std::span<const std::byte> stream() const;  // memory larger than the caches

 private:
  struct Content;
  std::unique_ptr<Content> content_;
};

// Measures what `options` asks for, and calls `report` after each. A case whose bytes come from memory takes
// turns with plain reading of as many bytes of `stream`, and is held against that.
void BenchKernels(const BenchOptions& options, std::span<const BenchCase> cases,
                  std::span<const std::byte> stream,
                  const std::function<void(const BenchPeaks&)>& report_peaks,
                  const std::function<void(const BenchRow&)>& report);

}  // namespace tessera::kernels
