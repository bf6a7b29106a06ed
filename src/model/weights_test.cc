// The packed weights of tiny-r1 hold the checkpoint's values, and bad values are refused by name.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "model/edited_checkpoint.h"

namespace tessera {
namespace {

using kernels::Bf16;
using kernels::kFloatPanel;
using kernels::kInt8Panel;

const std::string kTinyR1 = std::string(TESSERA_SOURCE_DIR) + "/models/tiny-r1";

// Element (n, k) of a packed weight, by the layouts of kernels.h.
int At(const kernels::PackedInt8& packed, int n, int k) {
  const int leaf = k / packed.leaf_k;
  const int in_leaf = k % packed.leaf_k;
  const int64_t at = (n / kInt8Panel) * packed.panel_bytes() + leaf * packed.leaf_bytes() +
                     int64_t{in_leaf / 4} * kInt8Panel * 4 + (n % kInt8Panel) * 4 + in_leaf % 4;
  return packed.panels[at] - 128;
}
uint16_t At(const kernels::PackedBf16& packed, int n, int k) {
  const int leaf = k / packed.leaf_k;
  const int in_leaf = k % packed.leaf_k;
  const int64_t at = (n / kFloatPanel) * packed.panel_elements() + leaf * packed.leaf_elements() +
                     int64_t{in_leaf / 2} * kFloatPanel * 2 + (n % kFloatPanel) * 2 + in_leaf % 2;
  return packed.panels[at].bits;
}
float At(const kernels::PackedFloat& packed, int n, int k) {
  return packed.panels[(int64_t{n / kFloatPanel} * packed.k + k) * kFloatPanel + n % kFloatPanel];
}

std::vector<uint16_t> Bits(const Checkpoint& checkpoint, const std::string& tensor) {
  const auto bytes = checkpoint.Read(tensor).value();
  std::vector<uint16_t> bits(bytes.size() / 2);
  std::memcpy(bits.data(), bytes.data(), bytes.size());
  return bits;
}

void ExpectInt8(const Checkpoint& checkpoint, const std::string& tensor, const Linear& linear) {
  const auto bytes = checkpoint.Read(tensor).value();
  ASSERT_EQ(bytes.size(), static_cast<size_t>(linear.num_outputs) * linear.k) << tensor;
  int num_wrong = 0;
  for (int n = 0; n < linear.num_outputs; ++n) {
    for (int k = 0; k < linear.k; ++k) {
      num_wrong += At(linear.int8, n, k) != static_cast<int8_t>(bytes[static_cast<size_t>(n * linear.k + k)]);
    }
  }
  EXPECT_EQ(num_wrong, 0) << tensor;
}

class TinyWeights : public ::testing::Test {
 protected:
  void Load(int num_threads) {
    config_ = LoadModelConfig(kTinyR1).value();
    auto checkpoint = Checkpoint::Open(kTinyR1, config_);
    ASSERT_TRUE(checkpoint) << checkpoint.error().message;
    checkpoint_.emplace(std::move(*checkpoint));
    ThreadPool threads(num_threads);
    uint64_t last = 0;
    uint64_t total = 0;
    auto weights =
        Weights::Load(*checkpoint_, config_, WholeShare(config_), threads, [&](uint64_t done, uint64_t all) {
          EXPECT_LE(done, all);
          last = done;
          total = all;
        });
    ASSERT_TRUE(weights) << weights.error().message;
    EXPECT_GT(total, 0u);
    EXPECT_EQ(last, total);
    weights_ = std::move(*weights);
  }

  ModelConfig config_;
  std::optional<Checkpoint> checkpoint_;
  Weights weights_;
};

TEST_F(TinyWeights, HoldTheCheckpointsValues) {
  Load(2);
  const LayerWeights& layer = weights_.layers[1];
  const std::string prefix = "model.layers.1.";
  ExpectInt8(*checkpoint_, prefix + "self_attn.q_a_proj.weight", layer.q_a);
  ExpectInt8(*checkpoint_, prefix + "self_attn.q_b_proj.weight", layer.q_b);
  ExpectInt8(*checkpoint_, prefix + "self_attn.kv_a_proj_with_mqa.weight", layer.kv_a);
  ExpectInt8(*checkpoint_, prefix + "self_attn.o_proj.weight", layer.o);
  ExpectInt8(*checkpoint_, prefix + "mlp.experts.15.gate_proj.weight", layer.experts[15].gate);
  ExpectInt8(*checkpoint_, prefix + "mlp.experts.0.down_proj.weight", layer.experts[0].down);
  ExpectInt8(*checkpoint_, prefix + "mlp.shared_experts.up_proj.weight", layer.shared.up);
  ExpectInt8(*checkpoint_, "model.layers.0.mlp.down_proj.weight", weights_.layers[0].dense.down);
  EXPECT_EQ(layer.o.num_leaves, 16);
  EXPECT_EQ(layer.o.scheme, Scheme::kInt8Static);
  EXPECT_EQ(layer.experts[3].up.scheme, Scheme::kInt8Dynamic);
  EXPECT_EQ(layer.experts[3].up.weight_scale,
            checkpoint_->ReadFloats(prefix + "mlp.experts.3.up_proj.weight_scale").value());
  EXPECT_EQ(layer.q_a.deq_scale, checkpoint_->ReadFloats(prefix + "self_attn.q_a_proj.deq_scale").value());
  EXPECT_EQ(layer.q_a.beta, checkpoint_->ReadFloats(prefix + "input_layernorm.bias").value());
  EXPECT_EQ(layer.q_b.beta, checkpoint_->ReadFloats(prefix + "self_attn.q_a_layernorm.bias").value());
  EXPECT_TRUE(layer.o.beta.empty());
  EXPECT_EQ(layer.q_b.zero_point,
            checkpoint_->ReadFloats(prefix + "self_attn.q_b_proj.input_offset").value()[0]);
  EXPECT_EQ(layer.q_b.inverse_scale[0],
            1.0f / checkpoint_->ReadFloats(prefix + "self_attn.q_b_proj.input_scale").value()[0]);
  const auto bias = checkpoint_->Read(prefix + "self_attn.kv_a_proj_with_mqa.quant_bias").value();
  EXPECT_EQ(std::memcmp(bias.data(), layer.kv_a.quant_bias.data(), bias.size()), 0);
  EXPECT_EQ(layer.router_bias, checkpoint_->ReadFloats(prefix + "mlp.gate.e_score_correction_bias").value());
}

TEST_F(TinyWeights, FloatMatricesAreWholeAndKeysTransposed) {
  Load(1);
  const auto head = Bits(*checkpoint_, "lm_head.weight");
  const auto embedding = Bits(*checkpoint_, "model.embed_tokens.weight");
  int num_wrong = 0;
  for (int n = 0; n < config_.vocab_size; ++n) {
    for (int k = 0; k < config_.hidden_size; ++k) {
      const auto at = static_cast<size_t>(n * config_.hidden_size + k);
      num_wrong += At(weights_.lm_head, n, k) != head[at] || weights_.embedding[at].bits != embedding[at];
    }
  }
  EXPECT_EQ(num_wrong, 0);
  const auto kv_b = Bits(*checkpoint_, "model.layers.2.self_attn.kv_b_proj.weight");
  const int nope = config_.qk_nope_head_dim;
  const int rank = config_.kv_lora_rank;
  for (int h = 0; h < config_.num_heads; ++h) {
    for (int r = 0; r < rank; ++r) {
      for (int n = 0; n < nope; ++n) {
        const auto row = static_cast<size_t>(h * (nope + config_.v_head_dim) + n);
        const uint16_t wanted = kv_b[row * static_cast<size_t>(rank) + static_cast<size_t>(r)];
        num_wrong += At(weights_.layers[2].key_up[static_cast<size_t>(h)], r, n) != wanted;
        num_wrong += At(weights_.layers[2].key_of_latent[static_cast<size_t>(h)], n, r) != wanted;
      }
      for (int v = 0; v < config_.v_head_dim; ++v) {
        const auto row = static_cast<size_t>(h * (nope + config_.v_head_dim) + nope + v);
        num_wrong += At(weights_.layers[2].value_up[static_cast<size_t>(h)], v, r) !=
                     kv_b[row * static_cast<size_t>(rank) + static_cast<size_t>(r)];
      }
    }
  }
  EXPECT_EQ(num_wrong, 0);
  const auto router = checkpoint_->ReadFloats("model.layers.3.mlp.gate.weight").value();
  for (int e = 0; e < config_.n_routed_experts; ++e) {
    for (int k = 0; k < config_.hidden_size; ++k) {
      num_wrong +=
          At(weights_.layers[3].router, e, k) != router[static_cast<size_t>(e * config_.hidden_size + k)];
    }
  }
  EXPECT_EQ(num_wrong, 0);
}

// -- Values that the arithmetic cannot take, in a small checkpoint of odd dimensions.

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
const std::string kQA = "model.layers.1.self_attn.q_a_proj";
const std::string kUp = "model.layers.1.mlp.experts.3.up_proj";

std::string LoadError(const EditedCheckpoint& edited, int num_threads = 2) {
  edited.Save();
  const auto checkpoint = edited.Open();
  if (!checkpoint) return "does not open: " + checkpoint.error().message;
  ThreadPool threads(num_threads);
  const ModelConfig config = LoadModelConfig(edited.folder()).value();
  const auto weights = Weights::Load(*checkpoint, config, WholeShare(config), threads, {});
  return weights ? "" : weights.error().message;
}

template <typename T>
std::string ErrorAfter(const std::string& tensor, size_t index, T value) {
  EditedCheckpoint edited(RandomFormat::kW8a8);
  EditedCheckpoint::Set(edited.main.at(tensor), index, value);
  const std::string message = LoadError(edited);
  EXPECT_NE(message.find("quant_model_weight_w8a8_dynamic.safetensors: tensor " + tensor), std::string::npos)
      << message;
  return message;
}

TEST(BadWeightsTest, NonFiniteValuesAreNamed) {
  constexpr uint16_t kInfinity = 0xFF80;
  EXPECT_NE(
      ErrorAfter<uint16_t>("model.embed_tokens.weight", 96 * 330 + 95, kInfinity).find("value 31775 is -inf"),
      std::string::npos);
  EXPECT_NE(ErrorAfter<uint16_t>("lm_head.weight", 12345, 0x7FC0).find("value 12345 is nan"),
            std::string::npos);
  ErrorAfter<uint16_t>("model.layers.2.self_attn.kv_b_proj.weight", 100, kInfinity);
  ErrorAfter<uint16_t>("model.layers.2.mlp.gate.weight", 5, kInfinity);
  ErrorAfter<uint16_t>("model.layers.0.post_attention_layernorm.weight", 0, kInfinity);
  ErrorAfter<uint16_t>("model.layers.0.self_attn.q_a_layernorm.bias", 40, kInfinity);
  ErrorAfter<float>("model.layers.1.mlp.gate.e_score_correction_bias", 8, kNan);
  ErrorAfter<float>(kUp + ".weight_scale", 47, kNan);
  ErrorAfter<float>(kQA + ".deq_scale", 3, kNan);
  ErrorAfter<float>(kQA + ".input_scale", 0, kNan);
}

TEST(BadWeightsTest, ScalesAndOffsets) {
  for (const float scale : {0.0f, -1.0f, 1e-45f}) {
    EXPECT_NE(ErrorAfter<float>(kQA + ".input_scale", 0, scale).find("a positive scale"), std::string::npos)
        << scale;
  }
  for (const float offset : {0.5f, 128.0f, -129.0f}) {
    EXPECT_NE(ErrorAfter<float>(kQA + ".input_offset", 0, offset).find("from -128 to 127"),
              std::string::npos);
  }
  EXPECT_NE(ErrorAfter<float>(kUp + ".weight_offset", 2, 1e-30f).find("value 2 is not zero"),
            std::string::npos);
  EXPECT_NE(ErrorAfter<float>(kQA + ".weight_offset", 0, 1.0f).find("asymmetric"), std::string::npos);
  EditedCheckpoint edited(RandomFormat::kW8a8);  // minus zero is zero
  EditedCheckpoint::Set(edited.main.at(kUp + ".weight_offset"), 2, -0.0f);
  EXPECT_EQ(LoadError(edited), "");
}

TEST(BadWeightsTest, QuantBiasStaysInInt32) {
  const int32_t bound = static_cast<int32_t>((int64_t{1} << 31) - 1 - 128 * 128 * 96);  // K of q_a is 96
  EXPECT_NE(ErrorAfter<int32_t>(kQA + ".quant_bias", 40, bound + 1).find("value 40"), std::string::npos);
  ErrorAfter<int32_t>(kQA + ".quant_bias", 0, -bound - 1);
  ErrorAfter<int32_t>(kQA + ".quant_bias", 0, std::numeric_limits<int32_t>::min());
  EditedCheckpoint edited(RandomFormat::kW8a8);
  EditedCheckpoint::Set(edited.main.at(kQA + ".quant_bias"), 0, -bound);
  EXPECT_EQ(LoadError(edited), "");
}

TEST(BadWeightsTest, TheFirstErrorInTheOrderOfTheModelWins) {
  EditedCheckpoint edited(RandomFormat::kW8a8);
  EditedCheckpoint::Set<uint16_t>(edited.main.at("lm_head.weight"), 0, 0x7F80);
  EditedCheckpoint::Set(edited.main.at(kUp + ".weight_scale"), 0, kNan);
  EditedCheckpoint::Set(edited.main.at("model.layers.1.mlp.experts.4.up_proj.weight_scale"), 0, kNan);
  for (const int num_threads : {1, 2, 4}) {
    EXPECT_NE(LoadError(edited, num_threads).find(kUp + ".weight_scale"), std::string::npos) << num_threads;
  }
}

TEST(StoredFormsTest, ScalesAndOffsetsAreReadInEveryForm) {
  EditedCheckpoint edited(RandomFormat::kW8a8);
  auto& deq_scale = edited.main.at(kQA + ".deq_scale");
  std::vector<float> scales(41);
  std::memcpy(scales.data(), deq_scale.bytes.data(), deq_scale.bytes.size());
  std::vector<int64_t> words;
  for (const float scale : scales) words.push_back(std::bit_cast<int32_t>(scale));
  deq_scale = EditedCheckpoint::Make(Dtype::kInt64, {41}, words);
  std::vector<uint16_t> per_channel(96, 0x3D00);  // bf16 0.03125
  per_channel[7] = 0x3D80;                        // 0.0625
  edited.main.at(kQA + ".input_scale") = EditedCheckpoint::Make(Dtype::kBf16, {96}, per_channel);
  edited.main.at(kQA + ".input_offset") =
      EditedCheckpoint::Make(Dtype::kInt8, {96}, std::vector<int8_t>(96, -128));
  edited.Save();
  const auto checkpoint = edited.Open();
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  ThreadPool threads(1);
  const ModelConfig config = LoadModelConfig(edited.folder()).value();
  const auto weights = Weights::Load(*checkpoint, config, WholeShare(config), threads, {});
  ASSERT_TRUE(weights) << weights.error().message;
  const Linear& q_a = weights->layers[1].q_a;
  EXPECT_EQ(q_a.deq_scale, scales);
  ASSERT_EQ(q_a.inverse_scale.size(), 96u);
  EXPECT_EQ(q_a.inverse_scale[0], 32);
  EXPECT_EQ(q_a.inverse_scale[7], 16);
  EXPECT_EQ(q_a.zero_point, -128);

  std::vector<int8_t> different(96, 3);
  different[95] = 4;
  edited.main.at(kQA + ".input_offset") = EditedCheckpoint::Make(Dtype::kInt8, {96}, different);
  EXPECT_NE(LoadError(edited).find("offsets that differ between channels"), std::string::npos);
  edited.main.at(kQA + ".input_offset") = EditedCheckpoint::Make(Dtype::kInt8, {1}, std::vector<int8_t>{3});
  words[2] |= int64_t{1} << 40;
  deq_scale = EditedCheckpoint::Make(Dtype::kInt64, {41}, words);
  EXPECT_NE(LoadError(edited).find(".deq_scale: value 2 is 0x"), std::string::npos);
}

// Odd sizes: the last panel is not full, leaves of o_proj are 9 columns, keys have 25.
TEST(StoredFormsTest, OddShapesArePackedWhole) {
  for (const RandomFormat format : {RandomFormat::kBf16, RandomFormat::kW8a8}) {
    EditedCheckpoint edited(format);
    const ModelConfig config = LoadModelConfig(edited.folder()).value();
    const Checkpoint checkpoint = edited.Open().value();
    ThreadPool threads(2);
    const Weights weights = Weights::Load(checkpoint, config, WholeShare(config), threads, {}).value();
    const LayerWeights& layer = weights.layers[2];
    const std::string prefix = "model.layers.2.";
    if (format == RandomFormat::kW8a8) {
      ExpectInt8(checkpoint, prefix + "self_attn.o_proj.weight", layer.o);
      ExpectInt8(checkpoint, prefix + "self_attn.q_a_proj.weight", layer.q_a);
      ExpectInt8(checkpoint, prefix + "mlp.shared_experts.down_proj.weight", layer.shared.down);
    } else {
      const auto o = Bits(checkpoint, prefix + "self_attn.o_proj.weight");
      int num_wrong = 0;
      for (int n = 0; n < layer.o.num_outputs; ++n) {
        for (int k = 0; k < layer.o.k; ++k)
          num_wrong += At(layer.o.bf16, n, k) != o[static_cast<size_t>(n * layer.o.k + k)];
      }
      EXPECT_EQ(num_wrong, 0);
    }
    const auto kv_b = Bits(checkpoint, prefix + "self_attn.kv_b_proj.weight");
    const auto rank = static_cast<size_t>(config.kv_lora_rank);
    const size_t row = 5 * 49 + 24;  // the last key row of the last head
    EXPECT_EQ(At(layer.key_up[5], 37, 24), kv_b[row * rank + 37]);
    EXPECT_EQ(At(layer.key_of_latent[5], 24, 37), kv_b[row * rank + 37]);
    EXPECT_EQ(At(layer.value_up[5], 23, 37), kv_b[(5 * 49 + 25 + 23) * rank + 37]);
  }
}

#if defined(__has_feature)
#define TESSERA_SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TESSERA_SANITIZED 1
#else
#define TESSERA_SANITIZED 0
#endif

TEST(PeakMemoryTest, LoadingNeedsLittleMoreThanTheWeights) {
  if (TESSERA_SANITIZED) GTEST_SKIP() << "sanitizers keep memory of their own";
  // One buffer of 4 MiB a thread and the small arrays, whatever the size of the largest tensor.
  std::string pattern = ::testing::TempDir() + "peak_XXXXXX";
  const std::string root = mkdtemp(pattern.data());
  RandomCheckpointOptions options = RandomPreset("toy").value();
  options.config.vocab_size = 40'000;  // 41 MB of embedding, as much of head
  ASSERT_TRUE(WriteRandomCheckpoint(root + "/model", options, {}));
  const ModelConfig config = LoadModelConfig(root + "/model").value();
  const Checkpoint checkpoint = Checkpoint::Open(root + "/model", config).value();
  ThreadPool threads(2);
  const uint64_t before = ResidentBytes();
  uint64_t peak = 0;
  const auto weights = Weights::Load(checkpoint, config, WholeShare(config), threads,
                                     [&](uint64_t, uint64_t) { peak = std::max(peak, ResidentBytes()); });
  ASSERT_TRUE(weights);
  EXPECT_LT(peak - before, checkpoint.total_bytes() * 1.15 + (16 << 20));
  std::filesystem::remove_all(root);
}

}  // namespace
}  // namespace tessera
