// Opens the folder: indexes, description, shards; tensor_check.cc judges what they hold.
#include "model/checkpoint.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "model/tensor_check.h"
#include "model/tensor_table.h"

namespace tessera {
namespace {

constexpr std::string_view kSafetensors = ".safetensors";
constexpr std::array<std::string_view, 6> kQuantizationFlags = {
    "ascend", "golden-stick", "w8a8_int8", "blockwise_int8", "compressed-tensors", "fp8"};

// One kind of index, all its files merged: the quantised one, or the plain one.
struct Index {
  std::map<std::string, std::string, std::less<>> file_of;  // tensor -> file name
  std::map<std::string, std::string, std::less<>> said_by;  // file name -> path of the index that names it
};

struct Survey {
  Index quantised, plain;
  QuantDescription description;
  std::vector<std::string> shards;  // every .safetensors file of the folder
};

// A file of this folder: no path, nothing hidden.
bool IsShardName(std::string_view name) {
  return name.ends_with(kSafetensors) && name.find('/') == std::string_view::npos && name[0] != '.';
}

Status ReadIndex(const std::string& path, Index& index) {
  ASSIGN_OR_RETURN(const JsonValue root, ReadJsonFile(path));
  const JsonValue* map = root.Find("weight_map");
  if (map == nullptr || !map->is_object()) {
    return Invalid("{}: weight_map is {}, an object is wanted", path,
                   map == nullptr ? "missing" : map->Describe());
  }
  for (const JsonMember& member : map->members()) {
    const std::string tensor = Printable(member.key);
    if (!member.value.is_text() || !IsShardName(member.value.text())) {
      return Invalid("{}: tensor {} lies in {}, the name of a .safetensors file of this folder is wanted",
                     path, tensor, member.value.Describe());
    }
    const auto [at, added] = index.file_of.emplace(member.key, member.value.text());
    if (!added && at->second != member.value.text()) {
      return Invalid("{}: tensor {} lies in {}, but another index says {}", path, tensor, member.value.text(),
                     at->second);
    }
    index.said_by.emplace(member.value.text(), path);
  }
  return {};
}

Status ReadDescription(const std::string& path, QuantDescription& description) {
  if (!description.path.empty()) {
    return Invalid("two quantisation descriptions, {} and {}: one is wanted", description.path, path);
  }
  description.path = path;
  ASSIGN_OR_RETURN(const JsonValue root, ReadJsonFile(path));
  if (!root.is_object()) return Invalid("{} holds {}, an object is wanted", path, root.Describe());
  for (const JsonMember& member : root.members()) {
    // Other keys (version, model_quant_type, ...) describe no tensor.
    if (!member.key.starts_with("model.") && !member.key.starts_with("lm_head.")) continue;
    if (!member.value.is_text()) {
      return Invalid("{}: tensor {} is {}, a scheme's name is wanted", path, Printable(member.key),
                     member.value.Describe());
    }
    description.kinds.emplace(Printable(member.key), Printable(member.value.text()));
  }
  return {};
}

Result<Survey> SurveyFolder(const std::string& folder) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListFiles(folder));
  Survey survey;
  for (const std::string& name : names) {
    const std::string path = folder + "/" + name;
    if (name.ends_with("_name_map.json")) {
      return Invalid(
          "{}: a golden-stick export (*_name_map.json): not supported; ModelSlim W8A8 and bf16 are", path);
    }
    if (name.ends_with("index.json")) {
      const bool quantised = name.find("quant") != std::string::npos;
      RETURN_IF_ERROR(ReadIndex(path, quantised ? survey.quantised : survey.plain));
    } else if ((name.starts_with("quant_model_description") && name.ends_with(".json")) ||
               name == "quantization_description.json") {
      RETURN_IF_ERROR(ReadDescription(path, survey.description));
    } else if (IsShardName(name)) {
      survey.shards.push_back(name);
    }
  }
  if (survey.shards.empty()) return Invalid("{} holds no .safetensors file", folder);
  return survey;
}

}  // namespace

struct Checkpoint::Content {
  std::map<std::string, SafetensorsFile, std::less<>> files;  // by path, which is TensorEntry::file
  TensorMap tensors;
  CheckedTensors checked;

  Status OpenShards(const std::string& folder, Survey& survey);
  Status TakeIndex(const std::string& folder, const Index& index);
  Status RefuseUnlisted(const Index& quantised, const Index& plain) const;
  const TensorEntry& At(std::string_view tensor) const {
    const auto at = tensors.find(tensor);
    if (at == tensors.end()) CheckFailed(__FILE__, __LINE__, Format("no tensor {}", tensor));
    return at->second;
  }
};

// Takes every tensor of an index, replacing those already taken.
Status Checkpoint::Content::TakeIndex(const std::string& folder, const Index& index) {
  for (const auto& [tensor, name] : index.file_of) {
    const std::string path = folder + "/" + name;
    const TensorMap& held = files.at(path).tensors();
    const auto at = held.find(tensor);
    if (at == held.end()) {
      return Invalid("{}: names {} for tensor {}, but that file does not hold it", index.said_by.at(name),
                     path, Printable(tensor));
    }
    tensors.insert_or_assign(tensor, at->second);
  }
  return {};
}

// Every tensor of every opened file must be where an index says it is.
Status Checkpoint::Content::RefuseUnlisted(const Index& quantised, const Index& plain) const {
  for (const auto& [path, file] : files) {
    const std::string name = path.substr(path.rfind('/') + 1);
    for (const auto& [tensor, entry] : file.tensors()) {
      const auto quantised_at = quantised.file_of.find(tensor);
      const auto plain_at = plain.file_of.find(tensor);
      const bool in_quantised = quantised_at != quantised.file_of.end();
      const bool in_plain = plain_at != plain.file_of.end();
      if ((in_quantised && quantised_at->second == name) || (in_plain && plain_at->second == name)) continue;
      if (in_quantised || in_plain) {
        return Invalid("{}: tensor {} lies in two files: here, and in {}, where the index says it is", path,
                       tensor, in_quantised ? quantised_at->second : plain_at->second);
      }
      return Invalid("{}: tensor {} is surplus: no index names it", path, tensor);
    }
  }
  return {};
}

Status Checkpoint::Content::OpenShards(const std::string& folder, Survey& survey) {
  const bool has_index = !survey.quantised.file_of.empty() || !survey.plain.file_of.empty();
  if (!has_index && survey.shards.size() != 1) {
    return Invalid("{} holds {} .safetensors files and no index that names them", folder,
                   survey.shards.size());
  }
  for (const std::string& name : survey.shards) {
    const std::string path = folder + "/" + name;
    if (has_index && !survey.quantised.said_by.contains(name) && !survey.plain.said_by.contains(name)) {
      LogWarning("{}: no index names this file; it is not read", path);
      continue;
    }
    ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::Open(path));
    files.emplace(path, std::move(file));
  }
  if (!has_index) {
    const auto& [path, file] = *files.begin();
    for (const auto& [tensor, entry] : file.tensors()) survey.plain.file_of[tensor] = survey.shards[0];
    survey.plain.said_by[survey.shards[0]] = path;
  }
  for (const Index* index : {&survey.plain, &survey.quantised}) {
    for (const auto& [name, said_by] : index->said_by) {
      if (files.contains(folder + "/" + name)) continue;
      return Invalid("{}: names the file {}, which {} does not hold", said_by, name, folder);
    }
  }
  return {};
}

// What was asked for, and what config.json says, must agree with what the tensors show.
static Status CheckAgreement(const std::string& folder, bool quantised, const ModelConfig& config,
                             std::string_view flag) {
  const std::string_view found = quantised ? "ModelSlim W8A8 (\"ascend\")" : "bf16";
  if (!flag.empty() && std::ranges::find(kQuantizationFlags, flag) == kQuantizationFlags.end()) {
    return Invalid("quantization {}: known are {}", Printable(flag), fmt::join(kQuantizationFlags, ", "));
  }
  if (!flag.empty() && !(flag == "ascend" && quantised)) {
    return Invalid("quantization {} is asked for, but the tensors of {} are {}", flag, folder, found);
  }
  if (config.quant_method == "ascend" && !quantised) {
    return Invalid("{}/config.json: quantization_config.quant_method is ascend, but the tensors are {}",
                   folder, found);
  }
  return {};
}

Result<Checkpoint> Checkpoint::Open(const std::string& folder, const ModelConfig& config,
                                    std::string_view quantization) {
  if (!config.quant_method.empty() && config.quant_method != "ascend") {
    return Invalid(
        "{}/config.json: quantization_config.quant_method is {}: not supported; ModelSlim W8A8 (\"ascend\") "
        "and bf16 are",
        folder, config.quant_method);
  }
  ASSIGN_OR_RETURN(Survey survey, SurveyFolder(folder));
  auto content = std::make_shared<Content>();
  RETURN_IF_ERROR(content->OpenShards(folder, survey));
  RETURN_IF_ERROR(content->TakeIndex(folder, survey.plain));
  Index main = survey.quantised;
  if (!survey.plain.file_of.empty()) {  // for the MTP layers the plain index wins
    const std::string mtp = LayerPrefix(config.num_layers);
    std::erase_if(main.file_of, [&](const auto& entry) {
      return entry.first.starts_with(mtp) && survey.plain.file_of.contains(entry.first);
    });
  }
  RETURN_IF_ERROR(content->TakeIndex(folder, main));
  RETURN_IF_ERROR(content->RefuseUnlisted(survey.quantised, survey.plain));
  ASSIGN_OR_RETURN(content->checked, CheckTensors(content->tensors, survey.description, config, folder));
  RETURN_IF_ERROR(CheckAgreement(folder, content->checked.quantised, config, quantization));
  return Checkpoint(std::move(content));
}

Scheme Checkpoint::SchemeOf(std::string_view linear) const {
  const auto at = content_->checked.schemes.find(linear);
  if (at == content_->checked.schemes.end()) CheckFailed(__FILE__, __LINE__, Format("no linear {}", linear));
  return at->second;
}

bool Checkpoint::Has(std::string_view tensor) const {
  return content_->tensors.contains(tensor);
}

const TensorEntry& Checkpoint::Entry(std::string_view tensor) const {
  return content_->At(tensor);
}

Result<std::vector<std::byte>> Checkpoint::Read(std::string_view tensor) const {
  const TensorEntry& entry = content_->At(tensor);
  std::vector<std::byte> bytes(entry.end - entry.begin);
  RETURN_IF_ERROR(content_->files.at(entry.file).Read(entry, bytes));
  return bytes;
}

Status Checkpoint::ReadPart(std::string_view tensor, uint64_t offset, std::span<std::byte> target) const {
  const TensorEntry& entry = content_->At(tensor);
  return content_->files.at(entry.file).ReadPart(entry, offset, target);
}

void Checkpoint::Prefetch(std::string_view tensor, uint64_t offset, uint64_t num_bytes) const {
  const TensorEntry& entry = content_->At(tensor);
  content_->files.at(entry.file).Prefetch(entry, offset, num_bytes);
}

Status Checkpoint::ReadRows(std::string_view tensor, int64_t row_begin, int64_t row_end, int64_t column_begin,
                            int64_t column_end, int64_t row_bytes, std::span<std::byte> target) const {
  const int64_t width = column_end - column_begin;
  if (width == row_bytes) return ReadPart(tensor, static_cast<uint64_t>(row_begin * row_bytes), target);
  for (int64_t row = row_begin; row < row_end; ++row) {
    RETURN_IF_ERROR(
        ReadPart(tensor, static_cast<uint64_t>(row * row_bytes + column_begin),
                 target.subspan(static_cast<size_t>((row - row_begin) * width), static_cast<size_t>(width))));
  }
  return {};
}

namespace {

float FromFp16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 31;
  const uint32_t mantissa = bits & 1023;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) {  // zero or denormal: mantissa * 2^-24, exact
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <typename T>
T Load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

}  // namespace

Result<std::vector<float>> Checkpoint::ReadFloats(std::string_view tensor) const {
  const TensorEntry& entry = content_->At(tensor);
  ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, Read(tensor));
  std::vector<float> values(bytes.size() / static_cast<size_t>(DtypeBytes(entry.dtype)));
  for (size_t i = 0; i < values.size(); ++i) {
    switch (entry.dtype) {
      case Dtype::kBf16:
        values[i] = std::bit_cast<float>(uint32_t{Load<uint16_t>(&bytes[2 * i])} << 16);
        break;
      case Dtype::kFp16:
        values[i] = FromFp16(Load<uint16_t>(&bytes[2 * i]));
        break;
      case Dtype::kFp32:
        values[i] = Load<float>(&bytes[4 * i]);
        break;
      default:
        return Invalid("{}: tensor {} is {}, floating point is wanted", entry.file, tensor,
                       DtypeName(entry.dtype));
    }
    if (!std::isfinite(values[i])) {
      return Invalid("{}: tensor {}: value {} is {}, finite values are wanted", entry.file, tensor, i,
                     values[i]);
    }
  }
  return values;
}

uint64_t Checkpoint::total_bytes() const {
  return content_->checked.main_bytes;
}
bool Checkpoint::has_mtp() const {
  return content_->checked.has_mtp;
}
std::string_view Checkpoint::description() const {
  return content_->checked.quantised ? "W8A8 (ModelSlim)" : "bf16";
}

}  // namespace tessera
