// Plans every tensor, lays out the shards, then fills them by rows with all cores.
#include "model/random_checkpoint.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "model/checkpoint_texts.h"
#include "model/gguf_model.h"
#include "model/jobs.h"
#include "model/random_tensor.h"
#include "model/shard_writer.h"
#include "model/tensor_table.h"

namespace tessera {
namespace {

using kernels::Bf16;

constexpr int64_t kChunkElements = int64_t{1} << 20;  // of a tensor, made by one job
constexpr double kRouterBiasDeviation = 0.01;
constexpr double kNormDeviation = 0.1;
constexpr double kBetaDeviation = 0.05;

// How an attention linear quantises its input. Norm outputs have unit scale: a range of 8 holds +-4
// deviations, so that few values saturate. Attention outputs are averages of unit values: 6. Zero points are
// arbitrary but not 0.
struct InputRange {
  float scale;
  float offset;
};
constexpr InputRange kNormInput = {8.0f / 255.0f, 5};
constexpr InputRange kQueryInput = {8.0f / 255.0f, -9};
constexpr InputRange kOutputInput = {6.0f / 255.0f, 7};

enum class Form { kFloat, kStatic, kDynamic };

struct Work {
  ModelTensor tensor;
  Form form = Form::kFloat;
  const ShardWriter* writer = nullptr;
  int64_t rows() const { return tensor.shape[0]; }
  int64_t columns() const { return tensor.shape.size() > 1 ? tensor.shape[1] : 1; }
  std::string linear() const {
    return tensor.name.substr(0, tensor.name.size() - std::string_view(".weight").size());
  }
};

template <typename T>
std::span<const std::byte> Bytes(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

class RandomWriter {
 public:
  explicit RandomWriter(const RandomCheckpointOptions& options)
      : options_(options), config_(options.config) {}

  Result<RandomCheckpointSize> Run(const std::string& folder, const Progress& progress);

 private:
  bool w8a8() const { return options_.format == RandomFormat::kW8a8; }
  void Plan();
  void PlanFloat(ModelTensor tensor, ShardWriter& writer);
  void PlanLinear(ModelTensor tensor, Form form);
  void PlanBeta(const std::string& norm, int size);
  void Describe(const std::string& tensor, std::string_view kind) {
    description_ += Format(",\n \"{}\": \"{}\"", tensor, kind);
  }
  Status CreateFiles(const std::string& folder);
  Status WriteTokenizer(const std::string& folder) const;

  Status WriteRows(const Work& work, int64_t first_row, int64_t num_rows) const;
  Status WriteMatrixRows(const Work& work, int64_t first_row, std::span<const float> values) const;
  Status WriteInt8Rows(const Work& work, int64_t first_row, int64_t num_rows) const;
  int64_t JobRows(const Work& work) const;
  bool InGguf(const Work& work) const { return gguf_ && gguf_->Has(work.tensor.name); }
  RandomTensor Source(const Work& work) const;
  std::vector<float> Beta(const std::string& linear, int64_t size) const;

  const RandomCheckpointOptions& options_;
  const ModelConfig& config_;
  ShardWriter main_, mtp_;
  std::optional<GgufModel> gguf_;
  std::vector<Work> works_;
  std::string description_;
  RandomCheckpointSize size_;
};

// The smallest power of two that is not below x > 0.
float PowerOfTwoAbove(double x) {
  int exponent = 0;
  const double significand = std::frexp(x, &exponent);  // in [0.5, 1)
  return static_cast<float>(std::ldexp(1.0, significand == 0.5 ? exponent - 1 : exponent));
}

float RoundToBf16(float x) {
  return kernels::ToFloat(kernels::ToBf16(x));
}

// The norm whose output, shifted by its bias, is the input of an attention linear; empty for o_proj.
std::string NormOf(const std::string& linear) {
  const std::string layer = linear.substr(0, linear.find("self_attn."));
  if (linear.ends_with(".q_b_proj")) return layer + "self_attn.q_a_layernorm";
  return linear.ends_with(".o_proj") ? "" : layer + "input_layernorm";
}

InputRange RangeOf(const std::string& linear) {
  if (linear.ends_with(".q_b_proj")) return kQueryInput;
  return linear.ends_with(".o_proj") ? kOutputInput : kNormInput;
}

void RandomWriter::PlanFloat(ModelTensor tensor, ShardWriter& writer) {
  writer.Add(tensor.name, tensor.kind == TensorKind::kRouterBias ? Dtype::kFp32 : Dtype::kBf16, tensor.shape);
  Describe(tensor.name, "FLOAT");
  works_.push_back({std::move(tensor), Form::kFloat, &writer});
}

void RandomWriter::PlanLinear(ModelTensor tensor, Form form) {
  const int64_t rows = tensor.shape[0];
  const std::string_view kind = form == Form::kStatic ? "W8A8" : "W8A8_DYNAMIC";
  Work work{std::move(tensor), form, &main_};
  const auto add = [&](std::string_view suffix, Dtype dtype, std::vector<int64_t> shape) {
    const std::string name = work.linear() + std::string(suffix);
    main_.Add(name, dtype, std::move(shape));
    Describe(name, kind);
  };
  add(".weight", Dtype::kInt8, work.tensor.shape);
  if (form == Form::kStatic) {
    add(".input_scale", Dtype::kFp32, {1});
    add(".input_offset", Dtype::kFp32, {1});
    add(".quant_bias", Dtype::kInt32, {rows});
    add(".deq_scale", Dtype::kFp32, {rows});
  }
  add(".weight_scale", Dtype::kFp32, {rows, 1});
  add(".weight_offset", Dtype::kFp32, {rows, 1});  // stays zero
  works_.push_back(std::move(work));
}

// A bias is made as the tensor that it is; RandomWriter::Beta gives linears the same values.
void RandomWriter::PlanBeta(const std::string& norm, int size) {
  main_.Add(norm + ".bias", Dtype::kBf16, {size});
  Describe(norm + ".bias", "FLOAT");
  works_.push_back({{norm + ".bias", {size}, TensorKind::kNorm}, Form::kFloat, &main_});
}

void RandomWriter::Plan() {
  for (ModelTensor& tensor : MainTensors(config_)) {
    uint64_t count = 1;
    for (const int64_t size : tensor.shape) count *= static_cast<uint64_t>(size);
    size_.num_parameters += count;
    if (!w8a8() || tensor.kind != TensorKind::kLinear) {
      PlanFloat(std::move(tensor), main_);
    } else {
      const bool attention = tensor.name.find(".self_attn.") != std::string::npos;
      PlanLinear(std::move(tensor), attention ? Form::kStatic : Form::kDynamic);
    }
  }
  for (int layer = 0; w8a8() && layer < config_.num_layers; ++layer) {
    PlanBeta(LayerPrefix(layer) + "input_layernorm", config_.hidden_size);
    PlanBeta(LayerPrefix(layer) + "self_attn.q_a_layernorm", config_.q_lora_rank);
  }
  for (int i = 0; i < config_.num_nextn_predict_layers; ++i) {
    for (ModelTensor& tensor : MtpTensors(config_, config_.num_layers + i)) {
      PlanFloat(std::move(tensor), w8a8() ? mtp_ : main_);
    }
  }
}

Status RandomWriter::CreateFiles(const std::string& folder) {
  constexpr const char* kPlainIndex = "model.safetensors.index.json";
  const uint64_t limit = options_.max_shard_bytes;
  RETURN_IF_ERROR(WriteFile(folder + "/config.json", ConfigText(config_)));
  RETURN_IF_ERROR(WriteFile(folder + "/generation_config.json", GenerationConfigText(config_)));
  RETURN_IF_ERROR(WriteTokenizer(folder));
  if (!w8a8()) return main_.Create(folder, "model", kPlainIndex, limit);
  RETURN_IF_ERROR(WriteFile(folder + "/quant_model_description.json",
                            "{\n \"model_quant_type\": \"W8A8_DYNAMIC\"" + description_ + "\n}\n"));
  const std::string stem = "quant_model_weight_w8a8_dynamic";
  RETURN_IF_ERROR(main_.Create(folder, stem, stem + ".index.json", limit));
  return mtp_.empty() ? Status() : mtp_.Create(folder, "mtp", kPlainIndex, limit);
}

// The highest id of a tokenizer.json.
Result<int64_t> HighestId(const std::string& path) {
  ASSIGN_OR_RETURN(const JsonValue root, ReadJsonFile(path));
  const JsonValue* model = root.Find("model");
  const JsonValue* vocabulary = model == nullptr ? nullptr : model->Find("vocab");
  const JsonValue* added = root.Find("added_tokens");
  if (vocabulary == nullptr || !vocabulary->is_object() || added == nullptr) {
    return Invalid("{}: no model.vocab object or no added_tokens: not a BPE tokenizer", path);
  }
  int64_t highest = -1;
  for (const JsonMember& token : vocabulary->members()) highest = std::max(highest, token.value.integer());
  for (const JsonValue& token : added->items()) {
    if (const JsonValue* id = token.Find("id"); id != nullptr) highest = std::max(highest, id->integer());
  }
  return highest;
}

Status RandomWriter::WriteTokenizer(const std::string& folder) const {
  const std::string& source = options_.tokenizer_folder;
  int64_t num_tokens = kByteTokenizerSize;
  if (!source.empty()) {
    ASSIGN_OR_RETURN(const int64_t highest, HighestId(source + "/tokenizer.json"));
    num_tokens = highest + 1;
  }
  if (num_tokens > config_.vocab_size) {
    return Invalid("vocab_size is {}, the {} tokenizer needs at least {}", config_.vocab_size,
                   source.empty() ? "byte-level" : source, num_tokens);
  }
  if (source.empty()) {
    RETURN_IF_ERROR(WriteFile(folder + "/tokenizer.json", ByteTokenizerText()));
    return WriteFile(folder + "/tokenizer_config.json", ByteTokenizerConfigText());
  }
  constexpr std::array<std::string_view, 4> kFiles = {"tokenizer.json", "tokenizer_config.json",
                                                      "special_tokens_map.json", "chat_template.jinja"};
  for (const std::string_view name : kFiles) {
    const std::string path = Format("{}/{}", source, name);
    if (!FileExists(path) && !name.starts_with("tokenizer")) continue;
    ASSIGN_OR_RETURN(const std::string content, ReadFile(path));
    RETURN_IF_ERROR(WriteFile(Format("{}/{}", folder, name), content));
  }
  return {};
}

// The MTP layer's embedding and head are the main model's.
RandomTensor RandomWriter::Source(const Work& work) const {
  std::string_view name = work.tensor.name;
  if (name.ends_with(".embed_tokens.weight")) name = "model.embed_tokens.weight";
  if (name.ends_with(".shared_head.head.weight")) name = "lm_head.weight";
  double deviation = 1 / std::sqrt(static_cast<double>(work.columns()));
  if (name == "model.embed_tokens.weight") deviation = options_.embedding_deviation;
  if (work.tensor.kind == TensorKind::kRouterBias) deviation = kRouterBiasDeviation;
  if (work.tensor.kind == TensorKind::kNorm) deviation = options_.noise ? kNormDeviation : 0;
  if (name.ends_with(".bias")) deviation = kBetaDeviation;
  return RandomTensor(options_.seed, name, deviation);
}

Status RandomWriter::WriteRows(const Work& work, int64_t first_row, int64_t num_rows) const {
  if (work.form != Form::kFloat) return WriteInt8Rows(work, first_row, num_rows);
  std::vector<float> values(static_cast<size_t>(num_rows * work.columns()));
  const int64_t first = first_row * work.columns();
  Source(work).Fill(static_cast<uint64_t>(first), values);
  if (work.tensor.kind == TensorKind::kMatrix && w8a8()) return WriteMatrixRows(work, first_row, values);
  const bool is_bias = work.tensor.kind == TensorKind::kRouterBias;
  const bool is_norm_weight = work.tensor.kind == TensorKind::kNorm && work.tensor.name.ends_with(".weight");
  std::vector<Bf16> rounded;
  for (float& value : values) {
    if (is_bias) break;
    rounded.push_back(kernels::ToBf16(is_norm_weight ? 1 + value : value));
    value = kernels::ToFloat(rounded.back());
  }
  if (InGguf(work)) RETURN_IF_ERROR(gguf_->WriteFloats(work.tensor.name, first, values));
  const auto bytes = is_bias ? Bytes(values) : Bytes(rounded);
  return work.writer->Write(work.tensor.name, static_cast<uint64_t>(first) * (is_bias ? 4 : 2), bytes);
}

// A matrix that W8A8 leaves bf16: int8 codes times one power of two for all of it, so that a row, or a column
// (attn_k_b has kv_b transposed), is exact in bf16 and in Q8_0.
Status RandomWriter::WriteMatrixRows(const Work& work, int64_t first_row,
                                     std::span<const float> values) const {
  const float scale = PowerOfTwoAbove(Source(work).largest() / 127);
  std::vector<int8_t> codes(values.size());
  std::vector<Bf16> rounded(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    codes[i] = static_cast<int8_t>(std::rint(values[i] / scale));
    rounded[i] = kernels::ToBf16(static_cast<float>(codes[i]) * scale);
  }
  if (InGguf(work)) {
    const std::vector<float> scales(values.size() / static_cast<size_t>(work.columns()), scale);
    RETURN_IF_ERROR(gguf_->WriteRows(work.tensor.name, first_row, codes, scales));
  }
  return work.writer->Write(work.tensor.name, static_cast<uint64_t>(first_row * work.columns()) * 2,
                            Bytes(rounded));
}

std::vector<float> RandomWriter::Beta(const std::string& linear, int64_t size) const {
  std::vector<float> beta(static_cast<size_t>(size), 0.0f);
  const std::string norm = NormOf(linear);
  if (norm.empty()) return beta;
  RandomTensor(options_.seed, norm + ".bias", kBetaDeviation).Fill(0, beta);
  for (float& value : beta) value = RoundToBf16(value);
  return beta;
}

// Quantises rows of the bf16 model, symmetric per row, by scales that fp16 holds. A static linear's bias
// undoes the shift of its input: quant_bias = rint(-(sum q * beta) / s_in) - z_in * sum q.
Status RandomWriter::WriteInt8Rows(const Work& work, int64_t first_row, int64_t num_rows) const {
  const auto columns = static_cast<size_t>(work.columns());
  const auto count = static_cast<size_t>(num_rows);
  const auto first = static_cast<uint64_t>(first_row);
  const std::string linear = work.linear();
  const bool is_static = work.form == Form::kStatic;
  const InputRange range = RangeOf(linear);
  const std::vector<float> beta =
      is_static ? Beta(linear, work.columns()) : std::vector<float>(columns, 0.0f);
  std::vector<float> row(columns);
  std::vector<int8_t> quantised(count * columns);
  std::vector<float> scales(count);
  std::vector<float> deq_scales(count);
  std::vector<int32_t> biases(count);
  const RandomTensor source = Source(work);
  for (size_t n = 0; n < count; ++n) {
    source.Fill((first + n) * columns, row);
    float largest = 0;
    for (float& value : row) {
      value = RoundToBf16(value);
      largest = std::max(largest, std::abs(value));
    }
    scales[n] = RoundUpToFp16(largest / 127.0f);
    double shift = 0;
    int64_t total = 0;
    for (size_t k = 0; k < columns; ++k) {
      const float q = std::clamp(std::rint(row[k] / scales[n]), -127.0f, 127.0f);
      quantised[n * columns + k] = static_cast<int8_t>(q);
      shift += static_cast<double>(q) * static_cast<double>(beta[k]);
      total += static_cast<int64_t>(q);
    }
    deq_scales[n] = scales[n] * range.scale;
    biases[n] = static_cast<int32_t>(std::rint(-shift / static_cast<double>(range.scale))) -
                static_cast<int32_t>(range.offset) * static_cast<int32_t>(total);
  }
  if (InGguf(work)) RETURN_IF_ERROR(gguf_->WriteRows(work.tensor.name, first_row, quantised, scales));
  RETURN_IF_ERROR(work.writer->Write(linear + ".weight", first * columns, Bytes(quantised)));
  RETURN_IF_ERROR(work.writer->Write(linear + ".weight_scale", first * 4, Bytes(scales)));
  if (!is_static) return {};
  RETURN_IF_ERROR(work.writer->Write(linear + ".input_scale", 0, Bytes(std::vector<float>{range.scale})));
  RETURN_IF_ERROR(work.writer->Write(linear + ".input_offset", 0, Bytes(std::vector<float>{range.offset})));
  RETURN_IF_ERROR(work.writer->Write(linear + ".quant_bias", first * 4, Bytes(biases)));
  return work.writer->Write(linear + ".deq_scale", first * 4, Bytes(deq_scales));
}

// Rows of one job: whole heads of kv_b, as GgufModel wants them.
int64_t RandomWriter::JobRows(const Work& work) const {
  const int64_t rows = std::max<int64_t>(1, kChunkElements / work.columns());
  if (!work.tensor.name.ends_with(".kv_b_proj.weight")) return rows;
  const int64_t head_rows = config_.qk_nope_head_dim + config_.v_head_dim;
  return (rows + head_rows - 1) / head_rows * head_rows;
}

Result<RandomCheckpointSize> RandomWriter::Run(const std::string& folder, const Progress& progress) {
  Plan();
  RETURN_IF_ERROR(CreateFiles(folder));
  if (!options_.gguf.empty()) {
    ASSIGN_OR_RETURN(GgufModel gguf, GgufModel::Create(options_.gguf, config_));
    gguf_.emplace(std::move(gguf));
    size_.num_gguf_bytes = gguf_->num_bytes();
  }
  std::vector<Job> jobs;
  for (const Work& work : works_) {
    const int64_t step = JobRows(work);
    const int64_t element_bytes = work.form == Form::kFloat ? 2 : 1;
    for (int64_t row = 0; row < work.rows(); row += step) {
      const int64_t num_rows = std::min(step, work.rows() - row);
      jobs.push_back({static_cast<uint64_t>(num_rows * work.columns() * element_bytes),
                      [this, &work, row, num_rows](int) { return WriteRows(work, row, num_rows); }});
    }
  }
  ThreadPool threads(AvailableCores());
  RETURN_IF_ERROR(RunJobs(jobs, threads, progress));
  size_.num_bytes = main_.num_bytes() + mtp_.num_bytes();
  return size_;
}

}  // namespace

Result<RandomCheckpointSize> WriteRandomCheckpoint(const std::string& folder,
                                                   const RandomCheckpointOptions& options,
                                                   const std::function<void(uint64_t, uint64_t)>& progress) {
  if (auto parsed = ParseModelConfig(ConfigText(options.config)); !parsed)
    return std::unexpected(parsed.error());
  if (!options.gguf.empty() && options.format != RandomFormat::kW8a8) {
    return Invalid("a GGUF file holds int8 weights: it comes beside the W8A8 format, not beside bf16");
  }
  std::error_code failure;
  std::filesystem::create_directories(folder, failure);
  if (failure) return Invalid("cannot create the folder {}: {}", folder, failure.message());
  const bool is_empty = std::filesystem::is_empty(folder, failure);
  if (failure) return Invalid("cannot read the folder {}: {}", folder, failure.message());
  if (!is_empty) return Invalid("the folder {} is not empty: a new or an empty one is wanted", folder);
  return RandomWriter(options).Run(folder, progress);
}

}  // namespace tessera
