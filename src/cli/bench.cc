// Benchmarks inside this process: kernels, and the engine without HTTP. Random token ids, no end of sequence,
// no prefix cache, so that every run does the same work.
#include "cli/bench.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <mutex>
#include <vector>

#include "base/file.h"
#include "base/format.h"
#include "base/log.h"
#include "base/random.h"
#include "cli/assembly.h"
#include "cli/bench_comm.h"
#include "cli/bench_load.h"
#include "cli/flags.h"
#include "cli/options.h"
#include "cli/statistics.h"
#include "kernels/bench.h"

namespace tessera::cli {
namespace {

struct EngineBenchFlags {
  ServeOptions serve;  // of it, the engine and the layout of ranks
  int64_t input_len = 32;
  int64_t output_len = 128;
  int64_t batch_size = 8;      // latency
  int64_t num_prompts = 1000;  // throughput
  int64_t num_iters_warmup = 10;
  int64_t num_iters = 30;
  int64_t num_choices = 1;
  int64_t seed = 0;
  std::string output_json;
};

FlagTable EngineBenchTable(EngineBenchFlags& o, bool latency) {
  const char* group = "Benchmark";
  FlagTable table{.command = latency ? "tessera bench latency" : "tessera bench throughput",
                  .summary = latency ? "Time of one batch, again and again, without HTTP."
                                     : "Tokens per second of many requests, without HTTP.",
                  .positional_name = "MODEL",
                  .positional = &o.serve.engine.model,
                  .flags = {}};
  table.flags = {
      {"input-len", "", IntFlag{&o.input_len, 1, INT32_MAX, true}, "tokens of a prompt", group},
      {"output-len", "", IntFlag{&o.output_len, 1, INT32_MAX, true}, "tokens of an answer", group},
      {"n", "", IntFlag{&o.num_choices, 1, 1024}, "answers per prompt", group},
      {"seed", "", IntFlag{&o.seed, 0, INT64_MAX}, "of the prompts", group},
      {"output-json", "", TextFlag{&o.output_json}, "file for the result", group},
  };
  if (latency) {
    table.flags.push_back({"batch-size", "", IntFlag{&o.batch_size, 1, 65536}, "requests at once", group});
    table.flags.push_back(
        {"num-iters-warmup", "", IntFlag{&o.num_iters_warmup, 0, INT32_MAX}, "unmeasured", group});
    table.flags.push_back({"num-iters", "", IntFlag{&o.num_iters, 1, INT32_MAX}, "measured", group});
  } else {
    table.flags.push_back({"num-prompts", "", IntFlag{&o.num_prompts, 1, INT32_MAX}, "requests", group});
  }
  for (Flag& flag : EngineFlagTable(o.serve.engine)) table.flags.push_back(std::move(flag));
  for (Flag& flag : LayoutFlagTable(o.serve.parallel, o.serve.engine.additional_config))
    table.flags.push_back(std::move(flag));
  return table;
}

// Counts events of many requests and waits for the last.
class Collector {
 public:
  std::shared_ptr<Outbox> Open() {
    boxes_.push_back(std::make_shared<Outbox>([bell = bell_] {
      std::lock_guard lock(bell->mutex);
      bell->rung = true;
      bell->ready.notify_one();
    }));
    return boxes_.back();
  }

  // Takes events until every choice of every request has finished.
  Status WaitForAll(int64_t num_sequences) {
    int64_t finished = 0;
    while (finished < num_sequences) {
      {
        std::unique_lock lock(bell_->mutex);
        bell_->ready.wait(lock, [this] { return bell_->rung; });
        bell_->rung = false;
      }
      for (const auto& box : boxes_) {
        for (const TokenEvent& event : box->Take()) {
          num_tokens_ += static_cast<int64_t>(event.tokens.size());
          if (event.finish == FinishReason::kError) return std::unexpected(event.error);
          finished += event.finish != FinishReason::kNone;
        }
      }
    }
    return {};
  }
  int64_t num_tokens() const { return num_tokens_; }

 private:
  struct Bell {
    std::mutex mutex;
    std::condition_variable ready;
    bool rung = false;
  };
  const std::shared_ptr<Bell> bell_ =
      std::make_shared<Bell>();  // shared: the engine may ring after an early return
  std::vector<std::shared_ptr<Outbox>> boxes_;
  int64_t num_tokens_ = 0;
};

// What ranks hand each other, over all of them.
struct Traffic {
  uint64_t steps = 0;
  uint64_t bytes = 0, wire_bytes = 0;
};

struct Round {
  double seconds = 0;
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;
  Traffic traffic;
};

Traffic TrafficOf(const Assembly& assembly) {
  Traffic traffic{.steps = assembly.engine->Stats().num_steps};
  for (const RankStatus& rank : assembly.engine->Ranks()) {
    for (const RankStatus::Exchange& exchange : rank.exchanges) {
      traffic.bytes += exchange.bytes;
      traffic.wire_bytes += exchange.wire_bytes;
    }
  }
  return traffic;
}

// Submits `num_requests` at once and waits for all of them.
Result<Round> RunRound(Assembly& assembly, const EngineBenchFlags& o, int64_t num_requests, int64_t number) {
  const uint32_t num_ids = static_cast<uint32_t>(std::min(10000, assembly.tokenizer->vocab_size()));
  RandomStream random(static_cast<uint64_t>(o.seed), static_cast<uint64_t>(number));
  std::vector<std::shared_ptr<Request>> requests;
  for (int64_t i = 0; i < num_requests; ++i) {
    auto request = std::make_shared<Request>();
    request->id = Format("bench-{}-{}", number, i);
    request->num_choices = static_cast<int32_t>(o.num_choices);
    request->prompt.resize(o.input_len);
    for (int32_t& token : request->prompt) token = static_cast<int32_t>(random.Below(num_ids));
    request->sampling.seed = random.Next64();
    request->sampling.max_tokens = static_cast<int32_t>(o.output_len);
    request->sampling.ignore_eos = true;
    requests.push_back(std::move(request));
  }
  Collector collector;
  const Traffic before = TrafficOf(assembly);
  const TimeNs begin = assembly.clock.Now();
  for (auto& request : requests)
    RETURN_IF_ERROR(assembly.engine->Submit(std::move(request), collector.Open()));
  RETURN_IF_ERROR(collector.WaitForAll(num_requests * o.num_choices));
  const double seconds = Seconds(assembly.clock.Now() - begin);
  const Traffic after = TrafficOf(assembly);
  return Round{.seconds = seconds,
               .prompt_tokens = num_requests * o.input_len,
               .generated_tokens = collector.num_tokens(),
               .traffic = {after.steps - before.steps, after.bytes - before.bytes,
                           after.wire_bytes - before.wire_bytes}};
}

Status SaveJson(const std::string& path, const std::string& json) {
  return path.empty() ? Status() : WriteFile(path, json + "\n");
}

Status Latency(const EngineBenchFlags& o, Assembly& assembly) {
  for (int64_t i = 0; i < o.num_iters_warmup; ++i) RETURN_IF_ERROR(RunRound(assembly, o, o.batch_size, i));
  std::vector<double> seconds;
  Round last;
  for (int64_t i = 0; i < o.num_iters; ++i) {
    ASSIGN_OR_RETURN(last, RunRound(assembly, o, o.batch_size, o.num_iters_warmup + i));
    seconds.push_back(last.seconds);
  }
  const Statistics times(seconds);
  const double rate = static_cast<double>(last.generated_tokens) / times.Mean();
  fmt::print(
      "batch of {}, {} tokens in, {} out: mean {:.4f} s, deviation {:.4f} s, {:.1f} generated tokens/s\n",
      o.batch_size, o.input_len, o.output_len, times.Mean(), times.Deviation(), rate);
  std::string percentiles;
  for (const int percent : {10, 25, 50, 75, 90, 99}) {
    fmt::print("  p{:<3} {:.4f} s\n", percent, times.Percentile(percent));
    percentiles +=
        Format("{}\"{}\": {}", percentiles.empty() ? "" : ", ", percent, times.Percentile(percent));
  }
  return SaveJson(
      o.output_json,
      Format("{{\"avg_latency\": {}, \"std_latency\": {}, \"latencies\": [{}], "
             "\"percentiles\": {{{}}}, \"tokens_per_second\": {}, \"steps\": {}, \"exchanged_bytes\": {}, "
             "\"wire_bytes\": {}}}",
             times.Mean(), times.Deviation(), fmt::join(seconds, ", "), percentiles, rate, last.traffic.steps,
             last.traffic.bytes, last.traffic.wire_bytes));
}

Status Throughput(const EngineBenchFlags& o, Assembly& assembly) {
  ASSIGN_OR_RETURN(const Round round, RunRound(assembly, o, o.num_prompts, 0));
  const double total = static_cast<double>(round.prompt_tokens + round.generated_tokens);
  fmt::print(
      "{} requests, {} tokens in, {} out, in {:.3f} s: {:.2f} requests/s, {:.1f} tokens/s, {:.1f} generated "
      "tokens/s\n",
      o.num_prompts, o.input_len, o.output_len, round.seconds, o.num_prompts / round.seconds,
      total / round.seconds, round.generated_tokens / round.seconds);
  return SaveJson(
      o.output_json,
      Format("{{\"elapsed_time\": {}, \"num_requests\": {}, \"total_num_tokens\": {}, "
             "\"requests_per_second\": {}, \"tokens_per_second\": {}, \"output_tokens_per_second\": {}}}",
             round.seconds, o.num_prompts, static_cast<int64_t>(total), o.num_prompts / round.seconds,
             total / round.seconds, round.generated_tokens / round.seconds));
}

Status MeasureEngine(const EngineBenchFlags& o, int64_t num_requests, bool latency) {
  RETURN_IF_ERROR(CheckLayoutFlags(o.serve.parallel, o.serve.engine.additional_config));
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(o.serve.engine.model));
  ASSIGN_OR_RETURN(
      const ParallelPlan plan,
      PlanParallel(o.serve, config, [](const char* name) -> const char* { return std::getenv(name); }));
  ASSIGN_OR_RETURN(const std::unique_ptr<Assembly> assembly,
                   Assembly::Build(o.serve.engine, config, plan, {.max_queued_requests = num_requests}));
  return latency ? Latency(o, *assembly) : Throughput(o, *assembly);
}

int RunEngineBench(std::span<const std::string> arguments, bool latency) {
  EngineBenchFlags options;
  options.serve.engine.enable_prefix_caching = false;
  if (!latency) options.input_len = 1024;
  const FlagTable table = EngineBenchTable(options, latency);
  const std::string help = HelpText(table);
  auto parsed = ParseFlags(table, arguments);
  if (parsed && parsed->help) {
    fmt::print("{}", help);
    return 0;
  }
  Status status =
      parsed ? CheckEngineFlags(options.serve.engine, *parsed) : Status(std::unexpected(parsed.error()));
  if (!status) {
    fmt::print(stderr, "{}: {}\n", table.command, status.error().message);
    return 2;
  }
  SetLogLevel(LogLevel::kWarning);
  // The cache need only hold what is measured.
  if (!parsed->Has("max-model-len"))
    options.serve.engine.max_model_len = options.input_len + options.output_len;
  const int64_t num_requests = latency ? options.batch_size : options.num_prompts;
  status = MeasureEngine(options, num_requests, latency);
  if (status) return 0;
  fmt::print(stderr, "{}: {}\n", table.command, status.error().message);
  return 1;
}

int RunLatency(std::span<const std::string> arguments) {
  return RunEngineBench(arguments, true);
}
int RunThroughput(std::span<const std::string> arguments) {
  return RunEngineBench(arguments, false);
}

int RunKernels(std::span<const std::string> arguments) {
  const FlagTable table{.command = "tessera bench kernels",
                        .summary = "Speed of every kernel on every instruction set of this CPU, one thread.",
                        .flags = {}};
  const auto parsed = ParseFlags(table, arguments);
  if (!parsed) {
    fmt::print(stderr, "{}: {}\n", table.command, parsed.error().message);
    return 2;
  }
  if (parsed->help) {
    fmt::print("{}", HelpText(table));
  } else {
    kernels::BenchKernels(std::cout);
  }
  return 0;
}

struct Bench {
  const char* name;
  const char* help;
  int (*run)(std::span<const std::string> arguments);
};
constexpr Bench kBenches[] = {
    {"kernels", "speed of every kernel over its reference", RunKernels},
    {"latency", "time of one batch in this process", RunLatency},
    {"throughput", "tokens per second of many requests in this process", RunThroughput},
    {"serve", "load on a running server", RunBenchServe},
    {"load", "time and memory of loading a checkpoint", RunBenchLoad},
    {"comm", "time of each collective between processes", RunBenchComm},
};

}  // namespace

int RunBench(std::span<const std::string> arguments) {
  for (const Bench& bench : kBenches) {
    if (!arguments.empty() && arguments[0] == bench.name) return bench.run(arguments.subspan(1));
  }
  const bool help = !arguments.empty() && (arguments[0] == "--help" || arguments[0] == "-h");
  FILE* out = help ? stdout : stderr;
  if (!help && !arguments.empty()) fmt::print(out, "tessera bench: unknown benchmark '{}'\n\n", arguments[0]);
  fmt::print(out, "usage: tessera bench BENCHMARK [flags]\n\n");
  for (const Bench& bench : kBenches) fmt::print(out, "  {:<14}{}\n", bench.name, bench.help);
  return help ? 0 : 2;
}

}  // namespace tessera::cli
