// What `tessera inspect` prints, on the tiny checkpoint and on the sizes of DeepSeek-R1.
#include "cli/inspect.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cerrno>
#include <map>
#include <vector>

#include "base/file.h"
#include "base/json.h"

namespace tessera::cli {
namespace {

using Words = std::vector<std::string>;
using Variables = std::map<std::string, std::string>;

const std::string kSource = TESSERA_SOURCE_DIR;
const std::string kTiny = kSource + "/models/tiny-r1";
const std::string kR1 = kSource + "/tests/configs/deepseek_r1.json";

Result<std::string> Ask(const Words& words, const Variables& variables = {}) {
  return Inspect(words, [&](const char* name) -> const char* {
    const auto found = variables.find(name);
    return found == variables.end() ? nullptr : found->second.c_str();
  });
}

JsonValue Json(Words words, const Variables& variables = {}) {
  words.push_back("--json");
  const auto text = Ask(words, variables);
  EXPECT_TRUE(text) << text.error().message;
  auto value = ParseJson(text ? *text : "{}");
  EXPECT_TRUE(value) << value.error().message;
  return value ? std::move(*value) : JsonValue();
}

std::string Bad(const Words& words) {
  const auto text = Ask(words);
  return text ? "accepted" : text.error().message;
}

void ExpectHas(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "'" << text << "' lacks '" << part << "'";
}

int64_t Number(const JsonValue& object, std::string_view key) {
  const JsonValue* value = object.Find(key);
  EXPECT_NE(value, nullptr) << key;
  return value == nullptr ? -1 : value->integer();
}

std::pair<int64_t, int64_t> Range(const JsonValue& object, std::string_view key) {
  const JsonValue* value = object.Find(key);
  if (value == nullptr || value->items().size() != 2) return {-1, -1};
  return {value->items()[0].integer(), value->items()[1].integer()};
}
using Pair = std::pair<int64_t, int64_t>;

TEST(Inspect, SummaryOfACheckpoint) {
  const JsonValue tiny = Json({kTiny});
  EXPECT_EQ(tiny.Find("scheme")->text(), "W8A8 (ModelSlim)");
  EXPECT_EQ(Number(tiny, "files"), 2);
  EXPECT_EQ(Number(tiny, "cache_bytes_per_token"), 4 * 96 * 2);  // rows of 80 values, padded
  const std::string text = *Ask({kTiny});
  for (const char* part : {"with an MTP layer", "16 routed in 4 groups", "2 files"}) ExpectHas(text, part);
}

TEST(Inspect, RanksOfTheTutorialLayout) {
  const JsonValue r1 = Json({kR1, "--layout", "-q", "ascend", "-tp", "4", "-dp", "4",
                             "--enable-expert-parallel", "--additional-config.expert_parallel", "4"});
  const JsonArray& ranks = r1.Find("ranks")->items();
  ASSERT_EQ(ranks.size(), 16);
  const JsonValue& rank = ranks[6];
  EXPECT_EQ(Number(rank, "dp"), 1);
  EXPECT_EQ(Number(rank, "tp"), 2);
  EXPECT_EQ(Range(rank, "heads"), (Pair{64, 96}));
  EXPECT_EQ(Range(rank, "experts"), (Pair{64, 128}));
  EXPECT_EQ(Range(rank, "expert_leaves"), (Pair{8, 12}));
  EXPECT_EQ(Range(rank, "shared_leaves"), (Pair{6, 7}));
  EXPECT_EQ(Range(rank, "lm_head"), (Pair{64640, 96960}));
  EXPECT_EQ(Range(rank, "embedding"), (Pair{0, 129280}));
  EXPECT_EQ(Number(r1, "cache_bytes_per_token"), 61 * 576 * 2);
  EXPECT_EQ(Number(r1, "cache_bytes_per_block"), 61 * 576 * 2 * 128);
}

// Some tensors by hand, so that the sum is not only compared with itself.
TEST(Inspect, TensorsOfARank) {
  const JsonValue r1 = Json({kR1, "--rank", "5", "-q", "ascend", "-tp", "4", "-dp", "4",
                             "--enable-expert-parallel", "--additional-config.expert_parallel", "4"});
  const JsonArray& tensors = r1.Find("tensors")->items();
  int64_t sum = 0;
  std::map<std::string, const JsonValue*> by_name;
  for (const JsonValue& tensor : tensors) {
    sum += Number(tensor, "bytes");
    by_name[tensor.Find("name")->text()] = &tensor;
  }
  EXPECT_EQ(sum, Number(r1.Find("ranks")->items()[5], "weight_bytes"));
  // Rank 5 is tp 1 of group 1: experts 64 to 127, of each the second quarter.
  const JsonValue& down = *by_name.at("model.layers.7.mlp.experts.127.down_proj.weight");
  EXPECT_EQ(Range(down, "rows"), (Pair{0, 7168}));
  EXPECT_EQ(Range(down, "columns"), (Pair{512, 1024}));
  EXPECT_GE(Number(down, "bytes"), 7168 * 512);
  EXPECT_LE(Number(down, "bytes"), 7168 * 512 * 105 / 100);
  EXPECT_EQ(Range(*by_name.at("model.layers.0.self_attn.q_b_proj.weight"), "rows"), (Pair{6144, 12288}));
  EXPECT_EQ(by_name.count("model.layers.7.mlp.experts.63.down_proj.weight"), 0);
  EXPECT_EQ(by_name.count("model.layers.61.self_attn.q_b_proj.weight"), 0);
}

TEST(Inspect, EveryExpertIsHeldExactlyOnceBetweenTheRanks) {
  const JsonValue tiny =
      Json({kTiny, "--layout", "-tp", "4", "-dp", "4"},
           {{"MINDFORMERS_MODEL_CONFIG", kSource + "/tests/yaml/predict_tiny_r1_w8a8_ep16.yaml"}});
  const JsonArray& ranks = tiny.Find("ranks")->items();
  ASSERT_EQ(ranks.size(), 16);
  for (int64_t i = 0; i < 16; ++i) {
    EXPECT_EQ(Range(ranks[static_cast<size_t>(i)], "experts"), (Pair{i, i + 1}));
    EXPECT_EQ(Range(ranks[static_cast<size_t>(i)], "shared_leaves"), (Pair{0, 16}));
  }
}

// Two numbers of the table in docs/parallel.md, recomputed; the document must print them.
TEST(Inspect, TableOfTheDocument) {
  const std::string document = *ReadFile(kSource + "/docs/parallel.md");
  struct Row {
    const char* layout;
    Words flags;
  };
  for (const Row& row :
       {Row{"| 2 | TP16 |", {"-tp", "16"}}, Row{"| 2 | DP4 TP4 EP4 |",
                                                {"-tp", "4", "-dp", "4", "--enable-expert-parallel",
                                                 "--additional-config.expert_parallel", "4"}}}) {
    Words words = {kR1, "--layout", "-q", "ascend", "--max-model-len", "32768", "--memory", "64G"};
    words.insert(words.end(), row.flags.begin(), row.flags.end());
    const JsonValue layout = Json(words);
    int64_t weights = 0;
    std::map<int64_t, int64_t> tokens;  // of each group
    for (const JsonValue& rank : layout.Find("ranks")->items()) {
      weights = std::max(weights, Number(rank, "weight_bytes"));
      const auto [at, added] = tokens.emplace(Number(rank, "dp"), Number(rank, "cache_tokens"));
      if (!added) at->second = std::min(at->second, Number(rank, "cache_tokens"));
    }
    int64_t all = 0;
    for (const auto& [group, count] : tokens) all += count;
    const size_t begin = document.find(row.layout);
    ASSERT_NE(begin, std::string::npos) << row.layout;
    const std::string line = document.substr(begin, document.find('\n', begin) - begin);
    ExpectHas(line, Format("| {:.2f} |", static_cast<double>(weights) / (int64_t{1} << 30)));
    ExpectHas(line, Format("| {} |", all));
  }
}

TEST(Inspect, Cache) {
  const auto tokens = [](const Words& more) {
    Words words = {kTiny, "--layout", "--max-model-len", "1024"};
    words.insert(words.end(), more.begin(), more.end());
    const JsonValue layout = Json(words);
    return Number(layout.Find("ranks")->items()[0], "cache_tokens");
  };
  EXPECT_EQ(tokens({"--memory", "1M"}), 0);
  const int64_t one = tokens({"--memory", "1G"});
  const int64_t two = tokens({"--memory", "2G"});
  // One more GiB, 0.9 of it used, at 768 bytes per token, in whole blocks of 128.
  EXPECT_NEAR(static_cast<double>(two - one), 0.9 * (1 << 30) / 768, 256);
  EXPECT_EQ(one % 128, 0);
  EXPECT_NEAR(static_cast<double>(tokens({"--memory", "1G", "--gpu-memory-utilization", "0.8"})),
              static_cast<double>(one) - 0.1 * (1 << 30) / 768, 256);
}

TEST(Inspect, WrongQuestions) {
  ExpectHas(Bad({}), "no model");
  ExpectHas(Bad({kR1, "--layout"}), "--quantization is not given");
  ExpectHas(Bad({kR1, "-q", "fp8"}), "'fp8'");
  ExpectHas(Bad({kTiny, "--rank", "4", "-tp", "4"}), "--rank 4 is outside of 0 to 3");
  ExpectHas(Bad({kTiny, "--layout", "-tp", "3"}), "16");
  ExpectHas(Bad({kTiny + "x"}), kTiny + "x");
  ExpectHas(Bad({kTiny, "--layout", "--max-model-len", "1000000"}), "--max-model-len: 1000000");
  ExpectHas(Bad({kTiny, "--port", "1"}), "unknown flag --port");
  ExpectHas(Bad({kTiny, "-q", "golden-stick"}), "golden-stick");
  ExpectHas(*Ask({"--help"}), "Parallelism:");
}

// config.json alone: a folder that holds only it, or the file; the scheme is then asked for.
TEST(Inspect, ConfigAlone) {
  const auto first = [](const Words& words) {
    return Number(Json(words).Find("ranks")->items()[0], "weight_bytes");
  };
  const std::string config = kTiny + "/config.json";
  EXPECT_EQ(first({config, "--layout", "-q", "ascend"}), first({kTiny, "--layout"}));
  EXPECT_GT(first({config, "--layout", "-q", "none"}), first({kTiny, "--layout"}) * 3 / 2);
  const std::string folder = testing::TempDir() + "/tessera_inspect_test";
  ASSERT_TRUE(mkdir(folder.c_str(), 0700) == 0 || errno == EEXIST);
  ASSERT_TRUE(WriteFile(folder + "/config.json", *ReadFile(config)));
  EXPECT_EQ(first({folder, "--layout", "-q", "ascend"}), first({kTiny, "--layout"}));
  ExpectHas(Bad({folder}), "holds no weights, and --quantization is not given");
}

}  // namespace
}  // namespace tessera::cli
