// Flags and variables in, flags and variables out.
#include "cli/ray_plan.h"

#include <filesystem>
#include <set>

#include "base/format.h"

namespace tessera::cli {
namespace {

// The tutorial's variables. These say how the model is cut, so that they must be the same everywhere:
constexpr const char* kOfTheModel[] = {"vLLM_MODEL_BACKEND", "VLLM_MS_MODEL_BACKEND",
                                       "MINDFORMERS_MODEL_CONFIG"};
// these are a host's own, and the head's only where a host has none.
constexpr const char* kOfAHost[] = {"GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME",
                                    "TESSERA_ISA"};

std::string Absolute(const std::string& path, const std::string& current) {
  return (std::filesystem::path(current) / path).lexically_normal().string();
}

Result<std::string> Strategy(const ParallelFlags& p, const Variable& variable) {
  if (p.data_parallel_backend != "ray") return "pack";
  std::string name = p.ray_dp_pack_strategy;
  if (const char* value = variable("VLLM_RAY_DP_PACK_STRATEGY"); name.empty() && value != nullptr)
    name = value;
  if (name.empty()) name = "strict";
  if (name == "span") return "pack";
  if (name == "strict" || name == "fill") return name;
  return Invalid("VLLM_RAY_DP_PACK_STRATEGY: '{}'; wanted strict, fill or span", name);
}

std::vector<std::string> NodeFlags(const ServeOptions& options, const Degrees& degrees,
                                   const std::string& model) {
  const EngineFlags& e = options.engine;
  const ParallelFlags& p = options.parallel;
  std::vector<std::string> flags = {"serve", "--model", model};
  const auto add = [&](const char* flag, const auto& value) {
    flags.push_back(flag);
    flags.push_back(Format("{}", value));
  };
  add("--tensor-parallel-size", degrees.tp);
  add("--data-parallel-size", degrees.dp);
  if (p.enable_expert_parallel) flags.push_back("--enable-expert-parallel");
  if (e.additional_config != "{}") add("--additional-config", e.additional_config);
  if (!e.quantization.empty()) add("--quantization", e.quantization);
  if (e.max_model_len) add("--max-model-len", *e.max_model_len);
  add("--block-size", e.block_size);
  add("--max-num-batched-tokens", e.max_num_batched_tokens);
  add("--max-num-seqs", e.max_num_seqs);
  if (e.threads > 0) add("--threads", e.threads);
  if (e.decode_threads > 0) add("--decode-threads", e.decode_threads);
  add("--distributed-timeout-seconds", p.distributed_timeout_seconds);
  add("--log-level", options.log_level);
  return flags;
}

}  // namespace

Result<RayPlan> PlanRay(const ServeOptions& options, const Degrees& degrees, const Variable& variable,
                        const std::string& current) {
  const ParallelFlags& p = options.parallel;
  const std::string model = Absolute(options.engine.model, current);
  RayPlan plan{.python = p.ray_python,
               .request = {.groups = degrees.dp,
                           .ranks_per_group = degrees.tp,
                           .resource = p.ray_resource,
                           .cores_per_rank = static_cast<int>(options.engine.threads),
                           .timeout = std::chrono::seconds(p.ray_timeout),
                           .model = model},
               .node_flags = NodeFlags(options, degrees, model)};
  ASSIGN_OR_RETURN(plan.request.strategy, Strategy(p, variable));
  if (plan.request.strategy != "pack")
    plan.request.local_groups = static_cast<int>(p.data_parallel_size_local.value_or(0));
  if (plan.request.strategy == "strict" && plan.request.local_groups > 0 &&
      degrees.dp % plan.request.local_groups != 0) {
    return Invalid(
        "--data-parallel-size-local {} does not divide --data-parallel-size {}: nodes take whole shares with "
        "the strategy strict; give a divisor, or --ray-dp-pack-strategy fill",
        plan.request.local_groups, degrees.dp);
  }
  for (const char* name : kOfTheModel) {
    const char* value = variable(name);
    plan.set[name] = value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
  }
  if (auto& yaml = plan.set["MINDFORMERS_MODEL_CONFIG"]) yaml = Absolute(*yaml, current);
  for (const char* name : kOfAHost) {
    if (const char* value = variable(name); value != nullptr && *value != '\0') plan.defaults[name] = value;
  }
  return plan;
}

std::vector<std::string> NodeCommand(const RayPlan& plan, const NodeRanks& ranks, const Endpoint& head) {
  std::vector<std::string> command = plan.node_flags;
  for (const std::string& word :
       {std::string("--headless"), std::string("--node-ranks"),
        Format("{}-{}", ranks.first, ranks.first + ranks.count - 1), std::string("--data-parallel-address"),
        head.address, std::string("--data-parallel-rpc-port"), std::to_string(head.port)}) {
    command.push_back(word);
  }
  return command;
}

std::vector<std::string> SpannedGroups(const std::vector<RayNode>& nodes, const Degrees& degrees) {
  std::vector<std::string> texts;
  for (int group = 0; group < degrees.dp; ++group) {
    std::vector<std::string> holders;
    for (const RayNode& node : nodes) {
      const int begin = group * degrees.tp, end = begin + degrees.tp;
      if (node.ranks.first < end && node.ranks.first + node.ranks.count > begin)
        holders.push_back(node.address);
    }
    if (holders.size() > 1) {
      texts.push_back(
          Format("the {} ranks of data-parallel group {} span {}: every layer's sums cross the network",
                 degrees.tp, group, fmt::join(holders, " and ")));
    }
  }
  return texts;
}

}  // namespace tessera::cli
