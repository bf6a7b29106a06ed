// What Ray is asked for, and what its nodes are told, for launches of all kinds.
#include "cli/ray_plan.h"

#include <gtest/gtest.h>

#include <map>

#include "base/format.h"

namespace tessera::cli {
namespace {

using Environment = std::map<std::string, std::string>;

Variable From(const Environment& environment) {
  return [&environment](const char* name) -> const char* {
    const auto found = environment.find(name);
    return found == environment.end() ? nullptr : found->second.c_str();
  };
}

ServeOptions Tutorial() {
  ServeOptions options;
  options.engine.model = "models/tiny-r1";
  options.engine.max_model_len = 32768;
  options.parallel.tensor_parallel_size = 16;
  options.parallel.distributed_executor_backend = "ray";
  return options;
}

RayPlan Plan(const ServeOptions& options, const Degrees& degrees, const Environment& environment = {}) {
  auto plan = PlanRay(options, degrees, From(environment), "/srv");
  if (!plan) ADD_FAILURE() << plan.error().message;
  return plan ? *std::move(plan) : RayPlan{};
}

std::string Joined(const std::vector<std::string>& words) {
  return Format("{}", fmt::join(words, " "));
}

TEST(RayPlan, TutorialsCommandPacksItsRanks) {
  const RayPlan plan = Plan(Tutorial(), {1, 16, 1});
  EXPECT_EQ(plan.request.strategy, "pack");
  EXPECT_EQ(plan.request.groups, 1);
  EXPECT_EQ(plan.request.ranks_per_group, 16);
  EXPECT_EQ(plan.request.model, "/srv/models/tiny-r1");
  EXPECT_EQ(plan.request.timeout, std::chrono::seconds(600));
  const std::string command = Joined(NodeCommand(plan, {8, 8}, {"10.0.0.1", 4711}));
  EXPECT_TRUE(command.starts_with("serve --model /srv/models/tiny-r1 --tensor-parallel-size 16")) << command;
  EXPECT_TRUE(
      command.ends_with("--headless --node-ranks 8-15 --data-parallel-address 10.0.0.1 "
                        "--data-parallel-rpc-port 4711"))
      << command;
  EXPECT_NE(command.find("--max-model-len 32768"), std::string::npos) << command;
}

TEST(RayPlan, NodesGetWhatTheHeadSays) {
  ServeOptions options = Tutorial();
  options.engine.additional_config = R"({"expert_parallel": 4})";
  options.engine.quantization = "ascend";
  options.engine.threads = 3;
  options.parallel.enable_expert_parallel = true;
  const RayPlan plan = Plan(options, {4, 4, 4});
  const std::string flags = Joined(plan.node_flags);
  EXPECT_NE(flags.find(R"(--enable-expert-parallel --additional-config {"expert_parallel": 4})"),
            std::string::npos)
      << flags;
  EXPECT_NE(flags.find("--quantization ascend"), std::string::npos) << flags;
  EXPECT_NE(flags.find("--threads 3"), std::string::npos) << flags;
  EXPECT_EQ(plan.request.cores_per_rank, 3);
}

// The head's YAML rules, also where it has none; an interface is a node's own.
TEST(RayPlan, VariablesOfTheModelAreTheHeads) {
  const Environment environment = {{"MINDFORMERS_MODEL_CONFIG", "conf/r1.yaml"},
                                   {"vLLM_MODEL_BACKEND", ""},
                                   {"GLOO_SOCKET_IFNAME", "eth7"}};
  const RayPlan plan = Plan(Tutorial(), {1, 16, 1}, environment);
  EXPECT_EQ(plan.set.at("MINDFORMERS_MODEL_CONFIG"), "/srv/conf/r1.yaml");
  EXPECT_EQ(plan.set.at("vLLM_MODEL_BACKEND"), std::nullopt);
  EXPECT_EQ(plan.defaults.at("GLOO_SOCKET_IFNAME"), "eth7");
  EXPECT_FALSE(plan.defaults.contains("HCCL_SOCKET_IFNAME"));
}

TEST(RayPlan, StrategiesOfGroups) {
  ServeOptions options = Tutorial();
  options.parallel.distributed_executor_backend = "auto";
  options.parallel.data_parallel_backend = "ray";
  options.parallel.data_parallel_size_local = 2;
  const Degrees degrees = {4, 4, 4};
  EXPECT_EQ(Plan(options, degrees).request.strategy, "strict");
  EXPECT_EQ(Plan(options, degrees).request.local_groups, 2);
  EXPECT_EQ(Plan(options, degrees, {{"VLLM_RAY_DP_PACK_STRATEGY", "fill"}}).request.strategy, "fill");
  const RayPlan span = Plan(options, degrees, {{"VLLM_RAY_DP_PACK_STRATEGY", "span"}});
  EXPECT_EQ(span.request.strategy, "pack");
  EXPECT_EQ(span.request.local_groups, 0);
  options.parallel.ray_dp_pack_strategy = "strict";  // the flag rules
  EXPECT_EQ(Plan(options, degrees, {{"VLLM_RAY_DP_PACK_STRATEGY", "fill"}}).request.strategy, "strict");
  options.parallel.data_parallel_size_local = 3;
  const auto odd = PlanRay(options, degrees, From({}), "/");
  ASSERT_FALSE(odd);
  EXPECT_NE(odd.error().message.find("--data-parallel-size-local 3 does not divide"), std::string::npos);
  options.parallel.ray_dp_pack_strategy.clear();
  const auto unknown = PlanRay(options, degrees, From({{"VLLM_RAY_DP_PACK_STRATEGY", "loose"}}), "/");
  ASSERT_FALSE(unknown);
  EXPECT_EQ(unknown.error().message, "VLLM_RAY_DP_PACK_STRATEGY: 'loose'; wanted strict, fill or span");
}

TEST(RayPlan, NamesGroupsThatSpanNodes) {
  const std::vector<RayNode> nodes = {{"a", "", {0, 6}}, {"b", "", {6, 6}}};
  EXPECT_TRUE(SpannedGroups(nodes, {6, 2, 1}).empty());
  const auto texts = SpannedGroups(nodes, {3, 4, 1});
  ASSERT_EQ(texts.size(), 1u);
  EXPECT_NE(texts[0].find("group 1 span a and b"), std::string::npos) << texts[0];
}

}  // namespace
}  // namespace tessera::cli
