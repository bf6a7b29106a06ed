// What `tessera serve` was asked: one struct, filled from one table of flags (options.cc) and checked once.
// Defaults stand here and nowhere else. It reaches the rest as a const value.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "cli/flags.h"

namespace tessera::cli {

// Environment: null where unset.
using Variable = std::function<const char*(const char*)>;
// Absent where it is unset or empty.
std::optional<std::string> ValueOf(const Variable& variable, const char* name);

// The model and how it is run; shared by serve and the benchmarks that run in this process.
struct EngineFlags {
  std::string model;         // a folder
  std::string tokenizer;     // empty: the model's folder
  std::string quantization;  // empty: what the tensors say
  std::string generation_config = "auto";
  std::string override_generation_config = "{}";
  std::string additional_config = "{}";
  std::optional<int64_t> max_model_len;  // absent: max_position_embeddings
  int64_t max_num_batched_tokens = 4096;
  int64_t max_num_seqs = 256;
  int64_t block_size = 128;
  double gpu_memory_utilization = 0.9;
  std::optional<int64_t> kv_cache_memory_bytes;
  std::optional<int64_t> num_gpu_blocks_override;
  bool enable_chunked_prefill = true;
  bool enable_prefix_caching = true;
  int64_t threads = 0;         // of each rank; 0: its share of the cores
  int64_t decode_threads = 0;  // of those, in steps that only generate; 0: all
};

// How ranks are spread; parallel.h turns it into a plan.
struct ParallelFlags {
  std::optional<int64_t> tensor_parallel_size;  // absent: 1
  int64_t data_parallel_size = 1;
  std::optional<int64_t> data_parallel_size_local;  // absent: all groups
  std::optional<int64_t> data_parallel_start_rank;  // absent: 0
  std::string data_parallel_address;                // empty: 127.0.0.1
  std::optional<int64_t> data_parallel_rpc_port;    // absent: 29550, with Ray any free one
  std::string data_parallel_backend = "mp";
  int64_t pipeline_parallel_size = 1;
  bool enable_expert_parallel = false;
  std::string distributed_executor_backend = "auto";
  bool headless = false;
  int64_t nnodes = 1;
  std::optional<int64_t> node_rank;  // absent: 0
  std::string master_addr;           // empty: 127.0.0.1
  int64_t master_port = 29501;
  int64_t distributed_timeout_seconds = 300;
  std::string cluster_secret_file;   // empty: TESSERA_CLUSTER_SECRET
  std::string node_ranks;            // "8-15": ranks of a headless host; empty: whole groups
  std::string ray_python;            // empty: TESSERA_RAY_PYTHON, or the first that imports ray
  std::string ray_resource;          // empty: NPU where there is enough of it, else CPU
  int64_t ray_timeout = 600;         // seconds
  std::string ray_dp_pack_strategy;  // empty: VLLM_RAY_DP_PACK_STRATEGY, or strict
  std::optional<int64_t> api_server_count;

  bool UsesRay() const { return distributed_executor_backend == "ray" || data_parallel_backend == "ray"; }
  bool IsWorker() const { return headless || (nnodes > 1 && node_rank.value_or(0) > 0); }  // no API server
};

struct ServeOptions {
  EngineFlags engine;
  ParallelFlags parallel;
  std::string host = "127.0.0.1";
  int64_t port = 8000;
  std::vector<std::string> served_model_name;  // empty: the model as typed
  std::vector<std::string> api_key;            // empty: VLLM_API_KEY, or open
  int64_t max_logprobs = 20;
  int64_t max_num_queued_reqs = 10000;
  int64_t max_body_bytes = int64_t{64} << 20;
  double shutdown_timeout_s = 30;
  std::string chat_template;  // a file, or the template itself; empty: the checkpoint's
  std::string default_chat_template_kwargs = "{}";
  std::string response_role = "assistant";
  std::string reasoning_parser = "auto";
  bool enable_prompt_tokens_details = false;
  bool enable_force_include_usage = false;
  bool enable_request_id_headers = false;
  bool enable_server_load_tracking = false;
  bool enable_tokenizer_info_endpoint = false;
  bool disable_log_stats = false;
  std::string log_level = "info";
};

struct ParsedServe {
  ServeOptions options;
  bool help = false;
  std::string help_text;
  std::vector<std::string> notes;  // for the log: what came from the environment
  std::vector<std::string> warnings;
};

// Parses and checks flags against each other; of the environment VLLM_API_KEY and the launchers' variables
// are read here (launch_environment.h), the rest by PlanParallel. kInvalid is a usage error: exit code 2.
Result<ParsedServe> ParseServe(std::span<const std::string> arguments, const Variable& variable);

// The flags of EngineFlags for other commands' tables.
std::vector<Flag> EngineFlagTable(EngineFlags& flags);
// Checks across EngineFlags; `given` says what was written. Adds warnings.
Status CheckEngineFlags(EngineFlags& flags, ParsedFlags& parsed);

// The same for the flags of a layout: degrees and --additional-config.
std::vector<Flag> LayoutFlagTable(ParallelFlags& flags, std::string& additional_config);
Status CheckLayoutFlags(const ParallelFlags& flags, const std::string& additional_config);
// expert_parallel of --additional-config, which CheckLayoutFlags has accepted.
std::optional<int64_t> ExpertParallelOf(const std::string& additional_config);

}  // namespace tessera::cli
