// `tessera bench kernels`: flags, table and JSON around the cases of kernels/, and the sampler's cases, which
// lie above that room.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <vector>

#include "base/file.h"
#include "base/format.h"
#include "base/random.h"
#include "base/threads.h"
#include "cli/bench.h"
#include "cli/flags.h"
#include "cli/json.h"
#include "cli/machine.h"
#include "engine/sampler.h"
#include "kernels/bench.h"

namespace tessera::cli {
namespace {

struct KernelFlags {
  std::vector<std::string> isas;
  std::vector<std::string> threads;
  std::string filter;
  std::string json;
};

FlagTable KernelTable(KernelFlags& o) {
  const char* group = "Benchmark";
  return {.command = "tessera bench kernels",
          .summary =
              "Speed of every kernel on every instruction set of this CPU, beside the machine's peaks "
              "and the scalar reference.",
          .flags = {
              {"isa", "", ListFlag{&o.isas}, "instruction sets (default: all of this CPU but scalar)", group},
              {"threads", "", ListFlag{&o.threads}, "numbers of threads (default: 1 and all cores)", group},
              {"filter", "", TextFlag{&o.filter}, "only what has this text in its name", group},
              {"json", "", TextFlag{&o.json}, "file for the result", group},
          }};
}

Result<kernels::BenchOptions> OptionsOf(const KernelFlags& flags) {
  kernels::BenchOptions options{.filter = flags.filter};
  for (const auto isa : {kernels::Isa::kAvx2, kernels::Isa::kAvx512, kernels::Isa::kAvx512Bf16}) {
    if (flags.isas.empty() && kernels::ForIsa(isa)) options.isas.push_back(isa);
  }
  for (const std::string& name : flags.isas) {
    ASSIGN_OR_RETURN(const kernels::Kernels* table, kernels::Choose(name));
    options.isas.push_back(table->isa);
  }
  if (options.isas.empty()) options.isas.push_back(kernels::Isa::kScalar);
  if (flags.threads.empty()) {
    options.num_threads.push_back(1);
    if (AvailableCores() > 1) options.num_threads.push_back(AvailableCores());
  }
  for (const std::string& text : flags.threads) {
    ASSIGN_OR_RETURN(const int64_t count, ParseCount(text, false));
    if (count < 1 || count > 1024) return Invalid("--threads: {} is not within 1 .. 1024", text);
    options.num_threads.push_back(static_cast<int>(count));
  }
  return options;
}

// Rows of R1's vocabulary as a head gives them, 33 MB of them: a trained model's are peaked.
class SamplerCases {
 public:
  static constexpr int kRows = 64;
  static constexpr int kVocabulary = 129280;

  explicit SamplerCases(std::vector<kernels::BenchCase>& cases) {
    FillRows();
    for (const bool flat : {false, true}) {
      const char* shape = flat ? " flat" : "";
      Add(cases, Format("sampler greedy{}", shape), flat, {.temperature = 0});
      Add(cases, Format("sampler temperature{}", shape), flat, {.temperature = 0.6f});
      Add(cases, Format("sampler top-p{}", shape), flat, {.temperature = 0.6f, .top_p = 0.95f});
      Add(cases, Format("sampler top-k top-p{}", shape), flat,
          {.temperature = 0.6f, .top_p = 0.95f, .top_k = 40});
    }
    Add(cases, "sampler min-p", false, {.temperature = 0.6f, .min_p = 0.05f});
    Add(cases, "sampler penalties", false,
        {.temperature = 0.6f, .top_p = 0.95f, .frequency_penalty = 0.5f, .counts_end = kCounts});
    Add(cases, "sampler top-p logprobs 5", false, {.temperature = 0.6f, .top_p = 0.95f}, 5);
  }

 private:
  static constexpr int kCounts = 1000;

  // Sums of uniform values, about normal; a peaked row has a dozen of tokens far above them.
  void FillRows() {
    RandomStream random(1);
    for (std::vector<float>* rows : {&peaked_, &flat_}) {
      rows->resize(int64_t{kRows} * kVocabulary);
      const float spread = rows == &flat_ ? 2 : 5;
      for (float& x : *rows) x = (random.Unit() + random.Unit() + random.Unit() - 1.5f) * spread;
      for (int i = 0; rows == &peaked_ && i < kRows * 12; ++i)
        (*rows)[i % kRows * kVocabulary + random.Below(kVocabulary)] = 12 + 6 * random.Unit();
    }
    for (int i = 0; i < kCounts; ++i)
      counts_.push_back({.token = static_cast<int32_t>(random.Below(kVocabulary)), .in_output = 1});
  }

  void Add(std::vector<kernels::BenchCase>& cases, const std::string& name, bool flat, SamplingRow row,
           int num_logprobs = -1) {
    const double values = double{kRows} * kVocabulary;
    cases.push_back({.name = Format("{} {}x{}", name, kRows, kVocabulary),
                     .bytes = 4 * values,
                     .from_memory = true,
                     .run =
                         [=, this](const kernels::Kernels& table, int part, int parts, int call) {
                           Draw(table, flat ? flat_ : peaked_, row, num_logprobs, part, parts, call);
                         },
                     .reference_parts = 0});
  }

  // Penalties change the rows: the next call takes back what one call did.
  void Draw(const kernels::Kernels& table, std::vector<float>& rows, SamplingRow row, int num_logprobs,
            int part, int parts, int call) {
    thread_local std::unique_ptr<Sampler> sampler;
    thread_local kernels::Isa isa;
    if (sampler == nullptr || isa != table.isa) sampler = std::make_unique<Sampler>(table, kVocabulary);
    isa = table.isa;
    GroupStep step;
    step.counts = counts_;
    step.sampling.push_back(row);
    if (call % 2 == 1) step.sampling[0].frequency_penalty = -row.frequency_penalty;
    for (int i = kRows * part / parts; i < kRows * (part + 1) / parts; ++i) {
      step.sampling[0].position = static_cast<uint32_t>(call * kRows + i);
      RowOutput output;
      sampler->Sample(step, {.sampling = 0, .num_logprobs = num_logprobs},
                      std::span(rows).subspan(int64_t{i} * kVocabulary, kVocabulary), output);
    }
  }

  std::vector<float> peaked_, flat_;
  std::vector<TokenCount> counts_;
};

void PrintPeaks(const kernels::BenchPeaks& peaks) {
  fmt::print(
      "{:<11} {:>2} thread{:<3} int8 {:.0f} Gop/s, bf16 {:.0f} Gop/s, fp32 {:.0f} Gop/s; reads memory "
      "at {:.1f} GB/s, cache at {:.0f} GB/s\n",
      kernels::IsaName(peaks.isa), peaks.num_threads,
      peaks.num_threads == 1 ? ":" : "s:", peaks.multiply.int8, peaks.multiply.bf16, peaks.multiply.fp32,
      peaks.memory_read, peaks.cache_read);
  std::fflush(stdout);
}

void PrintRow(const kernels::BenchRow& row) {
  std::string line = Format("{:<38} {:<11} {:>3} {:>12.1f} us", row.name, kernels::IsaName(row.isa),
                            row.num_threads, row.ns / 1000);
  line += row.operations_per_ns > 0 ? Format("{:>9.1f} Gop/s", row.operations_per_ns) : Format("{:15}", "");
  line += row.bytes_per_ns > 0 ? Format("{:>8.2f} GB/s", row.bytes_per_ns) : Format("{:13}", "");
  line +=
      row.fraction > 0 ? Format("{:>6.0f} % of {:<7}", 100 * row.fraction, row.bound) : Format("{:18}", "");
  if (row.over_reference) line += Format("{:>8.1f}x", *row.over_reference);
  fmt::print("{}\n", line);
  std::fflush(stdout);
}

std::string JsonOf(const kernels::BenchPeaks& peaks) {
  return Format(
      "{{\"isa\": \"{}\", \"threads\": {}, \"int8_gops\": {}, \"bf16_gops\": {}, \"fp32_gops\": {}, "
      "\"memory_gb_s\": {}, \"cache_gb_s\": {}}}",
      kernels::IsaName(peaks.isa), peaks.num_threads, peaks.multiply.int8, peaks.multiply.bf16,
      peaks.multiply.fp32, peaks.memory_read, peaks.cache_read);
}

std::string JsonOf(const kernels::BenchRow& row) {
  return Format(
      "{{\"name\": {}, \"isa\": \"{}\", \"threads\": {}, \"us\": {}, \"gops\": {}, \"gb_s\": {}, "
      "\"bound\": \"{}\", \"fraction\": {}, \"over_reference\": {}}}",
      JsonQuote(row.name), kernels::IsaName(row.isa), row.num_threads, row.ns / 1000, row.operations_per_ns,
      row.bytes_per_ns, row.bound, row.fraction,
      row.over_reference ? Format("{}", *row.over_reference) : "null");
}

Status Measure(const KernelFlags& flags) {
  ASSIGN_OR_RETURN(const kernels::BenchOptions options, OptionsOf(flags));
  const kernels::KernelCases own;
  std::vector<kernels::BenchCase> cases = own.cases();
  const SamplerCases sampler(cases);
  std::vector<std::string> peaks, rows;
  kernels::BenchKernels(
      options, cases, own.stream(),
      [&](const kernels::BenchPeaks& one) {
        PrintPeaks(one);
        peaks.push_back(JsonOf(one));
      },
      [&](const kernels::BenchRow& row) {
        if (rows.empty())
          fmt::print("\n{:<38} {:<11} {:>3} {:>15}{:>15}{:>13}{:>18}{:>9}\n", "name", "isa", "thr", "time",
                     "", "", "of the peak", "over ref");
        PrintRow(row);
        rows.push_back(JsonOf(row));
      });
  if (rows.empty()) return Invalid("--filter: no case has '{}' in its name", flags.filter);
  if (flags.json.empty()) return {};
  return WriteFile(flags.json, Format("{{{}, \"peaks\": [{}], \"rows\": [{}]}}\n",
                                      ResultHead("", options.num_threads.back()), fmt::join(peaks, ", "),
                                      fmt::join(rows, ",\n")));
}

}  // namespace

int RunBenchKernels(std::span<const std::string> arguments) {
  KernelFlags flags;
  return RunCommand(KernelTable(flags), arguments, [&](const ParsedFlags&) { return Measure(flags); });
}

}  // namespace tessera::cli
