// `tessera bench step`: one forward pass of a given shape again and again, without requests: decoding at a
// length of context that nobody has to compute first, or a chunk of a prompt. What the cache holds does not
// matter for its time.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "base/file.h"
#include "base/format.h"
#include "base/log.h"
#include "base/random.h"
#include "cli/assembly.h"
#include "cli/bench.h"
#include "cli/flags.h"
#include "cli/machine.h"
#include "cli/options.h"
#include "cli/statistics.h"

namespace tessera::cli {
namespace {

struct StepFlags {
  ServeOptions serve;  // of it, the engine and the layout of ranks
  int64_t batch_size = 1;
  int64_t context_len = 0;
  int64_t num_tokens = 1;
  bool expanded = false;
  double temperature = 0;
  int64_t num_iters_warmup = 1;
  int64_t num_iters = 10;
  std::string output_json;
};

FlagTable StepTable(StepFlags& o) {
  const char* group = "Benchmark";
  FlagTable table{.command = "tessera bench step",
                  .summary = "Time of one forward pass of a given shape.",
                  .positional_name = "MODEL",
                  .positional = &o.serve.engine.model,
                  .flags = {}};
  table.flags = {
      {"batch-size", "", IntFlag{&o.batch_size, 1, 65536}, "sequences in all", group},
      {"context-len", "", IntFlag{&o.context_len, 0, INT32_MAX, true}, "tokens of each before the step",
       group},
      {"num-tokens", "", IntFlag{&o.num_tokens, 1, INT32_MAX, true}, "tokens of each in the step", group},
      {"expanded", "", BoolFlag{&o.expanded},
       "tokens in the expanded form of attention, as those of a prompt", group},
      {"temperature", "", NumberFlag{&o.temperature, -1, 2}, "of the draws, one per sequence", group},
      {"num-iters-warmup", "", IntFlag{&o.num_iters_warmup, 0, INT32_MAX}, "unmeasured", group},
      {"num-iters", "", IntFlag{&o.num_iters, 1, INT32_MAX}, "measured", group},
      {"output-json", "", TextFlag{&o.output_json}, "file for the result", group},
  };
  for (Flag& flag : EngineFlagTable(o.serve.engine)) table.flags.push_back(std::move(flag));
  for (Flag& flag : LayoutFlagTable(o.serve.parallel, o.serve.engine.additional_config))
    table.flags.push_back(std::move(flag));
  return table;
}

// Sequences go to the groups in turn; each has blocks of its own.
Result<Step> MakeStep(const StepFlags& o, const Assembly& assembly) {
  const int64_t block_size = o.serve.engine.block_size;
  const int64_t num_blocks = (o.context_len + o.num_tokens + block_size - 1) / block_size;
  const int64_t num_groups = assembly.plan.degrees.dp;
  const int64_t per_group = (o.batch_size + num_groups - 1) / num_groups;
  if (per_group * num_blocks > assembly.cache.num_blocks) {
    return Invalid("{} sequences of {} tokens need {} cache blocks, the cache has {}", per_group,
                   o.context_len + o.num_tokens, per_group * num_blocks, assembly.cache.num_blocks);
  }
  Step step;
  step.groups.resize(num_groups);
  RandomStream random(1);
  const auto num_ids = static_cast<uint32_t>(std::min(10000, assembly.tokenizer->vocab_size()));
  for (int64_t i = 0; i < o.batch_size; ++i) {
    GroupStep& group = step.groups[i % num_groups];
    group.sequences.push_back({.first_token = static_cast<int32_t>(group.tokens.size()),
                               .num_tokens = static_cast<int32_t>(o.num_tokens),
                               .num_computed = static_cast<int32_t>(o.context_len),
                               .num_expanded = o.expanded ? INT32_MAX : 0,
                               .first_block = static_cast<int32_t>(group.block_ids.size()),
                               .num_blocks = static_cast<int32_t>(num_blocks)});
    for (int64_t j = 0; j < num_blocks; ++j)
      group.block_ids.push_back(static_cast<int32_t>(group.block_ids.size()));
    for (int64_t j = 0; j < o.num_tokens; ++j)
      group.tokens.push_back(static_cast<int32_t>(random.Below(num_ids)));
    group.rows.push_back({.token = static_cast<int32_t>(group.tokens.size()) - 1,
                          .sampling = static_cast<int32_t>(group.sampling.size())});
    group.sampling.push_back({.temperature = static_cast<float>(std::max(o.temperature, 0.0)),
                              .position = static_cast<uint32_t>(o.context_len + o.num_tokens),
                              .seed = random.Next64()});
  }
  return step;
}

Status Measure(const StepFlags& o) {
  RETURN_IF_ERROR(CheckLayoutFlags(o.serve.parallel, o.serve.engine.additional_config));
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(o.serve.engine.model));
  ASSIGN_OR_RETURN(
      const ParallelPlan plan,
      PlanParallel(o.serve, config, [](const char* name) -> const char* { return std::getenv(name); }));
  ASSIGN_OR_RETURN(const std::unique_ptr<Assembly> assembly,
                   Assembly::Build(o.serve.engine, config, plan, {}));
  ASSIGN_OR_RETURN(Step step, MakeStep(o, *assembly));
  std::vector<double> times_ms;
  for (int64_t i = -o.num_iters_warmup; i < o.num_iters; ++i) {
    ++step.number;
    const TimeNs begin = assembly->clock.Now();
    RETURN_IF_ERROR(assembly->RunStep(step));
    if (i >= 0) times_ms.push_back(Seconds(assembly->clock.Now() - begin) * 1e3);
  }
  const Statistics times(times_ms);
  const double median_ms = times.Percentile(50);
  const double rate = static_cast<double>(o.batch_size * o.num_tokens) / median_ms * 1e3;
  fmt::print(
      "{} sequences, {} tokens each after {}: median {:.3f} ms, best {:.3f}, p90 {:.3f}; {:.2f} tokens/s\n",
      o.batch_size, o.num_tokens, o.context_len, median_ms, times.Percentile(0), times.Percentile(90), rate);
  if (o.output_json.empty()) return {};
  return WriteFile(
      o.output_json,
      Format("{{\"batch_size\": {}, \"context_len\": {}, \"num_tokens\": {}, \"expanded\": {}, \"times_ms\": "
             "[{}], "
             "\"median_ms\": {}, \"best_ms\": {}, \"tokens_per_second\": {}, {}}}\n",
             o.batch_size, o.context_len, o.num_tokens, o.expanded, fmt::join(times_ms, ", "), median_ms,
             times.Percentile(0), rate, ResultHead(assembly->isa, assembly->num_threads)));
}

}  // namespace

int RunBenchStep(std::span<const std::string> arguments) {
  StepFlags options;
  return RunCommand(StepTable(options), arguments, [&](ParsedFlags& parsed) -> Status {
    RETURN_IF_ERROR(CheckEngineFlags(options.serve.engine, parsed));
    SetLogLevel(LogLevel::kWarning);
    // The buffers need only hold what is measured.
    if (!parsed.Has("max-model-len"))
      options.serve.engine.max_model_len = options.context_len + options.num_tokens + 1;
    return Measure(options);
  });
}

}  // namespace tessera::cli
