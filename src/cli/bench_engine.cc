// `tessera bench latency` and `throughput`: the engine without HTTP. Random token ids, no end of sequence, no
// prefix cache, so that every run does the same work.
#include "cli/bench.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/format.h"
#include "base/log.h"
#include "base/random.h"
#include "cli/assembly.h"
#include "cli/flags.h"
#include "cli/machine.h"
#include "cli/options.h"
#include "cli/statistics.h"

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
      {"disable-detokenize", "", IgnoredFlag{false}, "no text is made here", group},
      {"use-beam-search", "", RefusedFlag{false}, "there is no beam search", group},
      {"profile", "", RefusedFlag{false}, "use a profiler of the system", group},
  };
  if (latency) {
    table.flags.push_back({"batch-size", "", IntFlag{&o.batch_size, 1, 65536}, "requests at once", group});
    table.flags.push_back(
        {"num-iters-warmup", "", IntFlag{&o.num_iters_warmup, 0, INT32_MAX}, "unmeasured", group});
    table.flags.push_back({"num-iters", "", IntFlag{&o.num_iters, 1, INT32_MAX}, "measured", group});
  } else {
    table.flags.push_back({"num-prompts", "", IntFlag{&o.num_prompts, 1, INT32_MAX}, "requests", group});
    table.flags.push_back({"backend", "", OnlyFlag{{"vllm"}}, "the engine in this process", group});
    table.flags.push_back({"dataset-name", "", OnlyFlag{{"random"}}, "prompts are random", group});
    table.flags.push_back(
        {"random-input-len", "", IntFlag{&o.input_len, 1, INT32_MAX, true}, "the same as input-len", group});
    table.flags.push_back({"random-output-len", "", IntFlag{&o.output_len, 1, INT32_MAX, true},
                           "the same as output-len", group});
  }
  for (Flag& flag : EngineFlagTable(o.serve.engine)) table.flags.push_back(std::move(flag));
  for (Flag& flag : LayoutFlagTable(o.serve.parallel, o.serve.engine.additional_config))
    table.flags.push_back(std::move(flag));
  return table;
}

// Takes the tokens of many requests, with their times. It looks now and then instead of being told: waking up
// for every token would take time from the engine.
class Collector {
 public:
  std::shared_ptr<Outbox> Open() {
    boxes_.push_back(std::make_shared<Outbox>([] {}));
    return boxes_.back();
  }

  // Takes events until every choice of every request has finished.
  Status WaitForAll(int64_t num_answers) {
    for (int64_t finished = 0; finished < num_answers;) {
      std::this_thread::sleep_for(std::chrono::milliseconds(3));
      for (size_t i = 0; i < boxes_.size(); ++i) {
        for (const TokenEvent& event : boxes_[i]->Take()) {
          if (event.finish == FinishReason::kError) return std::unexpected(event.error);
          finished += event.finish != FinishReason::kNone;
          auto& times = times_[{i, event.choice}];
          times.insert(times.end(), event.tokens.size(), event.time);
        }
      }
    }
    return {};
  }
  // Of each answer, when its tokens came, on the engine's clock.
  std::vector<std::vector<TimeNs>> TakeTimes() {
    std::vector<std::vector<TimeNs>> all;
    for (auto& [answer, times] : times_) all.push_back(std::move(times));
    return all;
  }

 private:
  std::vector<std::shared_ptr<Outbox>> boxes_;
  std::map<std::pair<size_t, int32_t>, std::vector<TimeNs>> times_;  // by request and choice
};

// What an engine has done so far, or between two moments.
struct Work {
  uint64_t steps = 0;
  double run_seconds = 0;              // in the executor
  uint64_t bytes = 0, wire_bytes = 0;  // that ranks hand each other, over all of them
};

struct Round {
  double seconds = 0;  // until the last token
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;
  std::vector<double> ttft_ms, tpot_ms;  // of each answer; no tpot for a single token
  double prefill_seconds = 0;            // until every answer had its first token
  double decode_seconds = 0;             // from then on
  int64_t decoded_tokens = 0;            // in that time
  Work work;
};

Work WorkOf(const Assembly& assembly) {
  const EngineStats stats = assembly.engine->Stats();
  Work work{.steps = stats.num_steps, .run_seconds = Seconds(stats.run_time)};
  for (const RankStatus& rank : assembly.engine->Ranks()) {
    for (const RankStatus::Exchange& exchange : rank.exchanges) {
      work.bytes += exchange.bytes;
      work.wire_bytes += exchange.wire_bytes;
    }
  }
  return work;
}

// What the times at which tokens came say of a round that began at `begin`.
void Divide(const std::vector<std::vector<TimeNs>>& answers, TimeNs begin, Round& round) {
  TimeNs all_started = begin, end = begin;
  for (const auto& times : answers) {
    if (times.empty()) continue;
    all_started = std::max(all_started, times.front());
    end = std::max(end, times.back());
    round.ttft_ms.push_back(Seconds(times.front() - begin) * 1e3);
    if (times.size() > 1) {
      const auto gaps = static_cast<double>(times.size() - 1);
      round.tpot_ms.push_back(Seconds(times.back() - times.front()) * 1e3 / gaps);
    }
  }
  round.seconds = Seconds(end - begin);
  round.prefill_seconds = Seconds(all_started - begin);
  round.decode_seconds = Seconds(end - all_started);
  for (const auto& times : answers) {
    round.generated_tokens += static_cast<int64_t>(times.size());
    round.decoded_tokens += std::ranges::count_if(times, [&](TimeNs time) { return time > all_started; });
  }
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
  const Work before = WorkOf(assembly);
  const TimeNs begin = assembly.clock.Now();
  for (auto& request : requests)
    RETURN_IF_ERROR(assembly.engine->Submit(std::move(request), collector.Open()));
  RETURN_IF_ERROR(collector.WaitForAll(num_requests * o.num_choices));
  const Work after = WorkOf(assembly);
  Round round{.prompt_tokens = num_requests * o.input_len,
              .work = {after.steps - before.steps, after.run_seconds - before.run_seconds,
                       after.bytes - before.bytes, after.wire_bytes - before.wire_bytes}};
  Divide(collector.TakeTimes(), begin, round);
  return round;
}

Status SaveJson(const std::string& path, const std::string& json) {
  return path.empty() ? Status() : WriteFile(path, json + "\n");
}

// {"mean": .., "median": .., "p99": ..}
std::string Summary(const Statistics& times) {
  return Format("{{\"mean\": {}, \"median\": {}, \"p99\": {}}}", times.Mean(), times.Percentile(50),
                times.Percentile(99));
}

// What rounds of the same work have in common.
struct Rounds {
  std::vector<double> seconds, ttft_ms, tpot_ms, prefill_rates, decode_rates, outside_shares;
  Round last;

  void Add(Round round) {
    seconds.push_back(round.seconds);
    ttft_ms.insert(ttft_ms.end(), round.ttft_ms.begin(), round.ttft_ms.end());
    tpot_ms.insert(tpot_ms.end(), round.tpot_ms.begin(), round.tpot_ms.end());
    prefill_rates.push_back(static_cast<double>(round.prompt_tokens) / round.prefill_seconds);
    if (round.decoded_tokens > 0)
      decode_rates.push_back(static_cast<double>(round.decoded_tokens) / round.decode_seconds);
    outside_shares.push_back(1 - round.work.run_seconds / round.seconds);
    last = std::move(round);
  }
  // Members of the result that latency and throughput share.
  std::string Members(const Assembly& assembly) const {
    return Format(
        "{}, \"ttft_ms\": {}, \"tpot_ms\": {}, \"prefill_tokens_per_second\": {}, "
        "\"decode_tokens_per_second\": {}, \"outside_forward\": {}, \"steps\": {}, "
        "\"exchanged_bytes\": {}, \"wire_bytes\": {}",
        ResultHead(assembly.isa, assembly.num_threads), Summary(Statistics(ttft_ms)),
        Summary(Statistics(tpot_ms)), Statistics(prefill_rates).Percentile(50),
        Statistics(decode_rates).Percentile(50), Statistics(outside_shares).Percentile(50), last.work.steps,
        last.work.bytes, last.work.wire_bytes);
  }
  void Print() const {
    const Statistics ttft(ttft_ms), tpot(tpot_ms);
    fmt::print("  first token after {:.2f} ms (p99 {:.2f}), then one per {:.3f} ms (p99 {:.3f})\n",
               ttft.Mean(), ttft.Percentile(99), tpot.Mean(), tpot.Percentile(99));
    fmt::print(
        "  prefill {:.1f} tokens/s, decode {:.2f} tokens/s; {:.2f} % of the time outside forward passes\n",
        Statistics(prefill_rates).Percentile(50), Statistics(decode_rates).Percentile(50),
        100 * Statistics(outside_shares).Percentile(50));
  }
};

Status Latency(const EngineBenchFlags& o, Assembly& assembly) {
  for (int64_t i = 0; i < o.num_iters_warmup; ++i) RETURN_IF_ERROR(RunRound(assembly, o, o.batch_size, i));
  Rounds rounds;
  for (int64_t i = 0; i < o.num_iters; ++i) {
    ASSIGN_OR_RETURN(Round round, RunRound(assembly, o, o.batch_size, o.num_iters_warmup + i));
    rounds.Add(std::move(round));
  }
  const Statistics times(rounds.seconds);
  const double rate = static_cast<double>(rounds.last.generated_tokens) / times.Mean();
  fmt::print(
      "batch of {}, {} tokens in, {} out: mean {:.4f} s, deviation {:.4f} s, {:.1f} generated tokens/s\n",
      o.batch_size, o.input_len, o.output_len, times.Mean(), times.Deviation(), rate);
  std::string percentiles;
  for (const int percent : {10, 25, 50, 75, 90, 99}) {
    fmt::print("  p{:<3} {:.4f} s\n", percent, times.Percentile(percent));
    percentiles +=
        Format("{}\"{}\": {}", percentiles.empty() ? "" : ", ", percent, times.Percentile(percent));
  }
  rounds.Print();
  return SaveJson(o.output_json,
                  Format("{{\"avg_latency\": {}, \"std_latency\": {}, \"latencies\": [{}], "
                         "\"percentiles\": {{{}}}, \"tokens_per_second\": {}, \"batch_size\": {}, "
                         "\"input_len\": {}, \"output_len\": {}, {}}}",
                         times.Mean(), times.Deviation(), fmt::join(rounds.seconds, ", "), percentiles, rate,
                         o.batch_size, o.input_len, o.output_len, rounds.Members(assembly)));
}

Status Throughput(const EngineBenchFlags& o, Assembly& assembly) {
  Rounds rounds;
  ASSIGN_OR_RETURN(Round first, RunRound(assembly, o, o.num_prompts, 0));
  rounds.Add(std::move(first));
  const Round& round = rounds.last;
  const double total = static_cast<double>(round.prompt_tokens + round.generated_tokens);
  fmt::print(
      "{} requests, {} tokens in, {} out, in {:.3f} s: {:.2f} requests/s, {:.1f} tokens/s, {:.1f} generated "
      "tokens/s\n",
      o.num_prompts, o.input_len, o.output_len, round.seconds, o.num_prompts / round.seconds,
      total / round.seconds, round.generated_tokens / round.seconds);
  rounds.Print();
  return SaveJson(
      o.output_json,
      Format("{{\"elapsed_time\": {}, \"num_requests\": {}, \"total_num_tokens\": {}, "
             "\"requests_per_second\": {}, \"tokens_per_second\": {}, \"output_tokens_per_second\": {}, {}}}",
             round.seconds, o.num_prompts, static_cast<int64_t>(total), o.num_prompts / round.seconds,
             total / round.seconds, round.generated_tokens / round.seconds, rounds.Members(assembly)));
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

}  // namespace

int RunBenchLatency(std::span<const std::string> arguments) {
  return RunEngineBench(arguments, true);
}

int RunBenchThroughput(std::span<const std::string> arguments) {
  return RunEngineBench(arguments, false);
}

}  // namespace tessera::cli
