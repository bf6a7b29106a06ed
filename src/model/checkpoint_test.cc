// Which folders open, and that every broken one is refused with the tensor and the file named.
#include "model/checkpoint.h"

#include <gtest/gtest.h>

#include "model/edited_checkpoint.h"

namespace tessera {
namespace {

const std::string kTinyR1 = std::string(TESSERA_SOURCE_DIR) + "/models/tiny-r1";
const std::string kQA = "model.layers.1.self_attn.q_a_proj";
const std::string kUp = "model.layers.1.mlp.experts.3.up_proj";
const std::string kQuantFile = "/quant_model_weight_w8a8_dynamic.safetensors";

using Tensor = EditedCheckpoint::Tensor;

Tensor Zeros(Dtype dtype, std::vector<int64_t> shape) {
  size_t bytes = static_cast<size_t>(DtypeBytes(dtype));
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  return {dtype, std::move(shape), std::vector<std::byte>(bytes)};
}

// Replaces an int8 linear by a bf16 one, in the tensors and in the description.
void MakeFloat(EditedCheckpoint& edited, const std::string& linear) {
  const std::vector<int64_t> shape = edited.main.at(linear + ".weight").shape;
  std::erase_if(edited.main, [&](const auto& tensor) { return tensor.first.starts_with(linear + "."); });
  edited.main[linear + ".weight"] = Zeros(Dtype::kBf16, shape);
  edited.Undescribe(linear + ".");
  edited.Replace(EditedCheckpoint::kDescription, "\"W8A8_DYNAMIC\"",
                 "\"W8A8_DYNAMIC\", \"" + linear + ".weight\": \"FLOAT\"");
}

#define EXPECT_NAMES(message, ...)                                                            \
  do {                                                                                        \
    const std::string seen = (message);                                                       \
    for (const std::string& part : std::vector<std::string>{__VA_ARGS__}) {                   \
      EXPECT_NE(seen.find(part), std::string::npos) << "\"" << part << "\" not in: " << seen; \
    }                                                                                         \
  } while (false)

TEST(CheckpointTest, OpensTinyR1) {
  const ModelConfig config = LoadModelConfig(kTinyR1).value();
  for (const char* flag : {"", "ascend"}) {
    const auto checkpoint = Checkpoint::Open(kTinyR1, config, flag);
    ASSERT_TRUE(checkpoint) << checkpoint.error().message;
    EXPECT_EQ(checkpoint->SchemeOf("model.layers.0.self_attn.o_proj"), Scheme::kInt8Static);
    EXPECT_EQ(checkpoint->SchemeOf("model.layers.3.mlp.experts.9.down_proj"), Scheme::kInt8Dynamic);
    EXPECT_TRUE(checkpoint->has_mtp());
    EXPECT_TRUE(checkpoint->Has("model.layers.0.input_layernorm.bias"));
    EXPECT_FALSE(checkpoint->Has("model.layers.0.post_attention_layernorm.bias"));
    EXPECT_EQ(checkpoint->Entry("lm_head.weight").shape, (std::vector<int64_t>{2048, 256}));
    EXPECT_EQ(checkpoint->description(), "W8A8 (ModelSlim)");
    EXPECT_GT(checkpoint->total_bytes(), 9'000'000u);
    EXPECT_LT(checkpoint->total_bytes(), 10'000'000u);
  }
}

TEST(CheckpointTest, RoundTripOfTheEditorOpens) {
  for (const RandomFormat format : {RandomFormat::kBf16, RandomFormat::kW8a8}) {
    EditedCheckpoint edited(format);
    edited.Save();
    EXPECT_EQ(edited.Refusal(), "");
  }
}

TEST(CheckpointTest, TheFlagMustAgree) {
  EditedCheckpoint int8(RandomFormat::kW8a8);
  EXPECT_NAMES(int8.Refusal("fp8"), "quantization fp8 is asked for", "ModelSlim W8A8");
  EXPECT_NAMES(int8.Refusal("int3"), "quantization int3: known are ascend");
  EditedCheckpoint bf16(RandomFormat::kBf16);
  EXPECT_NAMES(bf16.Refusal("ascend"), "quantization ascend is asked for", "are bf16");
  bf16.Replace("config.json", "{", "{\"quantization_config\": {\"quant_method\": \"ascend\"},");
  EXPECT_NAMES(bf16.Refusal(), "quant_method is ascend, but the tensors are bf16");
}

TEST(CheckpointTest, OtherFormatsAreRefusedByName) {
  EditedCheckpoint bf16(RandomFormat::kBf16);
  for (const char* method : {"fp8", "blockwise_int8", "compressed-tensors", "w8a8_int8", "golden-stick"}) {
    const std::string text = bf16.Text("config.json");
    bf16.Replace("config.json", "{",
                 std::string("{\"quantization_config\": {\"quant_method\": \"") + method + "\"},");
    EXPECT_NAMES(bf16.Refusal(), "quant_method is " + std::string(method) + ": not supported");
    bf16.SetText("config.json", text);
  }
  const auto with = [](const std::string& name, Tensor tensor) {
    EditedCheckpoint edited(RandomFormat::kBf16);
    edited.main[name] = std::move(tensor);
    edited.Save();
    return edited.Refusal();
  };
  EXPECT_NAMES(with("model.tok_embeddings.embedding_weight", Zeros(Dtype::kBf16, {4})),
               "golden-stick export");
  EXPECT_NAMES(with(kQA + ".weight", Zeros(Dtype::kFp8E4m3, {41, 96})), kQA, "FP8", "model.safetensors");
  EXPECT_NAMES(with(kQA + ".weight_scale_inv", Zeros(Dtype::kFp32, {1, 1})), "block-quantised");
  EXPECT_NAMES(with(kQA + ".weight", Zeros(Dtype::kInt8, {41, 96})), "channel INT8");
  bf16.SetText("x_name_map.json", "{}");
  EXPECT_NAMES(bf16.Refusal(), "golden-stick export");
}

TEST(CheckpointTest, MissingAndSurplusTensors) {
  for (const std::string name :
       {"lm_head.weight", "model.norm.weight", "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.mlp.gate.e_score_correction_bias", "model.layers.1.mlp.experts.8.up_proj.weight"}) {
    EditedCheckpoint edited(RandomFormat::kBf16);
    edited.main.erase(name);
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), "tensor " + name + " is missing", edited.folder());
  }
  for (const std::string name :
       {"model.layers.1.input_layernorm.bias", "model.layers.1.mlp.experts.9.up_proj.weight", "model.extra",
        "model.layers.1.self_attn.q_a_proj.weight_scale", "model.layers.4.enorm.weight"}) {
    EditedCheckpoint edited(RandomFormat::kBf16);
    edited.main[name] = Zeros(Dtype::kBf16, {96});
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), "tensor " + name, "is surplus", "/model.safetensors");
  }
}

TEST(CheckpointTest, QuantisedPartsMustBeComplete) {
  for (const char* part : {".input_scale", ".input_offset", ".quant_bias"}) {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    edited.main.erase(kQA + part);
    edited.Undescribe(kQA + part);
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), "tensor " + kQA + part + " is missing");
  }
  {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    edited.main.erase(kUp + ".weight_scale");
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), kUp + ".weight is I8", "no file holds its .deq_scale", kQuantFile);
  }
  EditedCheckpoint edited(RandomFormat::kW8a8);  // what is not needed at run time may be absent
  edited.main.erase(kUp + ".weight_offset");
  edited.main.erase(kQA + ".weight_offset");
  edited.main.erase(kQA + ".weight_scale");
  edited.Save();
  EXPECT_EQ(edited.Refusal(), "");
}

TEST(CheckpointTest, WrongDtypesAndShapes) {
  const auto with = [](const std::string& name, Tensor tensor) {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    edited.main[name] = std::move(tensor);
    edited.Save();
    return edited.Refusal();
  };
  EXPECT_NAMES(with("lm_head.weight", Zeros(Dtype::kFp32, {331, 96})), kQuantFile,
               "lm_head.weight is F32, BF16");
  EXPECT_NAMES(with("lm_head.weight", Zeros(Dtype::kBf16, {330, 96})),
               "shape [330, 96], [331, 96] is wanted");
  EXPECT_NAMES(with(kQA + ".weight", Zeros(Dtype::kInt8, {96, 41})), kQA + ".weight has shape [96, 41]");
  EXPECT_NAMES(with(kQA + ".quant_bias", Zeros(Dtype::kFp32, {41})), ".quant_bias is F32, I32 is wanted");
  EXPECT_NAMES(with(kQA + ".input_scale", Zeros(Dtype::kFp32, {2})), "shape [2], [1] or [96] is wanted");
  EXPECT_NAMES(with(kQA + ".deq_scale", Zeros(Dtype::kFp16, {41})), "is F16, F32 or I64 is wanted");
  EXPECT_NAMES(with("model.layers.1.self_attn.kv_b_proj.weight", Zeros(Dtype::kInt8, {294, 38})),
               "is I8, BF16");
  EXPECT_EQ(with(kQA + ".deq_scale", Zeros(Dtype::kInt64, {41})), "");
  EXPECT_EQ(with(kQA + ".input_scale", Zeros(Dtype::kBf16, {96})), "");
  EXPECT_EQ(with(kQA + ".input_offset", Zeros(Dtype::kInt8, {1})), "");
  EXPECT_EQ(with(kUp + ".weight_scale", Zeros(Dtype::kBf16, {48, 1})), "");
  EXPECT_EQ(with("model.layers.1.mlp.gate.weight", Zeros(Dtype::kFp32, {9, 96})), "");
}

TEST(CheckpointTest, TheDescriptionMustAgree) {
  const auto after = [](const std::string& from, const std::string& to) {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    edited.Replace(EditedCheckpoint::kDescription, from, to);
    return edited.Refusal();
  };
  EXPECT_NAMES(after(kQA + ".weight\": \"W8A8\"", kQA + ".weight\": \"FLOAT\""),
               "quant_model_description.json", kQA + ".weight as FLOAT", kQuantFile, "as W8A8");
  EXPECT_NAMES(after(kQA + ".weight\": \"W8A8\"", kQA + ".weight\": \"W4A8_DYNAMIC\""), "is W4A8_DYNAMIC");
  EXPECT_NAMES(after(kUp + ".weight\": \"W8A8_DYNAMIC\"", kUp + ".weight\": \"W8A8\""), "as W8A8, but");
  EXPECT_NAMES(after("lm_head.weight\": \"FLOAT\"", "lm_head.weight\": \"W8A8\""), "lm_head.weight as W8A8");
  EXPECT_NAMES(after("lm_head.weight\": \"FLOAT\"", "lm_head.weight\": 8"), "lm_head.weight is 8");
  EXPECT_NAMES(after("{", "{\"model.layers.0.self_attn.fa_q.scale\": \"FLOAT\","),
               "fa_q.scale, which no file");
  EXPECT_NAMES(after("\"" + kUp + ".weight\":", "\"x\":"), "does not describe the linear " + kUp);
  {
    EditedCheckpoint edited(RandomFormat::kW8a8);  // described as W8A8, but the tensor is bf16
    edited.main[kQA + ".weight"] = Zeros(Dtype::kBf16, {41, 96});
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), kQA + ".weight as W8A8", kQuantFile, "as FLOAT");
  }
  EditedCheckpoint edited(RandomFormat::kW8a8);
  edited.SetText("quantization_description.json", "{}");
  EXPECT_NAMES(edited.Refusal(), "two quantisation descriptions");
}

TEST(CheckpointTest, SchemesMayDifferButNotWithinAPackedGroup) {
  {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    MakeFloat(edited, kQA);
    MakeFloat(edited, "model.layers.0.mlp.down_proj");
    edited.Save();
    const auto checkpoint = edited.Open();
    ASSERT_TRUE(checkpoint) << checkpoint.error().message;
    EXPECT_EQ(checkpoint->SchemeOf(kQA), Scheme::kBf16);
    EXPECT_EQ(checkpoint->SchemeOf("model.layers.0.mlp.up_proj"), Scheme::kInt8Dynamic);
  }
  for (const std::string& linear : {std::string("model.layers.0.mlp.gate_proj"), kUp,
                                    std::string("model.layers.2.mlp.experts.8.down_proj")}) {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    MakeFloat(edited, linear);
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), linear, "packed with it", kQuantFile);
  }
}

TEST(CheckpointTest, BetaNeedsAStaticConsumer) {
  EditedCheckpoint edited(RandomFormat::kW8a8);
  MakeFloat(edited, kQA);
  edited.Save();
  EXPECT_EQ(edited.Refusal(), "") << "kv_a still reads it";
  MakeFloat(edited, "model.layers.1.self_attn.kv_a_proj_with_mqa");
  edited.Save();
  EXPECT_NAMES(edited.Refusal(), "model.layers.1.input_layernorm.bias", "is surplus");
}

TEST(CheckpointTest, IndexesMustBeTrue) {
  const auto after = [](const std::string& from, const std::string& to) {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    edited.Replace(EditedCheckpoint::kQuantIndex, from, to);
    return edited.Refusal();
  };
  const std::string entry = "\"lm_head.weight\": \"quant_model_weight_w8a8_dynamic.safetensors\"";
  EXPECT_NAMES(after(entry, "\"lm_head.weight\": \"mtp.safetensors\""), "names", "mtp.safetensors",
               "lm_head.weight");
  EXPECT_NAMES(after(entry, "\"lm_head.weight\": \"gone.safetensors\""), "names the file gone.safetensors");
  EXPECT_NAMES(after(entry, "\"lm_head.weight\": \"../x.safetensors\""), "../x.safetensors",
               "of this folder");
  EXPECT_NAMES(after(entry, "\"lm_head.weight\": 3"), "lies in 3");
  EXPECT_NAMES(after("\"lm_head.weight\"", "\"lm_head.weights\""), "tensor lm_head.weights");
  EXPECT_NAMES(after("weight_map", "weights"), "weight_map is missing");
  EXPECT_NAMES(after("{", "{{"), "not valid JSON", EditedCheckpoint::kQuantIndex);
  {
    EditedCheckpoint edited(RandomFormat::kW8a8);  // one tensor, two files
    edited.mtp["lm_head.weight"] = edited.main["lm_head.weight"];
    edited.Save();
    edited.Replace(EditedCheckpoint::kPlainIndex, "\"lm_head.weight\": \"mtp.safetensors\",\n", "");
    EXPECT_NAMES(edited.Refusal(), "lm_head.weight lies in two files", "mtp.safetensors",
                 "quant_model_weight");
  }
  EditedCheckpoint edited(RandomFormat::kW8a8);  // in a file, in no index
  edited.main["model.norm.bias"] = Zeros(Dtype::kBf16, {96});
  edited.Save();
  edited.Replace(EditedCheckpoint::kQuantIndex, ",\n  \"model.norm.weight\"", "\n ,\"model.norm.weight\"");
  edited.Replace(EditedCheckpoint::kQuantIndex,
                 "\"model.norm.bias\": \"quant_model_weight_w8a8_dynamic.safetensors\"\n ,", "");
  EXPECT_NAMES(edited.Refusal(), "model.norm.bias is surplus: no index names it", kQuantFile);
}

TEST(CheckpointTest, TheRightIndexWins) {
  EditedCheckpoint edited(RandomFormat::kW8a8);
  edited.mtp["model.norm.weight"] = Zeros(Dtype::kBf16, {96});  // quantised index wins: main layers
  edited.main["model.layers.3.enorm.weight"] = Zeros(Dtype::kBf16, {96});  // plain index wins: MTP
  edited.Save();
  const auto checkpoint = edited.Open();
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_TRUE(checkpoint->Entry("model.norm.weight").file.ends_with(kQuantFile));
  EXPECT_TRUE(checkpoint->Entry("model.layers.3.enorm.weight").file.ends_with("/mtp.safetensors"));
}

TEST(CheckpointTest, TheMtpLayerIsCheckedWhole) {
  {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    edited.mtp.erase("model.layers.3.eh_proj.weight");
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), "tensor model.layers.3.eh_proj.weight is missing");
  }
  {
    EditedCheckpoint edited(RandomFormat::kW8a8);
    edited.mtp["model.layers.3.self_attn.o_proj.weight"] = Zeros(Dtype::kInt8, {96, 144});
    edited.Save();
    EXPECT_NAMES(edited.Refusal(), "model.layers.3.self_attn.o_proj.weight is I8, BF16", "/mtp.safetensors");
  }
  EditedCheckpoint edited(RandomFormat::kBf16);  // a converter may have dropped it
  std::erase_if(edited.main, [](const auto& tensor) { return tensor.first.starts_with("model.layers.3."); });
  edited.Save();
  const auto checkpoint = edited.Open();
  ASSERT_TRUE(checkpoint) << checkpoint.error().message;
  EXPECT_FALSE(checkpoint->has_mtp());
}

TEST(CheckpointTest, FoldersWithoutIndex) {
  EditedCheckpoint edited(RandomFormat::kBf16);
  std::filesystem::remove(edited.folder() + "/model.safetensors.index.json");
  EXPECT_EQ(edited.Refusal(), "");
  std::filesystem::copy_file(edited.folder() + "/model.safetensors", edited.folder() + "/more.safetensors");
  EXPECT_NAMES(edited.Refusal(), "2 .safetensors files and no index");
  std::filesystem::remove(edited.folder() + "/model.safetensors");
  std::filesystem::remove(edited.folder() + "/more.safetensors");
  EXPECT_NAMES(edited.Refusal(), "holds no .safetensors file");
  EXPECT_FALSE(Checkpoint::Open("/nowhere", LoadModelConfig(kTinyR1).value()));
}

TEST(CheckpointTest, TruncatedShard) {
  EditedCheckpoint edited(RandomFormat::kBf16);
  std::filesystem::resize_file(edited.folder() + "/model.safetensors", 500'000);
  EXPECT_NAMES(edited.Refusal(), "/model.safetensors", "do not lie in the file's");
}

TEST(CheckpointTest, ReadsFloatsOfEveryWidth) {
  EditedCheckpoint edited(RandomFormat::kBf16);
  const std::string norm = "model.layers.0.input_layernorm.weight";
  std::vector<uint16_t> half(96, 0x3C00);  // 1
  half[1] = 0xC580;                        // -5.5
  half[2] = 0x0001;                        // 2^-24
  half[3] = 0x8000;                        // -0
  half[4] = 0x7BFF;                        // 65504
  edited.main[norm] = EditedCheckpoint::Make(Dtype::kFp16, {96}, half);
  edited.Save();
  const auto values = edited.Open()->ReadFloats(norm).value();
  EXPECT_EQ(values[0], 1);
  EXPECT_EQ(values[1], -5.5f);
  EXPECT_EQ(values[2], 0x1p-24f);
  EXPECT_TRUE(std::signbit(values[3]));
  EXPECT_EQ(values[4], 65504);
  EditedCheckpoint::Set<uint16_t>(edited.main[norm], 7, 0x7C00);  // infinity
  edited.Save();
  const auto infinite = edited.Open()->ReadFloats(norm);
  ASSERT_FALSE(infinite);
  EXPECT_NAMES(infinite.error().message, norm, "value 7 is inf", "/model.safetensors");
}

}  // namespace
}  // namespace tessera
