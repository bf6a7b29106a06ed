// The plan of a launch as tables: command line, environment and YAML in; degrees, place or refusal out.
#include "cli/parallel.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "base/file.h"

namespace tessera::cli {
namespace {

using Variables = std::map<std::string, std::string>;
using Words = std::vector<std::string>;

const std::string kSource = TESSERA_SOURCE_DIR;
const std::string kTiny = kSource + "/models/tiny-r1";
const std::string kW8a8 = kSource + "/tests/yaml/predict_tiny_r1_w8a8.yaml";
const std::string kEp16 = kSource + "/tests/yaml/predict_tiny_r1_w8a8_ep16.yaml";
const std::string kEp4Tp4 = kSource + "/tests/yaml/predict_tiny_r1_w8a8_ep4tp4.yaml";

const ModelConfig& Tiny() {
  static const ModelConfig config = *LoadModelConfig(kTiny);
  return config;
}

Words Split(const std::string& line) {
  std::istringstream stream(line);
  Words words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

Result<ParallelPlan> Plan(const std::string& flags, const Variables& variables = {}) {
  const Variable variable = [&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  };
  Words words = Split(flags);
  words.insert(words.begin(), kTiny);
  ASSIGN_OR_RETURN(const ParsedServe parsed, ParseServe(words, variable));
  return PlanParallel(parsed.options, Tiny(), variable);
}

ParallelPlan Good(const std::string& flags, const Variables& variables = {}) {
  auto plan = Plan(flags, variables);
  EXPECT_TRUE(plan) << flags << ": " << plan.error().message;
  return plan ? std::move(*plan) : ParallelPlan{};
}

std::string Bad(const std::string& flags, const Variables& variables = {}) {
  const auto plan = Plan(flags, variables);
  if (plan) return "accepted";
  EXPECT_EQ(plan.error().kind, ErrorKind::kInvalid) << plan.error().message;
  return plan.error().message;
}

void ExpectHas(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
}
bool HasPart(const Words& lines, const std::string& part) {
  return std::any_of(lines.begin(), lines.end(),
                     [&](const std::string& line) { return line.find(part) != std::string::npos; });
}

Variables WithYaml(const std::string& path) {
  return {{"MINDFORMERS_MODEL_CONFIG", path}};
}

// The ep4tp4 file with `from`, which must stand in it, replaced.
Variables Edited(const std::string& from, const std::string& to) {
  std::string text = *ReadFile(kEp4Tp4);
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  if (at != std::string::npos) text.replace(at, from.size(), to);
  const std::string path = testing::TempDir() + "/tessera_parallel_test.yaml";
  EXPECT_TRUE(WriteFile(path, text));
  return WithYaml(path);
}

// ----------------------------------------------------------------------------------------------- degrees

struct Resolved {
  std::string flags;
  std::string yaml;  // empty: unset
  Degrees degrees;
  std::string said;  // a part of a note or warning; may be empty
};

TEST(Resolution, DegreesComeFromTheRightSource) {
  const std::string ep4 = " --enable-expert-parallel --additional-config.expert_parallel 4";
  for (const Resolved& row : std::vector<Resolved>{
           {"", "", {1, 1, 1}, ""},
           {"-tp 4", "", {1, 4, 1}, ""},
           {"-dp 4 -tp 4", "", {4, 4, 1}, ""},
           {"-dp 4 -tp 4 --enable-expert-parallel", "", {4, 4, 16}, ""},
           {"-tp 16 --enable-expert-parallel", "", {1, 16, 16}, ""},
           {"-dp 4 -tp 4" + ep4, "", {4, 4, 4}, ""},
           {"-dp 4 -tp 4 --additional-config.expert_parallel 4", "", {4, 4, 1}, "has no effect without"},
           {"-dp 3 -tp 2 --enable-expert-parallel --additional-config.expert_parallel 2", "", {3, 2, 2}, ""},
           // A YAML rules over experts and must agree about groups; the flag rules over ranks of a group.
           {"-tp 16", kW8a8, {1, 16, 1}, "rules"},
           {"-tp 8", kW8a8, {1, 8, 1}, "--tensor-parallel-size 8 rules over model_parallel 16 of " + kW8a8},
           {"-tp 16 --enable-expert-parallel",
            kW8a8,
            {1, 16, 1},
            "--enable-expert-parallel does not change it"},
           {"-dp 4 -tp 4", kEp4Tp4, {4, 4, 4}, "expert parallel size 4: expert_parallel of " + kEp4Tp4},
           {"-dp 4 -tp 4 --enable-expert-parallel", kEp4Tp4, {4, 4, 4}, "does not change it"},
           {"-dp 4 -tp 4" + ep4, kEp4Tp4, {4, 4, 4}, ""},
           {"-dp 4 -tp 4 --additional-config.expert_parallel 4", kEp4Tp4, {4, 4, 4}, ""},
           {"-dp 4 -tp 4", kEp16, {4, 4, 16}, ""},
           {"-dp 4 -tp 2 --enable-expert-parallel", kEp4Tp4, {4, 2, 4}, "rules over model_parallel 4"},
       }) {
    SCOPED_TRACE(row.flags + " " + row.yaml);
    const ParallelPlan plan = Good(row.flags, row.yaml.empty() ? Variables{} : WithYaml(row.yaml));
    EXPECT_EQ(plan.degrees, row.degrees) << DegreesText(plan.degrees);
    EXPECT_TRUE(row.said.empty() || HasPart(plan.notes, row.said) || HasPart(plan.warnings, row.said));
  }
  EXPECT_EQ(Good("-dp 4 -tp 4" + ep4).warnings.size(), 0);
}

TEST(Resolution, MissingKeys) {
  // data_parallel: the flag; model_parallel and expert_parallel: 1.
  EXPECT_EQ(Good("-dp 2 -tp 4", Edited("  data_parallel: 4\n", "")).degrees, (Degrees{2, 4, 4}));
  EXPECT_EQ(Good("-dp 4", Edited("  model_parallel: 4\n", "")).degrees, (Degrees{4, 1, 4}));
  EXPECT_EQ(Good("-dp 4 -tp 4 --enable-expert-parallel", Edited("  expert_parallel: 4\n", "")).degrees,
            (Degrees{4, 4, 1}));
  EXPECT_EQ(Good("-dp 4 -tp 4", Edited("expert_parallel: 4", "expert_parallel: None")).degrees.ep, 1);
  EXPECT_EQ(Good("", Edited("parallel_config:", "other_config:")).degrees, Degrees{});
  EXPECT_TRUE(HasPart(Good("-dp 4 -tp 4", Edited("pipeline_stage: 1", "pipeline_stage: 2")).notes,
                      "pipeline_stage 2"));
}

TEST(Resolution, ContradictionsNameBothSides) {
  const auto has = [](const std::string& message, const Words& parts) {
    for (const std::string& part : parts) ExpectHas(message, part);
  };
  has(Bad("", WithYaml(kW8a8)), {"model_parallel is 16", kW8a8, "--tensor-parallel-size is not given"});
  has(Bad("-tp 4", WithYaml(kEp4Tp4)),
      {"--data-parallel-size is 1", "data_parallel is 4", kEp4Tp4, "give --data-parallel-size 4"});
  has(Bad("-tp 4 -dp 2", WithYaml(kEp4Tp4)), {"--data-parallel-size is 2", "data_parallel is 4"});
  has(Bad("-tp 16 -dp 4", WithYaml(kW8a8)), {"--data-parallel-size is 4", "data_parallel is 1"});
  has(Bad("-tp 4 -dp 4 --additional-config.expert_parallel 16", WithYaml(kEp4Tp4)),
      {"--additional-config", "expert_parallel is 16", "4 in " + kEp4Tp4});
  has(Bad("-tp 4 -dp 4 --quantization golden-stick", WithYaml(kEp4Tp4)),
      {"--quantization is golden-stick", "quant_method is ptq", kEp4Tp4});
  has(Bad("-tp 4 -dp 4", WithYaml("/no/such.yaml")), {"MINDFORMERS_MODEL_CONFIG", "/no/such.yaml"});
}

TEST(Resolution, LayoutsThatTheModelCannotHold) {
  const auto has = [](const std::string& message, const Words& parts) {
    for (const std::string& part : parts) ExpectHas(message, part);
  };
  has(Bad("-tp 3"), {"attention heads (16)", "(3)", "--tensor-parallel-size", "1, 2, 4, 8, 16"});
  has(Bad("-tp 32"), {"(32)", "1, 2, 4, 8, 16"});
  const std::string ep = "-dp 3 -tp 2 --enable-expert-parallel --additional-config.expert_parallel ";
  has(Bad(ep + "4"), {"expert parallel size 4", "6", "--additional-config", "possible here: 1, 2"});
  has(Bad(ep + "3"), {"expert parallel size 3", "routed experts, 16"});
  has(Bad("-dp 3 --enable-expert-parallel"), {"expert parallel size 3", "--enable-expert-parallel alone"});
  has(Bad("-dp 4 -tp 4", Edited("expert_parallel: 4", "expert_parallel: 5")),
      {"expert parallel size 5", "tessera_parallel_test.yaml"});
}

TEST(Resolution, SchemeAndEmbedding) {
  EXPECT_EQ(Good("").quantization, "");
  EXPECT_EQ(Good("--quantization ascend").quantization_source, "--quantization");
  const ParallelPlan plan = Good("-dp 4 -tp 4", WithYaml(kEp4Tp4));
  EXPECT_EQ(plan.quantization, "ascend");
  ExpectHas(plan.quantization_source, kEp4Tp4);
  EXPECT_FALSE(plan.split_embedding);
  EXPECT_TRUE(Good("-dp 4 -tp 4", Edited("vocab_emb_dp: False", "vocab_emb_dp: True")).split_embedding);
  EXPECT_EQ(Good("-dp 4 -tp 4", Edited("quant_method: 'ptq'", "quant_method: None")).quantization, "");
}

// ------------------------------------------------------------------------------------------------- the YAML

TEST(ModelYaml, EveryKeyThatDiffersIsRefused) {
  struct Row {
    const char* key;
    const char* from;
    const char* to;
    const char* wanted;  // what config.json says
  };
  for (const Row& row : std::vector<Row>{
           {"model.model_config.hidden_size", "hidden_size: 256", "hidden_size: 7168", "256"},
           {"model.model_config.num_layers", "num_layers: 4", "num_layers: 61", "num_hidden_layers is 4"},
           {"model.model_config.num_heads", "num_heads: 16", "num_heads: 128", "num_attention_heads is 16"},
           {"model.model_config.max_position_embeddings", "  max_position_embeddings: 163840",
            "  max_position_embeddings: 4096", "163840"},
           {"model.model_config.intermediate_size", " intermediate_size: 1024", " intermediate_size: 18432",
            "1024"},
           {"model.model_config.kv_lora_rank", "kv_lora_rank: 64", "kv_lora_rank: 512", "64"},
           {"model.model_config.q_lora_rank", "q_lora_rank: 128", "q_lora_rank: 1536", "128"},
           {"model.model_config.qk_rope_head_dim", "qk_rope_head_dim: 16", "qk_rope_head_dim: 64", "16"},
           {"model.model_config.qk_nope_head_dim", "qk_nope_head_dim: 32", "qk_nope_head_dim: 128", "32"},
           {"model.model_config.v_head_dim", "v_head_dim: 32", "v_head_dim: 128", "32"},
           {"model.model_config.vocab_size", "vocab_size: 2048", "vocab_size: 129280", "2048"},
           {"model.model_config.rms_norm_eps", "rms_norm_eps: 1.0e-6", "rms_norm_eps: 1.0e-5", "1e-05"},
           {"model.model_config.theta", "theta: 10000.0", "theta: 50000.0", "rope_theta is 10000"},
           {"model.model_config.bos_token_id", "bos_token_id: 0", "bos_token_id: 2", "0"},
           {"model.model_config.eos_token_id", "eos_token_id: 1", "eos_token_id: 7", "eos_token_id is 1"},
           {"model.model_config.scaling_factor.factor", "factor: 40.0", "factor: 4.0", "40"},
           {"model.model_config.scaling_factor.beta_fast", "beta_fast: 32.0", "beta_fast: 16", "32"},
           {"model.model_config.scaling_factor.beta_slow", "beta_slow: 1.0", "beta_slow: 2", "1"},
           {"model.model_config.scaling_factor.mscale", "mscale: 1.0", "mscale: 0.7", "1"},
           {"model.model_config.scaling_factor.mscale_all_dim", "mscale_all_dim: 1.0", "mscale_all_dim: 0",
            "1"},
           {"model.model_config.scaling_factor.original_max_position_embeddings",
            "original_max_position_embeddings: 4096", "original_max_position_embeddings: 8192", "4096"},
           {"model.model_config.scaling_factor", "factor:\n      factor: 40.0\n      beta_fast: 32.0\n",
            "factor: 2.0\n    other:\n", "rope_scaling.factor is 40"},
           {"model.model_config.extend_method", "\"YARN\"", "\"NTK\"", "YARN"},
           {"moe_config.expert_num", "expert_num: 16", "expert_num: 256", "n_routed_experts is 16"},
           {"moe_config.num_experts_chosen", "experts_chosen: 4", "experts_chosen: 8", "per_tok is 4"},
           {"moe_config.shared_expert_num", "shared_expert_num: 1", "shared_expert_num: 2", "1"},
           {"moe_config.routed_scaling_factor", "routed_scaling_factor: 2.5", "routed_scaling_factor: 1.0",
            "2.5"},
           {"moe_config.first_k_dense_replace", "dense_replace: 1", "dense_replace: 3", "1"},
           {"moe_config.moe_intermediate_size", "moe_intermediate_size: 128", "moe_intermediate_size: 2048",
            "128"},
           {"moe_config.topk_group", "topk_group: 2", "topk_group: 4", "2"},
           {"moe_config.n_group", "  n_group: 4", "  n_group: 8", "4"},
           {"moe_config.routing_policy", "TopkRouterV2", "TopkRouterV1", "TopkRouterV2"},
           {"moe_config.norm_topk_prob", "  n_group: 4", "  norm_topk_prob: False", "True"},
       }) {
    SCOPED_TRACE(row.key);
    const std::string message = Bad("-dp 4 -tp 4", Edited(row.from, row.to));
    ExpectHas(message, std::string("tessera_parallel_test.yaml: ") + row.key + " is ");
    ExpectHas(message, row.wanted);
  }
}

TEST(ModelYaml, QuantMethods) {
  const auto method = [](const std::string& name) {
    return Bad("-dp 4 -tp 4", Edited("quant_method: 'ptq'", "quant_method: " + name));
  };
  for (const char* known : {"awq-a16w4", "awq-a16w8", "gptq-perchannel", "gptq-pergroup", "smoothquant",
                            "osl", "a16w8", "a8dynw8"}) {
    ExpectHas(method(known), "which is not supported");
    ExpectHas(method(known), known);
  }
  ExpectHas(method("magic"), "\"magic\", which is not known");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("activation_dtype: 'int8'", "activation_dtype: 'float16'")),
            "activation_dtype is \"float16\"");
}

TEST(ModelYaml, WhatElseTheFileMaySay) {
  EXPECT_TRUE(
      HasPart(Good("-dp 4 -tp 4", Edited("rotary_dtype: \"bfloat16\"", "rotary_dtype: \"float32\"")).notes,
              "model.model_config.rotary_dtype is \"float32\": without effect"));
  Good("-dp 4 -tp 4", Edited("num_blocks: 512", "num_blocks: None"));
  Good("-dp 4 -tp 4", Edited("hidden_size: 256", "hidden_size: &width 256\n    again: *width"));
  Good("-dp 4 -tp 4", Edited("  n_group: 4", "  norm_topk_prob: True"));
  ExpectHas(Bad("-dp 4 -tp 4", Edited("vocab_emb_dp: False", "vocab_emb_dp: 3")), "True or False is wanted");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("data_parallel: 4", "data_parallel: 0")),
            "parallel_config.data_parallel is 0, a whole number of at least 1");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("data_parallel: 4", "data_parallel: '4'")), "\"4\"");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("data_parallel: 4", "<<: {data_parallel: 4}")), "merge keys");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("model_parallel: 4", "data_parallel: 4")),
            "'data_parallel' stands twice");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("parallel_config:", "parallel_config: [1]\nother:")),
            "parallel_config is an array");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("seed: 0", "seed: [0")), "not YAML");
  ExpectHas(Bad("-dp 4 -tp 4", Edited("seed: 0", "seed: &a [*a, *a]")), "tessera_parallel_test.yaml");
}

// ------------------------------------------------------------------------------------------------ placement

struct Place {
  std::string flags;
  int first, count;
  bool headless, processes;
  std::string control;  // empty: not looked at
};

TEST(Placement, RanksOfThisHost) {
  const std::string dp4 = "-dp 4 -tp 4 ";
  const std::string tp16 = "-tp 16 --distributed-executor-backend=mp ";
  for (const Place& row : std::vector<Place>{
           {"", 0, 1, false, false, ""},
           {"--distributed-executor-backend uni", 0, 1, false, false, ""},
           {"--distributed-executor-backend mp", 0, 1, false, true, ""},
           {"-tp 2", 0, 2, false, true, ""},
           {dp4, 0, 16, false, true, ""},
           {dp4 + "-dpl 2", 0, 8, false, true, "127.0.0.1:29550"},
           {dp4 + "-dpl 2 -dpr 0 -dpa 10.0.0.1 -dpp 12370", 0, 8, false, true, "10.0.0.1:12370"},
           {dp4 + "-dpl 2 -dpr 2 -dpa 10.0.0.1 --headless", 8, 8, true, true, "10.0.0.1:29550"},
           {dp4 + "-dpl 1 -dpr 3 --headless", 12, 4, true, true, "127.0.0.1:29550"},
           {dp4 + "-dpl 0 -dpa 10.0.0.1", 0, 0, false, true, "10.0.0.1:29550"},
           {dp4 + "-dpl 4 -dpr 0 --headless", 0, 16, true, true, ""},  // of a head with none
           {"-dpl 1 -dpr 0 --headless", 0, 1, true, true, ""},
           {tp16 + "--nnodes 2 --master-addr 10.0.0.1", 0, 8, false, true, "10.0.0.1:29501"},
           {tp16 + "--nnodes 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 9", 8, 8, true, true,
            "10.0.0.1:9"},
           {tp16 + "--nnodes 2 --node-rank 1 --headless", 8, 8, true, true, "127.0.0.1:29501"},
           {tp16 + "--nnodes 16 --node-rank 15", 15, 1, true, true, ""},
           {dp4 + "--nnodes 2 --node-rank 1 -dpl 2 -dpr 2", 8, 8, true, true, "127.0.0.1:29501"},
       }) {
    SCOPED_TRACE(row.flags);
    const ParallelPlan plan = Good(row.flags);
    EXPECT_EQ(plan.local.first, row.first);
    EXPECT_EQ(plan.local.count, row.count);
    EXPECT_EQ(plan.headless, row.headless);
    EXPECT_EQ(plan.processes, row.processes);
    EXPECT_EQ(plan.spread(), row.headless || row.count < plan.degrees.world());
    EXPECT_TRUE(row.control.empty() || plan.control.Text() == row.control) << plan.control.Text();
  }
}

// What an agent of Ray starts.
TEST(Placement, AnyConsecutiveRanks) {
  const ParallelPlan plan =
      Good("-tp 4 --headless --node-ranks 1-3 --data-parallel-address 10.1.1.1 -dpp 7000");
  EXPECT_EQ(plan.local.first, 1);
  EXPECT_EQ(plan.local.count, 3);
  EXPECT_EQ(plan.control.Text(), "10.1.1.1:7000");
  ExpectHas(Bad("-tp 4 --node-ranks 1-3"), "--headless");
  for (const char* text : {"3", "3-", "2-1", "0-4", "a-b", "1-2-3", "1_2"}) {
    ExpectHas(Bad(Format("-tp 4 --headless --node-ranks {}", text)),
              "wanted FIRST-LAST with ranks from 0 to 3");
  }
}

TEST(Placement, TutorialLaunches) {
  const std::string common =
      "--trust-remote-code --max-num-seqs=256 --max_model_len=32768 --max-num-batched-tokens=4096 "
      "--block-size=128 --gpu-memory-utilization=0.9 ";
  const std::string groups =
      "--tensor-parallel-size 4 --data-parallel-size 4 --data-parallel-size-local 2 "
      "--data-parallel-start-rank "
      "{} --data-parallel-address 192.10.10.10 --data-parallel-rpc-port 12370 --enable-expert-parallel";
  Variables environment = {{"MS_ENABLE_LCCL", "off"},
                           {"HCCL_OP_EXPANSION_MODE", "AIV"},
                           {"MS_ALLOC_CONF", "enable_vmm:true"},
                           {"ASCEND_RT_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7"},
                           {"vLLM_MODEL_BACKEND", "MindFormers"},
                           {"MINDFORMERS_MODEL_CONFIG", kEp4Tp4}};
  const ParallelPlan head = Good(common + fmt::format(fmt::runtime(groups), 0), environment);
  const ParallelPlan worker =
      Good("--headless " + common + fmt::format(fmt::runtime(groups), 2), environment);
  for (const ParallelPlan* plan : {&head, &worker}) {
    EXPECT_EQ(plan->degrees, (Degrees{4, 4, 4}));
    EXPECT_EQ(plan->control.Text(), "192.10.10.10:12370");
    EXPECT_EQ(plan->local.count, 8);
    EXPECT_TRUE(plan->processes);
    EXPECT_TRUE(HasPart(plan->notes, "Run with Mindformers backend"));
    EXPECT_TRUE(HasPart(plan->warnings, "no cluster secret"));
    EXPECT_EQ(plan->warnings.size(), 1);
  }
  EXPECT_EQ(head.local.first, 0);
  EXPECT_FALSE(head.headless);
  EXPECT_EQ(worker.local.first, 8);
  EXPECT_TRUE(worker.headless);
  environment["MINDFORMERS_MODEL_CONFIG"] = kW8a8;
  const std::string tp16 = common + "--tensor-parallel-size 16 --distributed-executor-backend=";
  const ParallelPlan ray = Good(tp16 + "ray", environment);
  ASSERT_TRUE(ray.ray);
  EXPECT_EQ(ray.local.count, 0);
  EXPECT_TRUE(ray.processes);
  EXPECT_EQ(ray.control.address, "");  // Ray knows it
  EXPECT_EQ(ray.control.port, 0);
  EXPECT_EQ(ray.secret.size(), 64u);  // of this start alone
  EXPECT_TRUE(ray.warnings.empty());
  for (const int node : {0, 1}) {
    const ParallelPlan plan =
        Good(Format("{}mp --nnodes 2 --node-rank {} --master-addr 192.5.5.5", tp16, node), environment);
    EXPECT_EQ(plan.degrees, (Degrees{1, 16, 1}));
    EXPECT_EQ(plan.local.first, 8 * node);
    EXPECT_EQ(plan.headless, node == 1);
    EXPECT_EQ(HasPart(plan.notes, "as if --headless were given"), node == 1);
  }
}

TEST(Placement, PlacesThatCannotBe) {
  const std::string dp4 = "-dp 4 -tp 4 ";
  struct Row {
    std::string flags;
    Words parts;
  };
  for (const Row& row : std::vector<Row>{
           {"-tp 2 --distributed-executor-backend uni", {"uni", "there are 2", "auto or mp"}},
           {"-dp 2 -dpl 1 --distributed-executor-backend uni", {"uni", "1 of them here"}},
           {dp4 + "-dpl 2 -dpr 3 --headless", {"-start-rank 3", "-size-local 2", "group 5", "-size is 4"}},
           {dp4 + "--headless -dpl 2", {"--headless needs --data-parallel-start-rank"}},
           {dp4 + "--headless -dpr 0", {"would hold all 16 ranks", "--data-parallel-size-local"}},
           {"--headless", {"--headless needs --data-parallel-start-rank"}},
           {"-tp 16 --nnodes 3", {"--nnodes 3", "16", "possible: 1, 2, 4, 8, 16"}},
           {"-tp 4 --nnodes 8", {"--nnodes 8", "number of ranks, 4"}},
           {dp4 + "--nnodes 2 -dpl 1", {"--data-parallel-size-local 1", "4 ranks", "8 of 16"}},
           {dp4 + "--nnodes 2 --node-rank 1 -dpr 1", {"-start-rank 1 begins at rank 4", "at rank 8"}},
           {dp4 + "-dpl 2 -dpa 0.0.0.0", {"--data-parallel-address 0.0.0.0", "all interfaces"}},
           {dp4 + "-dpl 2 -dpa ::", {"--data-parallel-address ::"}},
           {"-tp 2 --nnodes 2 --master-addr 0.0.0.0", {"--master-addr 0.0.0.0"}},
       }) {
    SCOPED_TRACE(row.flags);
    const std::string message = Bad(row.flags);
    for (const std::string& part : row.parts) ExpectHas(message, part);
  }
  EXPECT_TRUE(HasPart(Good("-tp 2 --nnodes 2 -dpa 10.0.0.1 --master-addr 127.0.0.1").warnings,
                      "--data-parallel-address 10.0.0.1 is not used"));
}

// ---------------------------------------------------------------------------------------------- environment

TEST(Environment, Slots) {
  const auto with = [](const std::string& flags, const std::string& devices) {
    return Bad(flags, {{"ASCEND_RT_VISIBLE_DEVICES", devices}});
  };
  for (const char* good : {"0,1,2,3", " 4, 5,6 ,7", "0,1,2,3,4,5,6,7", ""})
    EXPECT_EQ(with("-tp 4", good), "accepted") << good;
  EXPECT_EQ(with("-dp 4 -tp 4 -dpl 2", "0,1,2,3,4,5,6,7"), "accepted");  // 8 of 16 here
  const std::string message = with("-tp 4", "0,1");
  for (const char* part : {"4 ranks", "ASCEND_RT_VISIBLE_DEVICES is '0,1'", "2 slots"})
    ExpectHas(message, part);
  ExpectHas(with("", "0,,1"), "'' is not the number of a device");
  ExpectHas(with("", "0,1,"), "''");
  ExpectHas(with("", "0,npu1"), "'npu1'");
  ExpectHas(with("", "0,-1"), "'-1'");
  ExpectHas(with("", "3,3"), "3 stands twice");
}

TEST(Environment, Interfaces) {
  const std::string spread = "-dp 2 -dpl 1 ";
  for (const char* name : {"GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME"}) {
    const std::string message = Bad(spread, {{name, "enp189s0f0x"}});
    for (const char* part : {name, "'enp189s0f0x' does not exist", "lo"}) ExpectHas(message, part);
  }
  const ParallelPlan gloo = Good(spread, {{"GLOO_SOCKET_IFNAME", "lo"}});
  EXPECT_EQ(gloo.source_address, "127.0.0.1");
  EXPECT_EQ(gloo.data_address, "");
  EXPECT_EQ(Good(spread, {{"HCCL_SOCKET_IFNAME", "lo"}}).data_address, "127.0.0.1");
  EXPECT_EQ(Good(spread, {{"TP_SOCKET_IFNAME", "lo"}}).data_address, "127.0.0.1");
  EXPECT_EQ(Good(spread, {{"TP_SOCKET_IFNAME", "none"}, {"HCCL_SOCKET_IFNAME", "lo"}}).source_address, "");
  const std::string message = Bad(spread + "-dpa 10.9.8.7", {{"GLOO_SOCKET_IFNAME", "lo"}});
  for (const char* part : {"--data-parallel-address is 10.9.8.7", "GLOO_SOCKET_IFNAME lo", "127.0.0.1"})
    ExpectHas(message, part);
  // A name is the other hosts' word for this one.
  EXPECT_EQ(Good(spread + "-dpa head.example", {{"GLOO_SOCKET_IFNAME", "lo"}}).control.address, "127.0.0.1");
  EXPECT_EQ(Good(spread + "-dpa head.example").control.address, "head.example");
  EXPECT_EQ(
      Good(spread + "-dpr 1 --headless -dpa head.example", {{"GLOO_SOCKET_IFNAME", "lo"}}).control.address,
      "head.example");
  for (const char* name : {"localhost", "127.0.0.1"})
    EXPECT_EQ(Good(spread + "-dpa " + name, {{"GLOO_SOCKET_IFNAME", "lo"}}).control.address, name);
  ExpectHas(Bad(spread + "-dpa fd00::1", {{"GLOO_SOCKET_IFNAME", "lo"}}), "fd00::1");
  // A worker only comes from there.
  EXPECT_EQ(Good(spread + "-dpr 1 --headless -dpa 10.9.8.7", {{"GLOO_SOCKET_IFNAME", "lo"}}).source_address,
            "127.0.0.1");
}

TEST(Environment, NamesOfTheOriginal) {
  for (const char* name : {"vLLM_MODEL_BACKEND", "VLLM_MS_MODEL_BACKEND"}) {
    ExpectHas(Bad("", {{name, "Torch"}}), std::string(name) + ": 'Torch'");
    EXPECT_TRUE(HasPart(Good("", {{name, "MindFormers"}}).notes, "Run with Mindformers backend"));
    EXPECT_TRUE(Good("", {{name, "MindONE"}}).notes.empty());
  }
  const ParallelPlan plan =
      Good("", {{"MS_ENABLE_LCCL", "off"}, {"HCCL_BUFFSIZE", "2048"}, {"VLLM_BATCH_INVARIANT", "1"}});
  EXPECT_TRUE(plan.notes.empty() && plan.warnings.empty());
}

TEST(Environment, Secret) {
  const std::string path = testing::TempDir() + "/tessera_cluster_secret";
  ASSERT_TRUE(WriteFile(path, "s3cret\n"));
  ASSERT_EQ(chmod(path.c_str(), 0600), 0);
  const std::string spread = "-dp 2 -dpl 1 -dpa 10.0.0.1 ";
  const ParallelPlan plan =
      Good(spread + "--cluster-secret-file " + path, {{"TESSERA_CLUSTER_SECRET", "other"}});
  EXPECT_EQ(plan.secret, "s3cret");
  EXPECT_TRUE(plan.warnings.empty());
  ASSERT_EQ(chmod(path.c_str(), 0644), 0);
  EXPECT_TRUE(HasPart(Good(spread + "--cluster-secret-file " + path).warnings, "mode 644"));
  ASSERT_TRUE(WriteFile(path, "\r\n"));
  ExpectHas(Bad(spread + "--cluster-secret-file " + path), "is empty");
  ExpectHas(Bad(spread + "--cluster-secret-file /no/secret"), "/no/secret");
  EXPECT_EQ(Good(spread, {{"TESSERA_CLUSTER_SECRET", "other"}}).secret, "other");
  // None: said where others could reach the head, and not on one host.
  const ParallelPlan open = Good(spread);
  ASSERT_EQ(open.warnings.size(), 1);
  for (const char* part : {"10.0.0.1:29550", "TESSERA_CLUSTER_SECRET", "--cluster-secret-file"})
    ExpectHas(open.warnings[0], part);
  EXPECT_TRUE(Good("-dp 2 -dpl 1").warnings.empty());
  EXPECT_TRUE(Good("-dp 2 -dpa 10.0.0.1").warnings.empty());
}

}  // namespace
}  // namespace tessera::cli
