// The packed weights of tiny-r1 hold the checkpoint's values, and bad values are refused by name.
#include "model/weights.h"

#include <gtest/gtest.h>

#include <bit>
#include <cstring>

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
    auto weights = Weights::Load(*checkpoint_, config_, threads, [&](uint64_t done, uint64_t all) {
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
  EXPECT_EQ(layer.q_b.zero_point, checkpoint_->ReadFloats(prefix + "self_attn.q_b_proj.input_offset").value()[0]);
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
        num_wrong += At(weights_.layers[2].key_up[static_cast<size_t>(h)], r, n) !=
                     kv_b[row * static_cast<size_t>(rank) + static_cast<size_t>(r)];
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
      num_wrong += At(weights_.layers[3].router, e, k) != router[static_cast<size_t>(e * config_.hidden_size + k)];
    }
  }
  EXPECT_EQ(num_wrong, 0);
}

}  // namespace
}  // namespace tessera
