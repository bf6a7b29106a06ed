// The command line as a user types it: names, values, precedence, refusals, and the pure sizing of the cache.
#include "cli/options.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "base/file.h"
#include "cli/assembly.h"
#include "cli/http_client.h"
#include "cli/json.h"
#include "cli/statistics.h"

namespace tessera::cli {
namespace {

using Words = std::vector<std::string>;
using Variables = std::map<std::string, std::string>;

Result<ParsedServe> Parse(const Words& words, const Variables& variables = {}) {
  return ParseServe(words, [&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

ServeOptions Good(const Words& words, const Variables& variables = {}) {
  const auto parsed = Parse(words, variables);
  EXPECT_TRUE(parsed) << parsed.error().message;
  return parsed ? parsed->options : ServeOptions{};
}

std::string Bad(const Words& words, const Variables& variables = {}) {
  const auto parsed = Parse(words, variables);
  return parsed ? "accepted" : parsed.error().message;
}

void ExpectHas(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
}

TEST(Options, Defaults) {
  const ServeOptions o = Good({"m"});
  EXPECT_EQ(o.engine.model, "m");
  EXPECT_EQ(o.engine.block_size, 128);
  EXPECT_EQ(o.engine.max_num_batched_tokens, 4096);
  EXPECT_EQ(o.engine.max_num_seqs, 256);
  EXPECT_EQ(o.engine.gpu_memory_utilization, 0.9);
  EXPECT_EQ(o.host, "127.0.0.1");
  EXPECT_EQ(o.port, 8000);
  EXPECT_FALSE(o.engine.max_model_len);
}

// The tutorial's two launches word for word, and the form that TP16 takes without Ray.
TEST(Options, TutorialLaunches) {
  const Words common = {"--model=/path/to/save/deepseek_r1_w8a8",
                        "--trust-remote-code",
                        "--max-num-seqs=256",
                        "--max_model_len=32768",
                        "--max-num-batched-tokens=4096",
                        "--block-size=128",
                        "--gpu-memory-utilization=0.9"};
  const auto with = [&](const Words& more) {
    Words all = common;
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  const ServeOptions ray = Good(with({"--tensor-parallel-size", "16", "--distributed-executor-backend=ray"}));
  EXPECT_TRUE(ray.parallel.UsesRay());
  EXPECT_EQ(ray.parallel.ray_timeout, 600);
  const ServeOptions nodes = Good(with({"--tensor-parallel-size", "16", "--distributed-executor-backend=mp",
                                        "--nnodes", "2", "--node-rank", "1", "--master-addr", "192.5.5.5"}));
  EXPECT_EQ(nodes.parallel.tensor_parallel_size, 16);
  EXPECT_EQ(nodes.parallel.master_port, 29501);
  EXPECT_EQ(nodes.parallel.distributed_timeout_seconds, 300);
  EXPECT_TRUE(nodes.parallel.IsWorker());
  const Words groups = {"--tensor-parallel-size",     "4",
                        "--data-parallel-size",       "4",
                        "--data-parallel-size-local", "2",
                        "--data-parallel-start-rank", "0",
                        "--data-parallel-address",    "192.10.10.10",
                        "--data-parallel-rpc-port",   "12370",
                        "--enable-expert-parallel"};
  const auto head = Parse(with(groups));
  ASSERT_TRUE(head) << head.error().message;
  EXPECT_EQ(head->warnings.size(), 1);  // trust-remote-code
  const ParallelFlags& p = head->options.parallel;
  EXPECT_EQ(p.tensor_parallel_size, 4);
  EXPECT_EQ(p.data_parallel_size, 4);
  EXPECT_EQ(p.data_parallel_size_local, 2);
  EXPECT_EQ(p.data_parallel_start_rank, 0);
  EXPECT_EQ(p.data_parallel_address, "192.10.10.10");
  EXPECT_EQ(p.data_parallel_rpc_port, 12370);
  EXPECT_TRUE(p.enable_expert_parallel);
  EXPECT_FALSE(p.IsWorker());
  EXPECT_EQ(head->options.engine.max_model_len, 32768);
  Words worker = with(groups);
  worker.insert(worker.begin(), "--headless");
  worker[std::find(worker.begin(), worker.end(), "--data-parallel-start-rank") - worker.begin() + 1] = "2";
  const ServeOptions second = Good(worker);
  EXPECT_EQ(second.parallel.data_parallel_start_rank, 2);
  EXPECT_TRUE(second.parallel.IsWorker());
}

TEST(Options, RayPlacesAllRanks) {
  for (const Words& backend : {Words{"m", "--distributed-executor-backend=ray"}, Words{"m", "-dpb", "ray"}}) {
    const auto with = [&](const Words& more) {
      Words all = backend;
      all.insert(all.end(), more.begin(), more.end());
      return all;
    };
    EXPECT_TRUE(Good(with({})).parallel.UsesRay());
    ExpectHas(Bad(with({"--headless"})), "--headless with --");
    ExpectHas(Bad(with({"--nnodes", "2"})), "Ray places all ranks");
    ExpectHas(Bad(with({"-dp", "2", "--data-parallel-start-rank", "1"})), "leave --data-parallel-start-rank");
  }
  ExpectHas(Bad({"m", "-dpb", "ray", "--ray-dp-pack-strategy", "loose"}), "strict, fill, span");
  ExpectHas(Bad({"m", "--ray-timeout", "0"}), "--ray-timeout");
}

TEST(Options, ParallelDefaults) {
  const ParallelFlags p = Good({"m"}).parallel;
  EXPECT_FALSE(p.tensor_parallel_size);
  EXPECT_EQ(p.data_parallel_size, 1);
  EXPECT_FALSE(p.data_parallel_rpc_port);
  EXPECT_EQ(p.nnodes, 1);
  EXPECT_FALSE(p.IsWorker());
  EXPECT_EQ(Good({"m", "-dcp", "1", "--node_rank=0"}).parallel.node_rank, 0);
}

TEST(Options, WhatIsNotBuiltIsRefusedByName) {
  ExpectHas(Bad({"m", "-pp", "2"}), "--pipeline-parallel-size 2");
  ExpectHas(Bad({"m", "--distributed-executor-backend=external_launcher"}), "external_launcher");
  ExpectHas(Bad({"m", "--distributed-executor-backend=mpi"}), "auto, mp, ray, uni, external_launcher");
  ExpectHas(Bad({"m", "--data-parallel-backend", "gloo"}), "mp, ray");
  ExpectHas(Bad({"m", "-dp", "2", "--data-parallel-rank", "1"}), "--data-parallel-rank: external and hybrid");
  for (const char* name : {"--data-parallel-hybrid-lb", "--data-parallel-external-lb", "--enable-eplb",
                           "--enable-dbo", "--enable-elastic-ep"}) {
    ExpectHas(Bad({"m", name}), std::string(name) + ": ");
  }
  ExpectHas(Bad({"m", "--decode-context-parallel-size", "2"}), "--decode-context-parallel-size 2");
  ExpectHas(Bad({"m", "--expert-placement-strategy", "round_robin"}), "accepted: linear");
  ExpectHas(Bad({"m", "--speculative-config", "{}"}), "not built yet");
  ExpectHas(Bad({"m", "--kv-cache-dtype", "fp8"}), "auto, bfloat16");
}

TEST(Options, AdditionalConfig) {
  EXPECT_EQ(ExpertParallelOf(
                Good({"m", "--additional-config", R"({"expert_parallel": 4})"}).engine.additional_config),
            4);
  EXPECT_EQ(
      ExpertParallelOf(Good({"m", "--additional_config.expert_parallel", "4"}).engine.additional_config), 4);
  EXPECT_FALSE(ExpertParallelOf(Good({"m"}).engine.additional_config));
  ExpectHas(Bad({"m", "--additional-config", R"({"experts": 4})"}), "'experts'");
  for (const char* value : {"0", "-1", "2.5", "\"4\"", "null", "true", "1e99"}) {
    ExpectHas(Bad({"m", "--additional-config", Format(R"({{"expert_parallel": {}}})", value)}),
              "not a whole number of at least 1");
  }
}

TEST(Options, PlacesThatContradict) {
  ExpectHas(Bad({"m", "-dpl", "2"}), "--data-parallel-size-local 2 is greater than --data-parallel-size 1");
  ExpectHas(Bad({"m", "-dp", "4", "-dpr", "4", "--headless"}), "4 is outside of 0 to 3");
  ExpectHas(Bad({"m", "-dp", "4", "-dpr", "-1"}), "-1");
  const std::string hybrid = Bad({"m", "-dp", "4", "-dpl", "2", "-dpr", "2"});
  ExpectHas(hybrid, "--data-parallel-start-rank 2 without --headless");
  ExpectHas(hybrid, "hybrid");
  ExpectHas(Bad({"m", "-dp", "2", "-dpl", "0", "--headless"}), "nothing to run");
  ExpectHas(Bad({"m", "--nnodes", "2", "--node-rank", "2"}), "--node-rank 2 is outside of 0 to 1");
  ExpectHas(Bad({"m", "--node-rank", "1"}), "--node-rank 1 is outside of 0 to 0 (--nnodes 1)");
  ExpectHas(Bad({"m", "-tp", "2", "--nnodes", "2", "--headless"}), "--headless with --node-rank 0");
  ExpectHas(Bad({"m", "-dp", "2", "-dpr", "1", "--headless", "--api-server-count", "1"}),
            "--api-server-count 1 with --headless");
  Good({"m", "-dp", "2", "-dpr", "1", "--headless", "--api-server-count", "0"});
  EXPECT_EQ(Parse({"m", "--api-server-count", "4"})->warnings.size(), 1);
  EXPECT_EQ(Parse({"m", "--api-server-count", "1"})->warnings.size(), 0);
  Good({"m", "-dp", "2", "-dpl", "0"});
}

TEST(Options, NamesAndValues) {
  EXPECT_EQ(Good({"m", "--max_num_seqs", "7"}).engine.max_num_seqs, 7);
  EXPECT_EQ(Good({"m", "--served_model_name=a_b", "--port=8001"}).served_model_name, Words{"a_b"});
  EXPECT_EQ(Good({"m", "--served-model-name", "a", "b", "--port", "8001"}).served_model_name,
            (Words{"a", "b"}));
  EXPECT_EQ(Good({"m", "--max-model-len", "32k"}).engine.max_model_len, 32000);
  EXPECT_EQ(Good({"m", "--max-model-len", "32K"}).engine.max_model_len, 32768);
  EXPECT_EQ(Good({"m", "--kv-cache-memory-bytes", "2G"}).engine.kv_cache_memory_bytes, int64_t{2} << 30);
  EXPECT_FALSE(Good({"m", "--no-enable-prefix-caching"}).engine.enable_prefix_caching);
  EXPECT_FALSE(Good({"m", "--enable-chunked-prefill=false"}).engine.enable_chunked_prefill);
  EXPECT_EQ(Good({"--model", "x", "m"}).engine.model, "m");
  EXPECT_EQ(Good({"m", "--model", "x"}).engine.model, "m");
  EXPECT_EQ(Good({"m", "--seed", "-1"}).engine.model, "m");
}

TEST(Options, WrongValuesNameFlagSeenAndWanted) {
  EXPECT_EQ(Bad({"m", "--port", "99999"}), "--port: '99999' is not an integer from 0 to 65535");
  ExpectHas(Bad({"m", "--port", "80"}), "--port: 80 is not from 1024 to 65535");
  ExpectHas(Bad({"m", "--gpu-memory-utilization", "1.5"}), "'1.5' is not a number above 0 and at most 1");
  ExpectHas(Bad({"m", "--gpu-memory-utilization", "0"}), "'0'");
  ExpectHas(Bad({"m", "--gpu-memory-utilization", "nan"}), "'nan'");
  ExpectHas(Bad({"m", "--max-num-batched-tokens", "-1"}), "'-1' is not an integer");
  ExpectHas(Bad({"m", "--max-num-batched-tokens", "8", "--max-num-seqs", "9"}),
            "must be greater than or equal to max_num_seqs");
  EXPECT_EQ(Good({"m", "--max-num-batched-tokens", "8"}).engine.max_num_seqs, 8);
  ExpectHas(Bad({"m", "--block-size", "24"}), "multiple of 16");
  ExpectHas(Bad({"m", "--max-num-seqs", "2k"}), "'2k'");
  ExpectHas(Bad({"m", "--max-model-len", "32q"}), "'32q'");
  ExpectHas(Bad({"m", "--reasoning-parser", "qwen3"}), "auto, none, deepseek_r1");
  ExpectHas(Bad({"m", "--port"}), "--port wants a value");
  ExpectHas(Bad({"m", "n"}), "there is already a MODEL, 'm'");
  ExpectHas(Bad({}), "no model");
}

TEST(Options, UnknownFlagsComeWithTheNearest) {
  EXPECT_EQ(Bad({"m", "--max-model-length", "5"}),
            "unknown flag --max-model-length; did you mean --max-model-len?");
  ExpectHas(Bad({"m", "--max_num_sequs", "5"}), "did you mean --max-num-seqs?");
  ExpectHas(Bad({"m", "--port.x", "5"}), "unknown flag --port.x");
  ExpectHas(Bad({"m", "--no-port"}), "unknown flag --no-port");
  ExpectHas(Bad({"m", "-xy", "5"}), "unknown flag -xy");
}

TEST(Options, JsonFlagsMergeLastWins) {
  const auto parsed = Parse({"m", "--override-generation-config", R"({"temperature": 1, "top_p": 0.5})",
                             "--override_generation_config.temperature", "0.25"});
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(JsonNumber(parsed->options.engine.override_generation_config, "/temperature"), 0.25);
  EXPECT_EQ(JsonNumber(parsed->options.engine.override_generation_config, "/top_p"), 0.5);
  ASSERT_EQ(parsed->warnings.size(), 1);
  ExpectHas(parsed->warnings[0], "temperature");
  ExpectHas(Bad({"m", "--override-generation-config", "[1]"}), "not an object");
  // Values keep their underscores; only names are normalised.
  EXPECT_EQ(
      JsonString(Good({"m", "--default-chat-template-kwargs.a_b.c_d", "x_y"}).default_chat_template_kwargs,
                 "/a_b/c_d"),
      "x_y");
  const std::string list =
      Good({"m", "--default-chat-template-kwargs.l+", "1", "--default-chat-template-kwargs.l+", "2"})
          .default_chat_template_kwargs;
  EXPECT_EQ(JsonNumber(list, "/l/1"), 2);
}

TEST(Options, IgnoredFlagsWarnOnce) {
  const auto parsed = Parse({"m", "--enforce-eager", "--enforce-eager", "--no-async-scheduling",
                             "--compilation-config.level", "3"});
  ASSERT_TRUE(parsed) << parsed.error().message;
  EXPECT_EQ(parsed->warnings.size(), 3);
}

TEST(Options, ConfigFile) {
  const std::string path = testing::TempDir() + "/tessera_options_test.yaml";
  const auto write = [&](const std::string& text) { ASSERT_TRUE(WriteFile(path, text)); };
  write(
      "model: from_file\nport: 9000\nmax_num_seqs: 5\nenable-prefix-caching: no\nserved-model-name: [a, b]\n"
      "trust-remote-code: true\noverride-generation-config:\n  temperature: 0.5\nchat-template:\n");
  const ServeOptions o = Good({"--config", path, "--port", "9001"});
  EXPECT_EQ(o.engine.model, "from_file");
  EXPECT_EQ(o.port, 9001);  // explicit flags win, wherever they stand
  EXPECT_EQ(Good({"--port", "9001", "--config=" + path}).port, 9001);
  EXPECT_EQ(o.engine.max_num_seqs, 5);
  EXPECT_FALSE(o.engine.enable_prefix_caching);
  EXPECT_EQ(o.served_model_name, (Words{"a", "b"}));
  EXPECT_EQ(JsonNumber(o.engine.override_generation_config, "/temperature"), 0.5);
  write("max-model-len: None\n");
  ExpectHas(Bad({"m", "--config", path}), "--max-model-len: 'None'");
  write("base: 1\n");
  ExpectHas(Bad({"m", "--config", path}), "unknown flag --base");
  write("<<: {port: 9000}\n");
  ExpectHas(Bad({"m", "--config", path}), "merge keys");
  write("port: 9000\nport: 9001\n");
  ExpectHas(Bad({"m", "--config", path}), "'port' stands twice");
  write("port: [9000\n");
  ExpectHas(Bad({"m", "--config", path}), "not YAML");
  ExpectHas(Bad({"m", "--config", path, "--config", path}), "at most one");
  ExpectHas(Bad({"m", "--config", path + ".missing"}), path + ".missing");
}

TEST(Options, Environment) {
  EXPECT_EQ(Good({"m"}, {{"VLLM_API_KEY", "k"}}).api_key, Words{"k"});
  EXPECT_EQ(Good({"m", "--api-key", "x"}, {{"VLLM_API_KEY", "k"}}).api_key, Words{"x"});
}

TEST(Options, HelpNamesEveryGroupAndDefault) {
  const auto parsed = Parse({"--help"});
  ASSERT_TRUE(parsed);
  EXPECT_TRUE(parsed->help);
  for (const char* part :
       {"--max-model-len", "default: 4096", "Parallelism", "Accepted without effect:", "Refused:"}) {
    ExpectHas(parsed->help_text, part);
  }
}

CacheDemand Demand() {
  return {.memory_limit_bytes = 1000,
          .weight_bytes = 100,
          .workspace_bytes = 100,
          .block_bytes = 10,
          .max_model_len = 64};
}

TEST(CacheSizing, ShareOfMemoryLessWeightsAndWorkspace) {
  EngineFlags flags;
  flags.block_size = 16;
  EXPECT_EQ(SizeCache(flags, Demand())->num_blocks, 70);  // (0.9 * 1000 - 200) / 10
  flags.max_num_seqs = 2;
  EXPECT_EQ(SizeCache(flags, Demand())->num_blocks, 8);  // never more than 2 sequences of 4 blocks
  flags.max_num_seqs = 256;
  flags.kv_cache_memory_bytes = 59;
  EXPECT_EQ(SizeCache(flags, Demand())->num_blocks, 5);
  flags.num_gpu_blocks_override = 4;
  EXPECT_EQ(SizeCache(flags, Demand())->num_blocks, 4);
  flags.num_gpu_blocks_override = 3;
  const auto small = SizeCache(flags, Demand());
  ASSERT_FALSE(small);
  ExpectHas(small.error().message, "lower --max-model-len to at most 48");
}

TEST(CacheSizing, NoRoomAtAll) {
  EngineFlags flags;
  flags.gpu_memory_utilization = 0.1;
  EXPECT_FALSE(SizeCache(flags, Demand()));
}

TEST(Url, Parts) {
  const auto url = ParseUrl("http://localhost:8000/v1/");
  ASSERT_TRUE(url);
  EXPECT_EQ(url->host, "localhost");
  EXPECT_EQ(url->port, 8000);
  EXPECT_EQ(url->path, "/v1");
  EXPECT_EQ(ParseUrl("http://[::1]:9")->host, "::1");
  EXPECT_EQ(ParseUrl("http://h")->port, 80);
  for (const char* bad : {"https://h", "h:80", "http://", "http://h:", "http://h:99999", "http://[::1"}) {
    EXPECT_FALSE(ParseUrl(bad)) << bad;
  }
}

TEST(Sse, EventsSurviveAnyCut) {
  const std::string stream = ": hello\ndata: {\"a\":1}\n\ndata:x\r\n\r\ndata: [DONE]\n\n";
  for (size_t cut = 0; cut <= stream.size(); ++cut) {
    SseReader reader;
    Words events;
    const auto take = [&](std::string_view event) { return events.emplace_back(event), true; };
    reader.Push(stream.substr(0, cut), take);
    reader.Push(stream.substr(cut), take);
    EXPECT_EQ(events, (Words{"{\"a\":1}", "x", "[DONE]"})) << cut;
  }
}

TEST(Statistics, Percentiles) {
  const Statistics numbers({4, 1, 3, 2});
  EXPECT_EQ(numbers.Mean(), 2.5);
  EXPECT_EQ(numbers.Percentile(0), 1);
  EXPECT_EQ(numbers.Percentile(50), 2.5);
  EXPECT_EQ(numbers.Percentile(100), 4);
  EXPECT_EQ(Statistics({}).Percentile(50), 0);
}

}  // namespace
}  // namespace tessera::cli
