// Random checkpoints load, are the same model in both formats, and do not depend on shards or threads.
#include "model/random_checkpoint.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <numeric>

#include "base/file.h"
#include "base/sha256.h"
#include "model/random_tensor.h"
#include "model/tensor_table.h"
#include "model/weights.h"

namespace tessera {
namespace {

class RandomCheckpointTest : public ::testing::Test {
 protected:
  RandomCheckpointTest() {
    std::string pattern = ::testing::TempDir() + "random_checkpoint_XXXXXX";
    root_ = mkdtemp(pattern.data());
  }
  ~RandomCheckpointTest() override { std::filesystem::remove_all(root_); }

  std::string Write(const std::string& name, const RandomCheckpointOptions& options) {
    const std::string folder = root_ + "/" + name;
    const auto size = WriteRandomCheckpoint(folder, options, {});
    EXPECT_TRUE(size) << size.error().message;
    return folder;
  }
  static Checkpoint Open(const std::string& folder) {
    const auto config = LoadModelConfig(folder);
    EXPECT_TRUE(config) << config.error().message;
    auto checkpoint = Checkpoint::Open(folder, *config);
    EXPECT_TRUE(checkpoint) << checkpoint.error().message;
    return *checkpoint;
  }
  static RandomCheckpointOptions Odd(RandomFormat format, uint64_t seed = 7) {
    RandomCheckpointOptions options = RandomPreset("odd").value();
    options.format = format;
    options.seed = seed;
    return options;
  }

  std::string root_;
};

TEST(RandomTensorTest, ElementsCanBeComputedAlone) {
  const RandomTensor tensor(3, "a.weight", 2);
  std::vector<float> all(101);
  tensor.Fill(0, all);
  for (uint64_t begin : {0, 1, 2, 7, 50, 100}) {
    std::vector<float> part(std::min<size_t>(5, all.size() - begin));
    tensor.Fill(begin, part);
    for (size_t i = 0; i < part.size(); ++i) EXPECT_EQ(part[i], all[begin + i]) << begin << " " << i;
  }
  std::vector<float> other(101);
  RandomTensor(4, "a.weight", 2).Fill(0, other);
  EXPECT_NE(other, all);
  RandomTensor(3, "b.weight", 2).Fill(0, other);
  EXPECT_NE(other, all);
}

TEST(RandomTensorTest, IsNormal) {
  constexpr size_t kCount = 200'000;
  std::vector<float> values(kCount);
  RandomTensor(1, "x", 0.5).Fill(0, values);
  double moments[5] = {};
  for (const float value : values) {
    for (int power = 1; power <= 4; ++power) moments[power] += std::pow(value / 0.5, power) / kCount;
  }
  EXPECT_NEAR(moments[1], 0, 0.01);
  EXPECT_NEAR(moments[2], 1, 0.01);
  EXPECT_NEAR(moments[3], 0, 0.03);
  EXPECT_NEAR(moments[4], 3 - 0.15, 0.06);
}

TEST_F(RandomCheckpointTest, BothFormatsLoadAndPack) {
  ThreadPool threads(2);
  for (const RandomFormat format : {RandomFormat::kBf16, RandomFormat::kW8a8}) {
    const std::string folder = Write(format == RandomFormat::kBf16 ? "bf16" : "w8a8", Odd(format));
    const Checkpoint checkpoint = Open(folder);
    EXPECT_TRUE(checkpoint.has_mtp());
    EXPECT_EQ(checkpoint.description(), format == RandomFormat::kBf16 ? "bf16" : "W8A8 (ModelSlim)");
    const ModelConfig config = LoadModelConfig(folder).value();
    const auto weights = Weights::Load(checkpoint, config, WholeShare(config), threads, {});
    ASSERT_TRUE(weights) << weights.error().message;
    EXPECT_EQ(weights->layers[1].experts.size(), 9u);
    EXPECT_EQ(weights->layers[2].shared.down.k, 2 * config.moe_intermediate_size);
    EXPECT_EQ(weights->layers[0].q_a.beta.empty(), format == RandomFormat::kBf16);
  }
}

// y = x W^T by the formula of a static linear must follow the bf16 weight within the quantisation error.
TEST_F(RandomCheckpointTest, W8a8IsTheBf16ModelQuantised) {
  const Checkpoint bf16 = Open(Write("bf16", Odd(RandomFormat::kBf16)));
  const Checkpoint int8 = Open(Write("w8a8", Odd(RandomFormat::kW8a8)));
  const std::vector<float> embedding = bf16.ReadFloats("model.embed_tokens.weight").value();
  const std::vector<float> rounded = int8.ReadFloats("model.embed_tokens.weight").value();
  ASSERT_EQ(embedding.size(), rounded.size());
  for (size_t i = 0; i < rounded.size(); ++i) {  // to multiples of 2^-3, after the rounding to bf16
    ASSERT_EQ(std::rint(rounded[i] * 8), rounded[i] * 8);
    ASSERT_NEAR(rounded[i], embedding[i], 0.0625 + 0.016);
  }
  EXPECT_EQ(bf16.Read("model.layers.3.mlp.experts.4.up_proj.weight").value(),
            int8.Read("model.layers.3.mlp.experts.4.up_proj.weight").value());
  const auto scales = int8.ReadFloats("model.layers.2.self_attn.q_b_proj.weight_scale").value();
  for (const float scale : scales) EXPECT_EQ(std::bit_cast<uint32_t>(scale) % (1 << 13), 0u);  // as in fp16
  const std::string linear = "model.layers.1.self_attn.q_b_proj";
  const std::vector<float> weight = bf16.ReadFloats(linear + ".weight").value();
  const auto quantised = int8.Read(linear + ".weight").value();
  const auto bias_bytes = int8.Read(linear + ".quant_bias").value();
  const std::vector<float> deq_scale = int8.ReadFloats(linear + ".deq_scale").value();
  const std::vector<float> beta = int8.ReadFloats("model.layers.1.self_attn.q_a_layernorm.bias").value();
  const float scale = int8.ReadFloats(linear + ".input_scale").value()[0];
  const float offset = int8.ReadFloats(linear + ".input_offset").value()[0];
  const size_t columns = beta.size();
  std::vector<float> x(columns);
  RandomTensor(11, "input", 1).Fill(0, x);
  double error = 0;
  double power = 0;
  for (size_t n = 0; n < deq_scale.size(); ++n) {
    double exact = 0;
    double sum = 0;
    for (size_t k = 0; k < columns; ++k) {
      exact += static_cast<double>(x[k]) * weight[n * columns + k];
      const float q = std::clamp(std::rint((x[k] + beta[k]) / scale) + offset, -128.0f, 127.0f);
      sum += q * static_cast<int8_t>(quantised[n * columns + k]);
    }
    int32_t bias = 0;
    std::memcpy(&bias, &bias_bytes[4 * n], 4);
    const double y = (sum + bias) * deq_scale[n];
    error += (y - exact) * (y - exact);
    power += exact * exact;
  }
  EXPECT_LT(std::sqrt(error / power), 0.03);
}

TEST_F(RandomCheckpointTest, ShardsDoNotChangeTensors) {
  const Checkpoint one = Open(Write("one", Odd(RandomFormat::kW8a8)));
  RandomCheckpointOptions options = Odd(RandomFormat::kW8a8);
  options.max_shard_bytes = 100'000;
  const std::string folder = Write("many", options);
  EXPECT_GT(std::distance(std::filesystem::directory_iterator(folder), {}), 12);
  const Checkpoint many = Open(folder);
  for (const ModelTensor& tensor : MainTensors(options.config)) {
    EXPECT_EQ(one.Read(tensor.name).value(), many.Read(tensor.name).value()) << tensor.name;
  }
}

// The bf16 goldens are of this very model: its bytes may never change.
TEST_F(RandomCheckpointTest, GoldenModelIsFrozen) {
  const std::string folder = Write("golden", Odd(RandomFormat::kBf16, 11));
  const auto text = ReadFile(folder + "/model.safetensors").value();
  EXPECT_EQ(Hex(HashSha256(std::as_bytes(std::span(text)))),
            "2a42bbc882d4d7aa28f4f8ff3665bbc67a17efe50c794e2783d5152522438294");
}

TEST_F(RandomCheckpointTest, PresetsHaveTheirSizes) {
  RandomCheckpointOptions toy = RandomPreset("toy").value();
  const auto size = WriteRandomCheckpoint(root_ + "/toy", toy, {});
  ASSERT_TRUE(size) << size.error().message;
  EXPECT_NEAR(static_cast<double>(size->num_parameters), 22.8e6, 0.3e6);
  uint64_t slice = 0;
  for (const ModelTensor& tensor : MainTensors(RandomPreset("r1-slice").value().config)) {
    slice += std::accumulate(tensor.shape.begin(), tensor.shape.end(), uint64_t{1}, std::multiplies<>());
  }
  EXPECT_NEAR(static_cast<double>(slice), 7.38e9, 0.01e9);
  EXPECT_EQ(RandomPreset("r1-slice")->format, RandomFormat::kW8a8);
  EXPECT_EQ(toy.format, RandomFormat::kBf16);
}

TEST_F(RandomCheckpointTest, EveryDimensionHasAFlag) {
  RandomCheckpointOptions options = RandomPreset("toy").value();
  for (const RandomDimension& dimension : RandomDimensions()) {
    EXPECT_TRUE(SetDimension(options, dimension.name, 48)) << dimension.name;
    EXPECT_EQ(dimension.get(options.config), 48) << dimension.name;
  }
  const auto fraction = SetDimension(options, "hidden-size", 1.5);
  ASSERT_FALSE(fraction);
  EXPECT_EQ(fraction.error().message, "hidden-size is 1.5: a whole number is wanted");
  EXPECT_FALSE(SetDimension(options, "hidden", 1));
  EXPECT_FALSE(RandomPreset("big"));
}

TEST_F(RandomCheckpointTest, RefusesWhatNoModelMayBe) {
  RandomCheckpointOptions options = Odd(RandomFormat::kBf16);
  options.config.v_head_dim = 25;
  auto size = WriteRandomCheckpoint(root_ + "/a", options, {});
  ASSERT_FALSE(size);
  EXPECT_EQ(size.error().message,
            "config.json: num_attention_heads * v_head_dim is 150: a multiple of 16 is wanted");
  options = Odd(RandomFormat::kBf16);
  options.config.vocab_size = 100;
  size = WriteRandomCheckpoint(root_ + "/b", options, {});
  ASSERT_FALSE(size);
  EXPECT_EQ(size.error().message, "vocab_size is 100, the byte-level tokenizer needs at least 272");
  size = WriteRandomCheckpoint(std::string(TESSERA_SOURCE_DIR) + "/models/tiny-r1", Odd(RandomFormat::kBf16),
                               {});
  ASSERT_FALSE(size);
  EXPECT_NE(size.error().message.find("is not empty"), std::string::npos);
}

TEST_F(RandomCheckpointTest, CopiesATokenizer) {
  RandomCheckpointOptions options = Odd(RandomFormat::kW8a8);
  options.tokenizer_folder = std::string(TESSERA_SOURCE_DIR) + "/models/tiny-r1";
  ASSERT_FALSE(WriteRandomCheckpoint(root_ + "/small", options, {}));  // 331 rows are too few
  options.config.vocab_size = 2048;
  const std::string folder = Write("fits", options);
  EXPECT_EQ(ReadFile(folder + "/tokenizer.json").value(),
            ReadFile(options.tokenizer_folder + "/tokenizer.json").value());
}

// Shapes at the edges of what model.md allows.
TEST_F(RandomCheckpointTest, UnusualShapesLoad) {
  ThreadPool threads(1);
  RandomCheckpointOptions options = Odd(RandomFormat::kW8a8);
  options.config.n_shared_experts = 0;
  options.config.n_group = 1;
  options.config.topk_group = 1;
  options.config.first_k_dense_replace = 0;
  options.config.num_nextn_predict_layers = 0;
  options.config.yarn.factor = 1;
  std::string folder = Write("moe", options);
  const ModelConfig config = LoadModelConfig(folder).value();
  EXPECT_TRUE(Weights::Load(Open(folder), config, WholeShare(config), threads, {}));
  EXPECT_EQ(LoadModelConfig(folder)->yarn.factor, 1);
  options.config.first_k_dense_replace = options.config.num_layers;
  options.config.num_heads = 16;
  options.config.v_head_dim = 1;
  folder = Write("dense", options);
  const ModelConfig dense = LoadModelConfig(folder).value();
  EXPECT_TRUE(Weights::Load(Open(folder), dense, WholeShare(dense), threads, {}));
  EXPECT_FALSE(Open(folder).has_mtp());
}

}  // namespace
}  // namespace tessera
