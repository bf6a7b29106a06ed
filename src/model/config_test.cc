// config.json and generation_config.json: what is read, and that everything else is refused by name.
#include "model/config.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>

#include "base/file.h"
#include "model/checkpoint_texts.h"
#include "model/random_checkpoint.h"

namespace tessera {
namespace {

const std::string kTinyR1 = std::string(TESSERA_SOURCE_DIR) + "/models/tiny-r1";

std::string TinyText() {
  return ReadFile(kTinyR1 + "/config.json").value();
}

// The text with the first `from` replaced.
std::string With(std::string text, std::string_view from, std::string_view to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(ConfigTest, ReadsTinyR1) {
  const auto config = LoadModelConfig(kTinyR1);
  ASSERT_TRUE(config) << config.error().message;
  EXPECT_EQ(config->vocab_size, 2048);
  EXPECT_EQ(config->num_layers, 4);
  EXPECT_EQ(config->num_nextn_predict_layers, 1);
  EXPECT_EQ(config->qk_head_dim(), 48);
  EXPECT_EQ(config->latent_width(), 80);
  EXPECT_FALSE(config->IsMoe(0));
  EXPECT_TRUE(config->IsMoe(1));
  EXPECT_EQ(config->yarn.factor, 40);
  EXPECT_EQ(config->yarn.mscale_all_dim, 1);
  EXPECT_EQ(config->routed_scaling_factor, 2.5f);
  EXPECT_EQ(config->rms_norm_eps, 1e-6f);
  EXPECT_EQ(config->eos_token_ids, std::vector<int32_t>{1});
  EXPECT_EQ(config->quant_method, "");
}

TEST(ConfigTest, ReadsBackWhatItWrites) {
  for (const char* preset : {"toy", "odd", "r1-slice"}) {
    const ModelConfig wanted = RandomPreset(preset)->config;
    const auto config = ParseModelConfig(ConfigText(wanted));
    ASSERT_TRUE(config) << config.error().message;
    for (const RandomDimension& dimension : RandomDimensions()) {
      EXPECT_EQ(dimension.get(*config), dimension.get(wanted)) << preset << " " << dimension.name;
    }
  }
}

struct Refusal {
  const char* from;
  const char* to;
  const char* message;
};

TEST(ConfigTest, RefusesByName) {
  const Refusal refusals[] = {
      {"DeepseekV3ForCausalLM", "LlamaForCausalLM", "architectures is [\"LlamaForCausalLM\"]"},
      {"\"architectures\"", "\"architecture\"", "architectures is missing"},
      {"\"deepseek_v3\"", "\"deepseek_v2\"", "model_type is \"deepseek_v2\": only \"deepseek_v3\""},
      {"\"noaux_tc\"", "\"greedy\"", "topk_method is \"greedy\": only \"noaux_tc\""},
      {"\"sigmoid\"", "\"softmax\"", "scoring_func is \"softmax\""},
      {"\"silu\"", "\"gelu\"", "hidden_act is \"gelu\""},
      {"\"norm_topk_prob\": true", "\"norm_topk_prob\": false", "norm_topk_prob is false"},
      {"\"moe_layer_freq\": 1", "\"moe_layer_freq\": 2", "moe_layer_freq is 2"},
      {"\"attention_bias\": false", "\"attention_bias\": true", "attention_bias is true"},
      {"\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", "tie_word_embeddings is true"},
      {"\"type\": \"yarn\"", "\"type\": \"linear\"", "rope_scaling: type is \"linear\": only \"yarn\""},
      {"\"type\": \"yarn\"", "\"rope_type\": \"llama3\"", "rope_type is \"llama3\""},
      {"\"mscale\": 1.0", "\"attention_factor\": 1.0", "rope_scaling: attention_factor is 1"},
      {"\"use_cache\": true", "\"sliding_window\": 512", "sliding_window is 512"},
      {"\"use_cache\": true", "\"rope_interleave\": false", "rope_interleave is false"},
      {"\"num_key_value_heads\": 16", "\"num_key_value_heads\": 4", "num_key_value_heads is 4"},
      {"\"q_lora_rank\": 128", "\"q_lora_rank\": null", "q_lora_rank is null"},
      {"\"kv_lora_rank\": 64", "\"kv_lora_rank\": 63", "kv_lora_rank is 63: an even"},
      {"\"qk_rope_head_dim\": 16", "\"qk_rope_head_dim\": 15", "qk_rope_head_dim is 15: an even"},
      {"\"hidden_size\": 256", "\"hidden_size\": 0", "hidden_size is 0: a whole number from 1 to 65536"},
      {"\"hidden_size\": 256", "\"hidden_size\": -1", "hidden_size is -1"},
      {"\"hidden_size\": 256", "\"hidden_size\": 1e3", "hidden_size is 1000"},
      {"\"hidden_size\": 256", "\"hidden_size\": \"256\"", "hidden_size is \"256\""},
      {"\"hidden_size\": 256", "\"hidden_size\": 65537", "hidden_size is 65537"},
      {"\"hidden_size\": 256,", "", "hidden_size is missing"},
      {"\"vocab_size\": 2048", "\"vocab_size\": 9223372036854775807", "vocab_size is 9223372036854775807"},
      {"\"num_attention_heads\": 16,\n  \"num_key_value_heads\": 16", "\"num_attention_heads\": 4096",
       "num_attention_heads * v_head_dim is 131072: at most 65536"},
      {"\"intermediate_size\": 1024", "\"intermediate_size\": 1000",
       "intermediate_size is 1000: a multiple of 16"},
      {"\"moe_intermediate_size\": 128", "\"moe_intermediate_size\": 100", "moe_intermediate_size is 100"},
      {"\"first_k_dense_replace\": 1", "\"first_k_dense_replace\": 5", "first_k_dense_replace is 5"},
      {"\"n_group\": 4", "\"n_group\": 3", "n_group is 3: must divide n_routed_experts, 16"},
      {"\"n_group\": 4", "\"n_group\": 16", "n_group is 16: groups of 1 expert, at least 2"},
      {"\"topk_group\": 2", "\"topk_group\": 5", "topk_group is 5"},
      {"\"num_experts_per_tok\": 4", "\"num_experts_per_tok\": 9",
       "the kept groups hold 8 experts, fewer than"},
      {"\"rms_norm_eps\": 1e-06", "\"rms_norm_eps\": 0", "rms_norm_eps is 0"},
      {"\"bos_token_id\": 0", "\"bos_token_id\": 2048", "bos_token_id is 2048"},
      {"\"eos_token_id\": 1", "\"eos_token_id\": [1, -3]",
       "eos_token_id is an array of 2: -3 is not a token id"},
      {"\"use_cache\": true", "\"quantization_config\": {\"quant_method\": \"awq\"}",
       "quantization_config.quant_method is \"awq\""},
      {"\"use_cache\": true", "\"quantization_config\": {\"bits\": 8}", "quant_method is missing"},
      {"\"use_cache\": true", "\"hidden_size\": 256", "not valid JSON"},
      {"\"use_cache\": true", "\"use_cache\": tru", "not valid JSON"},
      {"{", "[", "config.json"},
  };
  for (const Refusal& refusal : refusals) {
    const auto config = ParseModelConfig(With(TinyText(), refusal.from, refusal.to));
    ASSERT_FALSE(config) << refusal.to;
    EXPECT_NE(config.error().message.find(refusal.message), std::string::npos)
        << refusal.to << " gave: " << config.error().message;
  }
}

TEST(ConfigTest, DepthIsBounded) {
  std::string deep = With(TinyText(), "\"use_cache\": true", "\"use_cache\": @");
  deep = With(deep, "@", std::string(100'000, '[') + std::string(100'000, ']'));
  EXPECT_FALSE(ParseModelConfig(deep));
}

TEST(ConfigTest, AcceptsWhatOtherWritersSay) {
  EXPECT_TRUE(ParseModelConfig(
      With(TinyText(), "\"use_cache\": true", "\"aux_loss_alpha\": 0.001, \"seq_aux\": true")));
  EXPECT_TRUE(ParseModelConfig(With(TinyText(), "\"topk_method\": \"noaux_tc\",", "")));
  EXPECT_TRUE(ParseModelConfig(With(TinyText(), "\"n_shared_experts\": 1", "\"n_shared_experts\": null")));
  const auto newer =
      ParseModelConfig(With(With(With(TinyText(), "rope_scaling", "rope_parameters"), "\"type\": \"yarn\"",
                                 "\"rope_type\": \"yarn\", \"rope_theta\": 500"),
                            "\"rope_theta\": 10000,", ""));
  ASSERT_TRUE(newer) << newer.error().message;
  EXPECT_EQ(newer->rope_theta, 500);
  EXPECT_EQ(newer->yarn.factor, 40);
}

TEST(ConfigTest, AMissingFileIsNamed) {
  const auto config = LoadModelConfig("/nowhere");
  ASSERT_FALSE(config);
  EXPECT_EQ(config.error().kind, ErrorKind::kNotFound);
  EXPECT_NE(config.error().message.find("/nowhere/config.json"), std::string::npos);
}

class GenerationDefaultsTest : public ::testing::Test {
 protected:
  GenerationDefaultsTest() {
    std::string pattern = ::testing::TempDir() + "config_XXXXXX";
    folder_ = mkdtemp(pattern.data());
  }
  ~GenerationDefaultsTest() override { std::filesystem::remove_all(folder_); }
  Result<GenerationDefaults> Load(const std::string& text) {
    EXPECT_TRUE(WriteFile(folder_ + "/generation_config.json", text));
    return LoadGenerationDefaults(folder_);
  }
  std::string folder_;
};

TEST_F(GenerationDefaultsTest, AbsentFileAndFieldsStayAbsent) {
  const auto none = LoadGenerationDefaults(folder_);
  ASSERT_TRUE(none);
  EXPECT_FALSE(none->temperature || none->top_p || none->top_k || none->min_p || none->max_new_tokens);
  const auto some = Load(R"({"temperature": 0.6, "top_k": null, "eos_token_id": [1, 7], "do_sample": true})");
  ASSERT_TRUE(some) << some.error().message;
  EXPECT_EQ(some->temperature, 0.6);
  EXPECT_FALSE(some->top_p || some->top_k);
  EXPECT_EQ(some->eos_token_ids, (std::vector<int32_t>{1, 7}));
}

TEST_F(GenerationDefaultsTest, BadValuesAreNamed) {
  for (const char* text : {R"({"temperature": -1})", R"({"top_p": 0})", R"({"top_p": "1"})",
                           R"({"top_k": 1.5})", R"({"min_p": 2})", R"({"repetition_penalty": 0})",
                           R"({"max_new_tokens": 0})", R"({"eos_token_id": "x"})", "[]", "{"}) {
    const auto defaults = Load(text);
    ASSERT_FALSE(defaults) << text;
    EXPECT_NE(defaults.error().message.find("generation_config.json"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace tessera
