// The table of `tessera serve`'s flags, in groups, and the checks across flags. Names and meanings follow
// vLLM's.
#include "cli/options.h"

#include <cmath>
#include <limits>
#include <utility>

#include "base/format.h"
#include "cli/json.h"
#include "cli/launch_environment.h"

namespace tessera::cli {
namespace {

constexpr int64_t kUnbounded = std::numeric_limits<int64_t>::max();
constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr char kModel[] = "Model";
constexpr char kScheduler[] = "Scheduler and cache";
constexpr char kHttp[] = "HTTP";
constexpr char kAnswers[] = "Answers";
constexpr char kParallel[] = "Parallelism";
constexpr char kNotYet[] = "this is not built yet";

void Append(std::vector<Flag>& table, std::vector<Flag> more) {
  table.insert(table.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

std::vector<Flag> ModelFlags(EngineFlags& o) {
  return {
      {"model", "", TextFlag{&o.model}, "folder of the checkpoint (or the positional argument)", kModel},
      {"tokenizer", "", TextFlag{&o.tokenizer}, "folder of tokenizer.json; empty: the model's", kModel},
      {"quantization", "q", TextFlag{&o.quantization},
       "scheme that the checkpoint must have (ascend, golden-stick); empty: what its tensors say", kModel},
      {"max-model-len", "", OptionalIntFlag{&o.max_model_len, 1, kMaxInt, true},
       "limit of prompt plus answer, in tokens (default: the model's max_position_embeddings)", kModel},
      {"generation-config", "", TextFlag{&o.generation_config},
       "default sampling: auto (the checkpoint's generation_config.json), vllm (none), or another folder",
       kModel},
      {"override-generation-config", "", JsonFlag{&o.override_generation_config},
       "default sampling on top of that: temperature, top_p, top_k, min_p, repetition_penalty, "
       "max_new_tokens",
       kModel},
      {"dtype", "", OnlyFlag{{"auto", "bfloat16"}}, "activations are bf16 in tessera-2", kModel},
      {"load-format", "", OnlyFlag{{"auto", "safetensors"}}, "only safetensors are read", kModel},
  };
}

std::vector<Flag> SchedulerFlags(EngineFlags& o) {
  return {
      {"max-num-seqs", "", IntFlag{&o.max_num_seqs, 1, 65536}, "sequences that run at once, per group",
       kScheduler},
      {"max-num-batched-tokens", "", IntFlag{&o.max_num_batched_tokens, 1, 1 << 20, true},
       "tokens of one step, per group", kScheduler},
      {"block-size", "", IntFlag{&o.block_size, 16, 4096}, "positions of one cache block, a multiple of 16",
       kScheduler},
      {"gpu-memory-utilization", "", NumberFlag{&o.gpu_memory_utilization, 0, 1},
       "share of the memory limit (RAM or cgroup) for weights, workspace and cache together", kScheduler},
      {"kv-cache-memory-bytes", "", OptionalIntFlag{&o.kv_cache_memory_bytes, 1, kUnbounded, true},
       "size of the cache instead of that", kScheduler},
      {"num-gpu-blocks-override", "", OptionalIntFlag{&o.num_gpu_blocks_override, 1, kMaxInt},
       "blocks of the cache instead of either", kScheduler},
      {"enable-chunked-prefill", "", BoolFlag{&o.enable_chunked_prefill},
       "cut long prompts over several steps", kScheduler},
      {"enable-prefix-caching", "", BoolFlag{&o.enable_prefix_caching},
       "find full blocks of earlier prompts again", kScheduler},
      {"threads", "", IntFlag{&o.threads, 0, 1024},
       "threads that compute, of each rank; 0: its share of the cores of the cgroup", kScheduler},
      {"decode-threads", "", IntFlag{&o.decode_threads, 0, 1024},
       "at most so many of them in steps that only generate tokens: those wait for memory, and many cores "
       "can be "
       "slower than some; 0: all",
       kScheduler},
      {"scheduling-policy", "", OnlyFlag{{"fcfs"}}, kNotYet, kScheduler},
      {"kv-cache-dtype", "", OnlyFlag{{"auto", "bfloat16"}}, "the cache is bf16 in tessera-2", kScheduler},
      {"stream-interval", "", OnlyFlag{{"1"}}, kNotYet, kScheduler},
      {"max-num-partial-prefills", "", OnlyFlag{{"1"}}, kNotYet, kScheduler},
      {"max-long-partial-prefills", "", OnlyFlag{{"1"}}, kNotYet, kScheduler},
      {"long-prefill-token-threshold", "", OnlyFlag{{"0"}}, kNotYet, kScheduler},
      {"kv-offloading-size", "", OnlyFlag{{"0"}}, kNotYet, kScheduler},
      {"cpu-offload-gb", "", OnlyFlag{{"0"}}, "weights are in RAM already", kScheduler},
  };
}

std::vector<Flag> HttpFlags(ServeOptions& o) {
  return {
      {"host", "", TextFlag{&o.host}, "address to listen on; 0.0.0.0: all interfaces", kHttp},
      {"port", "", IntFlag{&o.port, 0, 65535}, "1024 to 65535; 0: any free one", kHttp},
      {"api-key", "", ListFlag{&o.api_key}, "accepted bearer tokens; else VLLM_API_KEY; else open", kHttp},
      {"max-num-queued-reqs", "", IntFlag{&o.max_num_queued_reqs, 1, 10'000'000},
       "requests that may wait; more get 429", kHttp},
      {"max-body-bytes", "", IntFlag{&o.max_body_bytes, 1024, int64_t{1} << 30, true}, "largest request",
       kHttp},
      {"shutdown-timeout", "", NumberFlag{&o.shutdown_timeout_s, -1, 86400},
       "seconds that running requests get after SIGTERM", kHttp},
      {"enable-request-id-headers", "", BoolFlag{&o.enable_request_id_headers}, "answer with X-Request-Id",
       kHttp},
      {"enable-server-load-tracking", "", BoolFlag{&o.enable_server_load_tracking}, "count for /load", kHttp},
      {"enable-tokenizer-info-endpoint", "", BoolFlag{&o.enable_tokenizer_info_endpoint},
       "open /tokenizer_info", kHttp},
      {"disable-log-stats", "", BoolFlag{&o.disable_log_stats}, "no line of statistics every 5 seconds",
       kHttp},
      {"log-level", "", TextFlag{&o.log_level, {"debug", "info", "warning", "error"}},
       "least level that is logged", kHttp},
  };
}

std::vector<Flag> AnswerFlags(ServeOptions& o) {
  return {
      {"served-model-name", "", ListFlag{&o.served_model_name},
       "names that requests may use, the first stands in answers; none: the model as typed", kAnswers},
      {"chat-template", "", TextFlag{&o.chat_template}, "Jinja file or text; empty: the checkpoint's",
       kAnswers},
      {"chat-template-content-format", "", OnlyFlag{{"auto", "string"}}, "templates get strings", kAnswers},
      {"default-chat-template-kwargs", "", JsonFlag{&o.default_chat_template_kwargs},
       "variables for the template", kAnswers},
      {"response-role", "", TextFlag{&o.response_role}, "role in chat answers", kAnswers},
      {"reasoning-parser", "", TextFlag{&o.reasoning_parser, {"auto", "none", "deepseek_r1"}},
       "splits off the thought; auto: on where the tokenizer has <think> and </think>", kAnswers},
      {"max-logprobs", "", IntFlag{&o.max_logprobs, 0, 1 << 20}, "largest logprobs of a request", kAnswers},
      {"logprobs-mode", "", OnlyFlag{{"raw_logprobs"}}, kNotYet, kAnswers},
      {"enable-prompt-tokens-details", "", BoolFlag{&o.enable_prompt_tokens_details},
       "cached tokens in usage", kAnswers},
      {"enable-force-include-usage", "", BoolFlag{&o.enable_force_include_usage}, "usage in every stream",
       kAnswers},
  };
}

std::vector<Flag> PlacementFlags(ParallelFlags& p) {
  return {
      {"distributed-executor-backend", "",
       TextFlag{&p.distributed_executor_backend, {"auto", "mp", "ray", "uni", "external_launcher"}},
       "uni: the one rank lives in this process; mp: every rank is a process; ray: the same, on the nodes of "
       "the Ray cluster that this host belongs to; auto: uni for one rank, else mp",
       kParallel},
      {"data-parallel-backend", "dpb", TextFlag{&p.data_parallel_backend, {"mp", "ray"}},
       "who starts the groups of other hosts: mp, by a --headless command on each; ray, this command alone",
       kParallel},
      {"data-parallel-size-local", "dpl", OptionalIntFlag{&p.data_parallel_size_local, 0, 4096},
       "groups of this host, all by default; 0: an API server without ranks", kParallel},
      {"data-parallel-start-rank", "dpr", OptionalIntFlag{&p.data_parallel_start_rank, 0, 4095},
       "first group of this host (default: 0)", kParallel},
      {"data-parallel-address", "dpa", TextFlag{&p.data_parallel_address},
       "address of the head, where it listens for the other hosts (default: 127.0.0.1)", kParallel},
      {"data-parallel-rpc-port", "dpp", OptionalIntFlag{&p.data_parallel_rpc_port, 1, 65535},
       "port there (default: 29550; with Ray any free one)", kParallel},
      {"headless", "", BoolFlag{&p.headless}, "ranks for the head on another host, no API server here",
       kParallel},
      {"node-ranks", "", TextFlag{&p.node_ranks},
       "with --headless: the first and the last rank of this host, as in 8-15, in place of whole groups",
       kParallel},
      {"ray-python", "", TextFlag{&p.ray_python},
       "interpreter that imports ray; else TESSERA_RAY_PYTHON, else the first python3 on PATH that does",
       kParallel},
      {"ray-resource", "", TextFlag{&p.ray_resource},
       "resource of Ray that ranks take; none: NPU where there is enough of it, else CPU", kParallel},
      {"ray-timeout", "", IntFlag{&p.ray_timeout, 1, 86400}, "seconds to wait for room in the Ray cluster",
       kParallel},
      {"ray-dp-pack-strategy", "", TextFlag{&p.ray_dp_pack_strategy, {"strict", "fill", "span"}},
       "with --data-parallel-backend ray: strict: whole groups, --data-parallel-size-local on every node; "
       "fill: that many on this node, on others what fits; span: a group may span nodes; none: "
       "VLLM_RAY_DP_PACK_STRATEGY, or strict",
       kParallel},
      {"nnodes", "", IntFlag{&p.nnodes, 1, 4096},
       "hosts that share all ranks evenly; so one group may span hosts", kParallel},
      {"node-rank", "", OptionalIntFlag{&p.node_rank, 0, 4095},
       "number of this host; 0 is the head, the others are headless (default: 0)", kParallel},
      {"master-addr", "", TextFlag{&p.master_addr}, "with --nnodes: address of the head (default: 127.0.0.1)",
       kParallel},
      {"master-port", "", IntFlag{&p.master_port, 1, 65535}, "with --nnodes: port there", kParallel},
      {"distributed-timeout-seconds", "", IntFlag{&p.distributed_timeout_seconds, 1, 86400},
       "limit of every wait between ranks", kParallel},
      {"cluster-secret-file", "", TextFlag{&p.cluster_secret_file},
       "file with the secret that all hosts share; else TESSERA_CLUSTER_SECRET", kParallel},
      {"api-server-count", "", OptionalIntFlag{&p.api_server_count, 0, 1024}, "there is one, or none here",
       kParallel},
      {"decode-context-parallel-size", "dcp", OnlyFlag{{"1"}}, kNotYet, kParallel},
      {"expert-placement-strategy", "", OnlyFlag{{"linear"}}, kNotYet, kParallel},
  };
}

// Accepted, so that launches written for vLLM start; each warns once.
std::vector<Flag> IgnoredFlags() {
  std::vector<Flag> table;
  const auto add = [&](bool has_value, const char* reason, std::vector<const char*> names) {
    for (const char* name : names) table.push_back({name, "", IgnoredFlag{has_value}, reason, ""});
  };
  add(false, "no code of a checkpoint is ever run", {"trust-remote-code"});
  add(false, "nothing is compiled at start", {"enforce-eager"});
  add(true, "nothing is compiled at start", {"compilation-config"});
  add(true, "a request without a seed draws a random one, which is logged", {"seed"});
  add(true, "preemption recomputes, nothing is swapped", {"swap-space"});
  add(true, "the model is a folder, it has no revision", {"revision"});
  add(true, "blocks are hashed one way only", {"prefix-caching-hash-algo"});
  add(false, "steps are not overlapped", {"async-scheduling"});
  add(true, "nothing is offloaded", {"kv-offloading-backend"});
  add(false, "these metrics do not exist here", {"kv-cache-metrics"});
  add(true, "these metrics do not exist here",
      {"kv-cache-metrics-sample", "show-hidden-metrics-for-version"});
  add(false, "there is one engine", {"aggregate-engine-logging"});
  add(false, "request texts are never logged",
      {"enable-log-requests", "disable-log-requests", "enable-log-outputs"});
  add(true, "request texts are never logged", {"max-log-len"});
  add(false, "there is no access log", {"disable-uvicorn-access-log"});
  add(true, "there is no access log", {"disable-access-log-for-endpoints", "uvicorn-log-level"});
  add(false, "errors are logged as one line", {"log-error-stack"});
  add(false, "there are no such pages", {"disable-fastapi-docs"});
  add(true, "the server's own limits hold", {"h11-max-incomplete-event-size", "h11-max-header-count"});
  add(true, "answers carry no fingerprint", {"fingerprint-mode", "fingerprint-value"});
  add(true, "there are no CORS headers", {"allowed-origins", "allowed-methods", "allowed-headers"});
  add(false, "there are no CORS headers", {"allow-credentials"});
  add(false, "tools are not built yet", {"exclude-tools-when-tool-choice-none"});
  add(true, "the layout says how experts exchange tokens", {"all2all-backend", "eplb-config"});
  add(false, "a rank reads only the experts that it holds", {"enable-ep-weight-filter"});
  add(true, "--distributed-timeout-seconds is the limit", {"cpu-distributed-timeout-seconds"});
  add(true, "the head itself watches all groups",
      {"data-parallel-supervisor-port", "dp-supervisor-probe-interval-s", "dp-supervisor-probe-timeout-s",
       "dp-supervisor-probe-failure-threshold"});
  return table;
}

std::vector<Flag> RefusedFlags() {
  std::vector<Flag> table;
  const auto add = [&](bool has_value, const char* reason, std::vector<const char*> names) {
    for (const char* name : names) table.push_back({name, "", RefusedFlag{has_value}, reason, ""});
  };
  add(true, kNotYet,
      {"speculative-config", "reasoning-config", "tool-call-parser", "max-num-queued-tokens",
       "profiler-config", "kv-transfer-config", "kv-events-config", "uds", "root-path", "numa-bind-nodes",
       "numa-bind-cpus"});
  add(false, kNotYet,
      {"enable-auto-tool-choice", "trust-request-chat-template", "enable-per-request-metrics", "tokens-only",
       "numa-bind"});
  constexpr char kOneDoor[] =
      "external and hybrid load balancing are not supported: the head's API server balances over all groups; "
      "other hosts run --headless with --data-parallel-start-rank";
  add(true, kOneDoor, {"data-parallel-rank"});
  add(false, kOneDoor,
      {"data-parallel-hybrid-lb", "data-parallel-external-lb", "data-parallel-multi-port-external-lb"});
  add(false, "experts stay where the layout puts them; rebalancing is not built yet",
      {"enable-eplb", "enable-elastic-ep"});
  add(false, "batches are not overlapped with each other; this is not built yet", {"enable-dbo"});
  add(false, kNotYet, {"enable-fault-tolerance"});
  add(true, "the server speaks plain HTTP; put a TLS proxy in front",
      {"ssl-keyfile", "ssl-certfile", "ssl-ca-certs", "ssl-ciphers", "ssl-cert-reqs"});
  add(false, "the server speaks plain HTTP; put a TLS proxy in front", {"enable-ssl-refresh"});
  add(true, "Python cannot be loaded here", {"tool-parser-plugin", "middleware", "logits-processor-pattern"});
  add(false, "there is no gRPC server", {"grpc"});
  add(false, "not supported by Tessera", {"enable-lora", "enable-prompt-embeds"});
  add(true, "not supported by Tessera", {"lora-modules", "limit-mm-per-prompt", "pooler-config"});
  return table;
}

FlagTable ServeTable(ServeOptions& o) {
  FlagTable table{
      .command = "tessera serve",
      .summary =
          "Serves a DeepSeek-R1 class checkpoint over the OpenAI API. In names of flags _ and - are\n"
          "the same; every switch has a --no- form.",
      .positional_name = "MODEL",
      .positional = &o.engine.model,
      .flags = {},
      .takes_config_file = true};
  Append(table.flags, EngineFlagTable(o.engine));
  Append(table.flags, HttpFlags(o));
  Append(table.flags, AnswerFlags(o));
  Append(table.flags, LayoutFlagTable(o.parallel, o.engine.additional_config));
  Append(table.flags, PlacementFlags(o.parallel));
  Append(table.flags, IgnoredFlags());
  Append(table.flags, RefusedFlags());
  return table;
}

Status CheckBackends(const ParallelFlags& p) {
  if (p.distributed_executor_backend == "external_launcher") {
    return Invalid(
        "--distributed-executor-backend external_launcher: ranks are started by this command alone; wanted "
        "auto, uni or mp");
  }
  if (!p.UsesRay()) return {};
  const char* backend =
      p.data_parallel_backend == "ray" ? "--data-parallel-backend ray" : "--distributed-executor-backend ray";
  const auto refuse = [&](const char* flag) {
    return Invalid("{} with {}: Ray places all ranks, from the one command on the head; leave {} out", flag,
                   backend, flag);
  };
  if (p.headless) return refuse("--headless");
  if (p.nnodes > 1) return refuse("--nnodes");
  if (p.data_parallel_start_rank.value_or(0) > 0) return refuse("--data-parallel-start-rank");
  return {};
}

// What the flags say about this host, as far as that needs no model. The numbers of ranks come later.
Status CheckPlacement(const ParallelFlags& p) {
  const int64_t local = p.data_parallel_size_local.value_or(p.data_parallel_size);
  const int64_t start = p.data_parallel_start_rank.value_or(0);
  const int64_t node = p.node_rank.value_or(0);
  if (local > p.data_parallel_size) {
    return Invalid("--data-parallel-size-local {} is greater than --data-parallel-size {}", local,
                   p.data_parallel_size);
  }
  if (start >= p.data_parallel_size) {
    return Invalid("--data-parallel-start-rank {} is outside of 0 to {} (--data-parallel-size {})", start,
                   p.data_parallel_size - 1, p.data_parallel_size);
  }
  if (node >= p.nnodes)
    return Invalid("--node-rank {} is outside of 0 to {} (--nnodes {})", node, p.nnodes - 1, p.nnodes);
  if (p.nnodes > 1 && node == 0 && p.headless) {
    return Invalid(
        "--headless with --node-rank 0 of --nnodes {}: node 0 is the head and has the API server; leave "
        "--headless out, or give another --node-rank",
        p.nnodes);
  }
  if (p.IsWorker() && local == 0)
    return Invalid("--headless with --data-parallel-size-local 0 has nothing to run; wanted at least 1");
  if (start > 0 && !p.IsWorker()) {
    return Invalid(
        "--data-parallel-start-rank {} without --headless asks for hybrid load balancing, which is not "
        "supported: add --headless here, or start the head at 0",
        start);
  }
  if (p.IsWorker() && p.api_server_count.value_or(0) > 0) {
    return Invalid("--api-server-count {} with --headless: such a host has no API server; wanted 0",
                   *p.api_server_count);
  }
  return {};
}

}  // namespace

std::vector<Flag> EngineFlagTable(EngineFlags& flags) {
  std::vector<Flag> table = ModelFlags(flags);
  Append(table, SchedulerFlags(flags));
  return table;
}

Status CheckEngineFlags(EngineFlags& o, ParsedFlags& parsed) {
  if (o.model.empty())
    return Invalid("no model: name the folder of a checkpoint, e.g. `tessera serve models/tiny-r1`");
  if (o.block_size % 16 != 0) return Invalid("--block-size: {} is not a multiple of 16", o.block_size);
  if (!o.enable_chunked_prefill && o.max_model_len && !parsed.Has("max-num-batched-tokens")) {
    o.max_num_batched_tokens = *o.max_model_len;
  }
  if (o.max_num_batched_tokens < o.max_num_seqs) {
    if (parsed.Has("max-num-seqs")) {
      return Invalid("--max-num-batched-tokens {} must be greater than or equal to max_num_seqs {}",
                     o.max_num_batched_tokens, o.max_num_seqs);
    }
    o.max_num_seqs = o.max_num_batched_tokens;
  }
  RETURN_IF_ERROR(CheckJsonObject(o.override_generation_config));
  return {};
}

std::vector<Flag> LayoutFlagTable(ParallelFlags& p, std::string& additional_config) {
  return {
      {"tensor-parallel-size", "tp", OptionalIntFlag{&p.tensor_parallel_size, 1, 4096},
       "ranks of one group, which share its heads and widths; divides the heads and 16 (default: 1)",
       kParallel},
      {"data-parallel-size", "dp", IntFlag{&p.data_parallel_size, 1, 4096},
       "groups over all hosts; each has its own requests and cache", kParallel},
      {"pipeline-parallel-size", "pp", IntFlag{&p.pipeline_parallel_size, 1, 4096}, "only 1", kParallel},
      {"enable-expert-parallel", "", BoolFlag{&p.enable_expert_parallel},
       "spread whole experts: over all ranks, or as --additional-config says; a YAML rules over both",
       kParallel},
      {"additional-config", "", JsonFlag{&additional_config},
       "one key, expert_parallel: sets of ranks that hold different experts", kParallel},
  };
}

Status CheckLayoutFlags(const ParallelFlags& p, const std::string& additional_config) {
  if (p.pipeline_parallel_size > 1) {
    return Invalid("--pipeline-parallel-size {}: pipeline parallelism is not supported, wanted 1",
                   p.pipeline_parallel_size);
  }
  ASSIGN_OR_RETURN(const std::string keys, JsonKeys(additional_config));
  if (keys.empty()) return {};
  if (keys != "expert_parallel")
    return Invalid("--additional-config: '{}'; the only known key is expert_parallel", keys);
  if (!ExpertParallelOf(additional_config)) {
    return Invalid("--additional-config {}: expert_parallel is not a whole number of at least 1",
                   additional_config);
  }
  return {};
}

std::optional<int64_t> ExpertParallelOf(const std::string& additional_config) {
  const auto degree = JsonNumber(additional_config, "/expert_parallel");
  if (!degree || *degree < 1 || *degree > 1 << 24 || *degree != std::floor(*degree)) return std::nullopt;
  return static_cast<int64_t>(*degree);
}

std::optional<std::string> ValueOf(const Variable& variable, const char* name) {
  const char* value = variable(name);
  if (value == nullptr || *value == '\0') return std::nullopt;
  return value;
}

Result<ParsedServe> ParseServe(std::span<const std::string> arguments, const Variable& variable) {
  ParsedServe result;
  ServeOptions& o = result.options;
  // --model and the positional argument share a target: the positional one wins wherever it stands.
  std::string positional;
  FlagTable table = ServeTable(o);
  table.positional = &positional;
  result.help_text = HelpText(table);
  ASSIGN_OR_RETURN(ParsedFlags parsed, ParseFlags(table, arguments));
  result.help = parsed.help;
  if (parsed.help) return result;
  if (!positional.empty()) {
    if (!o.engine.model.empty() && o.engine.model != positional) {
      parsed.warnings.push_back(
          Format("--model {} is not used: '{}' was named too", o.engine.model, positional));
    }
    o.engine.model = positional;
  }
  RETURN_IF_ERROR(CheckLayoutFlags(o.parallel, o.engine.additional_config));
  RETURN_IF_ERROR(CheckBackends(o.parallel));
  ASSIGN_OR_RETURN(std::string note, ApplyLaunchPlace(variable, parsed, o.parallel));
  if (!note.empty()) result.notes.push_back(std::move(note));
  RETURN_IF_ERROR(CheckPlacement(o.parallel));
  RETURN_IF_ERROR(CheckEngineFlags(o.engine, parsed));
  if (o.port > 0 && o.port < 1024)
    return Invalid("--port: {} is not from 1024 to 65535 (or 0: any free one)", o.port);
  if (o.shutdown_timeout_s < 0)
    return Invalid("--shutdown-timeout: {} is not at least 0", o.shutdown_timeout_s);
  result.warnings = std::move(parsed.warnings);
  if (o.parallel.api_server_count.value_or(1) > 1) {
    result.warnings.push_back(Format("--api-server-count {} has no effect here: the head has one API server",
                                     *o.parallel.api_server_count));
  }
  if (auto key = ValueOf(variable, "VLLM_API_KEY"); o.api_key.empty() && key) o.api_key.push_back(*key);
  return result;
}

}  // namespace tessera::cli
