// The GGUF file beside a random W8A8 checkpoint: read back by a reader of its own, every tensor holds the
// numbers of the safetensors, dequantised, under the name and shape that llama.cpp looks for.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <variant>

#include "base/file.h"
#include "model/checkpoint.h"
#include "model/gguf_model.h"
#include "model/random_checkpoint.h"

namespace tessera {
namespace {

// Reads the container from its description, without the writer's code.
class GgufReader {
 public:
  struct Tensor {
    std::vector<uint64_t> dims;  // the contiguous one first
    uint32_t type = 0;
    uint64_t offset = 0;
    std::vector<float> values;
  };
  using Value = std::variant<uint32_t, float, bool, std::string>;

  explicit GgufReader(std::string file) : file_(std::move(file)) {
    EXPECT_EQ(file_.substr(0, 4), "GGUF");
    at_ = 4;
    EXPECT_EQ(Take<uint32_t>(), 3u);
    const auto num_tensors = Take<uint64_t>();
    const auto num_keys = Take<uint64_t>();
    for (uint64_t i = 0; i < num_keys; ++i) {
      const std::string key = TakeText();
      EXPECT_TRUE(keys.emplace(key, TakeValue()).second) << key;
    }
    for (uint64_t i = 0; i < num_tensors; ++i) {
      const std::string name = TakeText();
      Tensor tensor;
      tensor.dims.resize(Take<uint32_t>());
      for (uint64_t& size : tensor.dims) size = Take<uint64_t>();
      tensor.type = Take<uint32_t>();
      tensor.offset = Take<uint64_t>();
      EXPECT_TRUE(tensors.emplace(name, tensor).second) << name;
    }
    const size_t data = (at_ + 31) / 32 * 32;
    size_t end = data;
    for (auto& [name, tensor] : tensors) {
      EXPECT_EQ(tensor.offset % 32, 0u) << name;
      at_ = data + tensor.offset;
      TakeValues(tensor);
      end = std::max(end, at_);
    }
    EXPECT_EQ(file_.size(), (end + 31) / 32 * 32);
  }

  std::map<std::string, Value> keys;
  std::map<std::string, Tensor> tensors;

 private:
  template <typename T>
  T Take() {
    T value{};
    if (at_ + sizeof(T) > file_.size()) {
      ADD_FAILURE() << "the file ends at " << file_.size();
      return value;
    }
    std::memcpy(&value, file_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }
  std::string TakeText() {
    const auto length = Take<uint64_t>();
    const std::string text = file_.substr(at_, length);
    at_ += length;
    return text;
  }
  Value TakeValue() {
    const auto type = Take<uint32_t>();
    if (type == 4) return Take<uint32_t>();
    if (type == 6) return Take<float>();
    if (type == 7) return Take<uint8_t>() != 0;
    EXPECT_EQ(type, 8u);
    return TakeText();
  }
  void TakeValues(Tensor& tensor) {
    uint64_t count = 1;
    for (const uint64_t size : tensor.dims) count *= size;
    if (tensor.type == 0) {
      while (tensor.values.size() < count) tensor.values.push_back(Take<float>());
      return;
    }
    ASSERT_EQ(tensor.type, 8u);
    ASSERT_EQ(tensor.dims[0] % 32, 0u);
    while (tensor.values.size() < count) {
      const float scale = Fp16(Take<uint16_t>());
      for (int i = 0; i < 32; ++i) tensor.values.push_back(scale * static_cast<float>(Take<int8_t>()));
    }
  }
  static float Fp16(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    EXPECT_TRUE(bits >> 15 == 0 && exponent > 0 && exponent < 31);  // a scale is positive and normal
    return std::ldexp(static_cast<float>(1024 + (bits & 1023)), exponent - 25);
  }

  std::string file_;
  size_t at_ = 0;
};

class GgufTest : public ::testing::Test {
 protected:
  GgufTest() {
    std::string pattern = ::testing::TempDir() + "gguf_XXXXXX";
    root_ = mkdtemp(pattern.data());
    options_ = RandomPreset("toy").value();
    options_.format = RandomFormat::kW8a8;
    options_.gguf = root_ + "/model.gguf";
    ModelConfig& config = options_.config;
    config.vocab_size = 288;
    config.hidden_size = 160;
    config.num_heads = 5;
    config.q_lora_rank = 96;
    config.kv_lora_rank = 128;
    config.qk_nope_head_dim = 64;
    config.qk_rope_head_dim = 16;
    config.v_head_dim = 32;
    config.intermediate_size = 192;
    config.moe_intermediate_size = 32;
    config.n_routed_experts = 6;
    config.n_shared_experts = 3;
  }
  ~GgufTest() override { std::filesystem::remove_all(root_); }

  // A tensor of the checkpoint, dequantised.
  static std::vector<float> Dequantised(const Checkpoint& checkpoint, const std::string& name) {
    const std::string scale_name = name + "_scale";
    if (!checkpoint.Has(scale_name)) return checkpoint.ReadFloats(name).value();
    const auto codes = checkpoint.Read(name).value();
    const std::vector<float> scales = checkpoint.ReadFloats(scale_name).value();
    std::vector<float> values(codes.size());
    for (size_t i = 0; i < codes.size(); ++i) {
      const float scale = scales[i / (codes.size() / scales.size())];
      values[i] = scale * static_cast<float>(static_cast<int8_t>(codes[i]));
    }
    return values;
  }

  std::string root_;
  RandomCheckpointOptions options_;
};

using Dims = std::vector<uint64_t>;
using Values = std::vector<float>;

// Removes the tensor; its values.
Values TakeTensor(GgufReader& gguf, const std::string& name, const Dims& dims, bool is_float) {
  const auto at = gguf.tensors.find(name);
  if (at == gguf.tensors.end()) {
    ADD_FAILURE() << name << " is missing";
    return {};
  }
  EXPECT_EQ(at->second.dims, dims) << name;
  EXPECT_EQ(at->second.type, is_float ? 0u : 8u) << name;
  Values values = std::move(at->second.values);
  gguf.tensors.erase(at);
  return values;
}

TEST_F(GgufTest, HoldsTheNumbersOfTheCheckpoint) {
  const auto size = WriteRandomCheckpoint(root_ + "/model", options_, {});
  ASSERT_TRUE(size) << size.error().message;
  const auto config = LoadModelConfig(root_ + "/model");
  const Checkpoint checkpoint = Checkpoint::Open(root_ + "/model", *config).value();
  GgufReader gguf(ReadFile(options_.gguf).value());
  const auto same = [&](const std::string& ours, const std::string& theirs, const Dims& dims,
                        bool is_float = false) {
    EXPECT_EQ(Dequantised(checkpoint, ours), TakeTensor(gguf, theirs, dims, is_float)) << theirs;
  };
  same("model.embed_tokens.weight", "token_embd.weight", {160, 288});
  same("model.norm.weight", "output_norm.weight", {160}, true);
  same("lm_head.weight", "output.weight", {160, 288});
  for (int layer = 0; layer < 3; ++layer) {
    const std::string ours = Format("model.layers.{}.", layer), theirs = Format("blk.{}.", layer);
    same(ours + "input_layernorm.weight", theirs + "attn_norm.weight", {160}, true);
    same(ours + "post_attention_layernorm.weight", theirs + "ffn_norm.weight", {160}, true);
    same(ours + "self_attn.q_a_layernorm.weight", theirs + "attn_q_a_norm.weight", {96}, true);
    same(ours + "self_attn.kv_a_layernorm.weight", theirs + "attn_kv_a_norm.weight", {128}, true);
    same(ours + "self_attn.q_a_proj.weight", theirs + "attn_q_a.weight", {160, 96});
    same(ours + "self_attn.q_b_proj.weight", theirs + "attn_q_b.weight", {96, 5 * 80});
    same(ours + "self_attn.kv_a_proj_with_mqa.weight", theirs + "attn_kv_a_mqa.weight", {160, 144});
    same(ours + "self_attn.o_proj.weight", theirs + "attn_output.weight", {160, 160});
    if (layer == 0) {
      same(ours + "mlp.gate_proj.weight", theirs + "ffn_gate.weight", {160, 192});
      same(ours + "mlp.up_proj.weight", theirs + "ffn_up.weight", {160, 192});
      same(ours + "mlp.down_proj.weight", theirs + "ffn_down.weight", {192, 160});
      continue;
    }
    same(ours + "mlp.gate.weight", theirs + "ffn_gate_inp.weight", {160, 6}, true);
    same(ours + "mlp.gate.e_score_correction_bias", theirs + "exp_probs_b.bias", {6}, true);
    same(ours + "mlp.shared_experts.gate_proj.weight", theirs + "ffn_gate_shexp.weight", {160, 96});
    same(ours + "mlp.shared_experts.up_proj.weight", theirs + "ffn_up_shexp.weight", {160, 96});
    same(ours + "mlp.shared_experts.down_proj.weight", theirs + "ffn_down_shexp.weight", {96, 160});
    for (const std::string kind : {"gate", "up", "down"}) {
      Values experts;
      for (int expert = 0; expert < 6; ++expert) {
        const Values one =
            Dequantised(checkpoint, Format("{}mlp.experts.{}.{}_proj.weight", ours, expert, kind));
        experts.insert(experts.end(), one.begin(), one.end());
      }
      const Dims dims = kind == "down" ? Dims{32, 160, 6} : Dims{160, 32, 6};
      EXPECT_EQ(experts, TakeTensor(gguf, Format("{}ffn_{}_exps.weight", theirs, kind), dims, false));
    }
  }
  for (int layer = 0; layer < 3; ++layer) {  // [heads][nope + v][R]: keys transposed, values as they are
    const Values both = Dequantised(checkpoint, Format("model.layers.{}.self_attn.kv_b_proj.weight", layer));
    const Values keys = TakeTensor(gguf, Format("blk.{}.attn_k_b.weight", layer), {64, 128, 5}, false);
    const Values values = TakeTensor(gguf, Format("blk.{}.attn_v_b.weight", layer), {128, 32, 5}, false);
    ASSERT_EQ(both.size(), keys.size() + values.size());
    size_t num_different = 0;
    for (size_t h = 0; h < 5; ++h) {
      for (size_t row = 0; row < 96; ++row) {
        for (size_t r = 0; r < 128; ++r) {
          const float theirs =
              row < 64 ? keys[(h * 128 + r) * 64 + row] : values[(h * 32 + row - 64) * 128 + r];
          num_different += both[(h * 96 + row) * 128 + r] != theirs;
        }
      }
    }
    EXPECT_EQ(num_different, 0u) << layer;
  }
  EXPECT_TRUE(gguf.tensors.empty()) << gguf.tensors.begin()->first;
}

TEST_F(GgufTest, DescribesTheModel) {
  ASSERT_TRUE(WriteRandomCheckpoint(root_ + "/model", options_, {}));
  const std::map<std::string, GgufReader::Value> wanted = {
      {"general.architecture", std::string("deepseek2")},
      {"general.name", std::string("random")},
      {"general.file_type", 7u},
      {"general.quantization_version", 2u},
      {"tokenizer.ggml.model", std::string("no_vocab")},
      {"deepseek2.block_count", 3u},
      {"deepseek2.context_length", 163840u},
      {"deepseek2.embedding_length", 160u},
      {"deepseek2.feed_forward_length", 192u},
      {"deepseek2.leading_dense_block_count", 1u},
      {"deepseek2.expert_feed_forward_length", 32u},
      {"deepseek2.expert_count", 6u},
      {"deepseek2.expert_used_count", 2u},
      {"deepseek2.expert_shared_count", 3u},
      {"deepseek2.expert_gating_func", 2u},
      {"deepseek2.expert_weights_scale", 2.5f},
      {"deepseek2.expert_weights_norm", true},
      {"deepseek2.attention.head_count", 5u},
      {"deepseek2.attention.head_count_kv", 1u},
      {"deepseek2.attention.q_lora_rank", 96u},
      {"deepseek2.attention.kv_lora_rank", 128u},
      {"deepseek2.attention.key_length", 144u},
      {"deepseek2.attention.value_length", 128u},
      {"deepseek2.attention.key_length_mla", 80u},
      {"deepseek2.attention.value_length_mla", 32u},
      {"deepseek2.attention.layer_norm_rms_epsilon", 1e-6f},
      {"deepseek2.rope.dimension_count", 16u},
      {"deepseek2.rope.freq_base", 10000.0f},
      {"deepseek2.rope.scaling.type", std::string("yarn")},
      {"deepseek2.rope.scaling.factor", 40.0f},
      {"deepseek2.rope.scaling.original_context_length", 4096u},
      {"deepseek2.rope.scaling.yarn_log_multiplier", 0.1f},
      {"deepseek2.rope.scaling.yarn_beta_fast", 32.0f},
      {"deepseek2.rope.scaling.yarn_beta_slow", 1.0f},
      {"deepseek2.vocab_size", 288u},
  };
  EXPECT_EQ(GgufReader(ReadFile(options_.gguf).value()).keys, wanted);
}

TEST_F(GgufTest, RefusesWhatItCannotHold) {
  const auto refusal = [this](const std::string& folder) {
    const auto size = WriteRandomCheckpoint(root_ + "/" + folder, options_, {});
    return size ? "none" : size.error().message;
  };
  options_.format = RandomFormat::kBf16;
  EXPECT_EQ(refusal("a"), "a GGUF file holds int8 weights: it comes beside the W8A8 format, not beside bf16");
  options_.format = RandomFormat::kW8a8;
  options_.config.q_lora_rank = 90;
  EXPECT_EQ(refusal("b"), "GGUF: q_lora_rank is 90: Q8_0 wants a multiple of 32");
  options_.config.q_lora_rank = 96;
  options_.config.yarn.mscale_all_dim = 0.5;
  EXPECT_EQ(refusal("c"), "GGUF: rope mscale is 1, mscale_all_dim 0.5: the format has one number for both");
  options_.config.yarn.factor = 1;
  EXPECT_EQ(refusal("d"), "none");
  EXPECT_NE(refusal("e").find("model.gguf: File exists"), std::string::npos);
}

TEST(GgufScaleTest, RoundsUpToElevenBits) {
  EXPECT_EQ(RoundUpToFp16(0), 0x1p-14f);
  EXPECT_EQ(RoundUpToFp16(1), 1);
  EXPECT_EQ(RoundUpToFp16(std::nextafter(1.0f, 2.0f)), 1 + 0x1p-10f);
  EXPECT_EQ(RoundUpToFp16(1 + 0x1p-10f), 1 + 0x1p-10f);
  EXPECT_EQ(RoundUpToFp16(std::nextafter(2.0f, 0.0f)), 2);
}

}  // namespace
}  // namespace tessera
