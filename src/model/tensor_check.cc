// The rules of ModelSlim W8A8 and of plain bf16 folders; other formats are recognised and refused by name.
#include "model/tensor_check.h"

#include <algorithm>
#include <initializer_list>
#include <set>
#include <string_view>
#include <vector>

#include "model/tensor_table.h"

namespace tessera {
namespace {

using Shape = std::vector<int64_t>;

constexpr std::string_view kWeight = ".weight";

std::string_view KindName(Scheme scheme) {
  switch (scheme) {
    case Scheme::kBf16:
      return "FLOAT";
    case Scheme::kInt8Static:
      return "W8A8";
    case Scheme::kInt8Dynamic:
      return "W8A8_DYNAMIC";
  }
  return "";
}

class TensorChecker {
 public:
  TensorChecker(const TensorMap& tensors, const QuantDescription& description, const ModelConfig& config,
                const std::string& folder)
      : tensors_(tensors), description_(description), config_(config), folder_(folder) {}

  Result<CheckedTensors> Run() {
    RETURN_IF_ERROR(RefuseOtherFormats());
    RETURN_IF_ERROR(CheckDescription());
    for (const ModelTensor& tensor : MainTensors(config_)) RETURN_IF_ERROR(CheckMain(tensor));
    for (int layer = 0; layer < config_.num_layers; ++layer) {
      RETURN_IF_ERROR(CheckBetas(layer));
      RETURN_IF_ERROR(CheckPacked(layer));
    }
    for (const std::string_view name : used_) {
      const TensorEntry& entry = tensors_.find(name)->second;
      checked_.main_bytes += entry.end - entry.begin;
    }
    RETURN_IF_ERROR(CheckMtp());
    RETURN_IF_ERROR(CheckSurplus());
    return std::move(checked_);
  }

 private:
  bool Has(std::string_view name) const { return tensors_.contains(name); }

  Status RefuseOtherFormats() const {
    bool any_deq_scale = false;
    const TensorMap::value_type* channel = nullptr;
    for (const auto& tensor : tensors_) {
      const auto& [name, entry] = tensor;
      std::string_view format;
      if (name.find("._layer.") != std::string::npos || name.starts_with("model.tok_embeddings.")) {
        format = "a golden-stick export";
      } else if (entry.dtype == Dtype::kFp8E4m3) {
        format = "an FP8 (e4m3) checkpoint";
      } else if (name.ends_with(".weight_scale_inv")) {
        format = "a block-quantised checkpoint (blockwise_int8 or fp8)";
      }
      if (!format.empty()) {
        return Invalid("{}: tensor {} belongs to {}: not supported; ModelSlim W8A8 and bf16 are", entry.file,
                       name, format);
      }
      any_deq_scale = any_deq_scale || name.ends_with(".deq_scale");
      if (entry.dtype == Dtype::kInt8 && name.ends_with(kWeight) && channel == nullptr) channel = &tensor;
    }
    if (channel != nullptr && !any_deq_scale && description_.path.empty()) {
      return Invalid(
          "{}: tensor {} is I8 without a quantisation description and without any .deq_scale: a channel "
          "INT8 checkpoint (w8a8_int8): not supported; ModelSlim W8A8 and bf16 are",
          channel->second.file, channel->first);
    }
    return {};
  }

  Status CheckDescription() const {
    const std::string mtp = LayerPrefix(config_.num_layers);
    for (const auto& [name, kind] : description_.kinds) {
      if (kind != "FLOAT" && kind != "W8A8" && kind != "W8A8_DYNAMIC") {
        return Invalid("{}: tensor {} is {}: FLOAT, W8A8 and W8A8_DYNAMIC are supported", description_.path,
                       name, kind);
      }
      const bool dispensable = name.ends_with(".weight_offset") || name.ends_with(".weight_scale");
      if (!Has(name) && !dispensable && !name.starts_with(mtp)) {
        return Invalid("{}: describes tensor {}, which no file of {} holds", description_.path, name,
                       folder_);
      }
    }
    return {};
  }

  // The described kind of a tensor, or empty.
  std::string_view Described(std::string_view name) const {
    const auto at = description_.kinds.find(name);
    return at == description_.kinds.end() ? std::string_view() : std::string_view(at->second);
  }

  // The tensor exists, with one of these dtypes and shapes, and the description agrees with `scheme`.
  Status Take(const std::string& name, std::initializer_list<Dtype> dtypes,
              std::initializer_list<Shape> shapes, Scheme scheme = Scheme::kBf16) {
    const auto at = tensors_.find(name);
    if (at == tensors_.end()) return Invalid("tensor {} is missing: no file of {} holds it", name, folder_);
    const TensorEntry& entry = at->second;
    if (std::ranges::find(dtypes, entry.dtype) == dtypes.end()) {
      std::string wanted;
      for (const Dtype dtype : dtypes)
        wanted += Format("{}{}", wanted.empty() ? "" : " or ", DtypeName(dtype));
      return Invalid("{}: tensor {} is {}, {} is wanted", entry.file, name, DtypeName(entry.dtype), wanted);
    }
    if (std::ranges::find(shapes, entry.shape) == shapes.end()) {
      return Invalid("{}: tensor {} has shape {}, {} is wanted", entry.file, name, entry.shape,
                     fmt::join(shapes, " or "));
    }
    if (const std::string_view kind = Described(name); !kind.empty() && kind != KindName(scheme)) {
      return Invalid("{}: describes tensor {} as {}, but {} holds it as {}", description_.path, name, kind,
                     entry.file, KindName(scheme));
    }
    used_.insert(at->first);
    return {};
  }

  Status TakeFloat(const ModelTensor& tensor) {
    switch (tensor.kind) {
      case TensorKind::kNorm:
        return Take(tensor.name, {Dtype::kBf16, Dtype::kFp32, Dtype::kFp16}, {tensor.shape});
      case TensorKind::kRouter:
        return Take(tensor.name, {Dtype::kBf16, Dtype::kFp32}, {tensor.shape});
      case TensorKind::kRouterBias:
        return Take(tensor.name, {Dtype::kFp32, Dtype::kBf16}, {tensor.shape});
      case TensorKind::kMatrix:
      case TensorKind::kLinear:
        break;
    }
    return Take(tensor.name, {Dtype::kBf16}, {tensor.shape});
  }

  Status CheckMain(const ModelTensor& tensor) {
    const auto at = tensors_.find(tensor.name);
    if (tensor.kind != TensorKind::kLinear || at == tensors_.end()) return TakeFloat(tensor);
    const std::string linear = tensor.name.substr(0, tensor.name.size() - kWeight.size());
    const TensorEntry& weight = at->second;
    const std::string_view kind = Described(tensor.name);
    if (!description_.path.empty() && kind.empty()) {
      return Invalid("{}: does not describe the linear {} (tensor {} of {})", description_.path, linear,
                     tensor.name, weight.file);
    }
    Scheme scheme = Scheme::kBf16;
    if (weight.dtype == Dtype::kInt8) {
      if (!Has(linear + ".deq_scale") && !Has(linear + ".weight_scale")) {
        return Invalid(
            "{}: tensor {} is I8, but no file holds its .deq_scale (static) or .weight_scale (dynamic)",
            weight.file, tensor.name);
      }
      scheme = Has(linear + ".deq_scale") ? Scheme::kInt8Static : Scheme::kInt8Dynamic;
    }
    checked_.schemes[linear] = scheme;
    checked_.quantised = checked_.quantised || scheme != Scheme::kBf16;
    switch (scheme) {
      case Scheme::kBf16:
        return TakeFloat(tensor);
      case Scheme::kInt8Static:
        return TakeStatic(linear, tensor.shape);
      case Scheme::kInt8Dynamic:
        return TakeDynamic(linear, tensor.shape);
    }
    return {};
  }

  Status TakeStatic(const std::string& linear, const Shape& shape) {
    constexpr Scheme kScheme = Scheme::kInt8Static;
    const Shape outputs = {shape[0]};
    const Shape inputs = {shape[1]};
    RETURN_IF_ERROR(Take(linear + ".weight", {Dtype::kInt8}, {shape}, kScheme));
    RETURN_IF_ERROR(Take(linear + ".input_scale", {Dtype::kFp32, Dtype::kBf16}, {{1}, inputs}, kScheme));
    RETURN_IF_ERROR(Take(linear + ".input_offset", {Dtype::kFp32, Dtype::kBf16, Dtype::kFp16, Dtype::kInt8},
                         {{1}, inputs}, kScheme));
    RETURN_IF_ERROR(Take(linear + ".quant_bias", {Dtype::kInt32}, {outputs}, kScheme));
    RETURN_IF_ERROR(Take(linear + ".deq_scale", {Dtype::kFp32, Dtype::kInt64}, {outputs}, kScheme));
    dispensable_.insert(linear + ".weight_scale");
    dispensable_.insert(linear + ".weight_offset");
    return {};
  }

  Status TakeDynamic(const std::string& linear, const Shape& shape) {
    constexpr Scheme kScheme = Scheme::kInt8Dynamic;
    RETURN_IF_ERROR(Take(linear + ".weight", {Dtype::kInt8}, {shape}, kScheme));
    RETURN_IF_ERROR(
        Take(linear + ".weight_scale", {Dtype::kFp32, Dtype::kBf16}, {{shape[0], 1}, {shape[0]}}, kScheme));
    dispensable_.insert(linear + ".weight_offset");
    return {};
  }

  // A shift belongs to the input of static linears alone: elsewhere it is a surplus tensor.
  Status CheckBetas(int layer) {
    const std::string prefix = LayerPrefix(layer);
    const auto is_static = [&](std::string_view linear) {
      return checked_.schemes.at(Format("{}self_attn.{}", prefix, linear)) == Scheme::kInt8Static;
    };
    const auto take = [&](const std::string& name, int64_t size) -> Status {
      if (!Has(name)) return {};
      return Take(name, {Dtype::kBf16, Dtype::kFp32, Dtype::kFp16}, {{size}});
    };
    if (is_static("q_a_proj") || is_static("kv_a_proj_with_mqa")) {
      RETURN_IF_ERROR(take(prefix + "input_layernorm.bias", config_.hidden_size));
    }
    if (is_static("q_b_proj")) {
      RETURN_IF_ERROR(take(prefix + "self_attn.q_a_layernorm.bias", config_.q_lora_rank));
    }
    return {};
  }

  // Members of a packed group share one scheme.
  Status CheckSame(const std::vector<std::string>& linears) const {
    const Scheme wanted = checked_.schemes.at(linears[0]);
    for (const std::string& linear : linears) {
      const Scheme scheme = checked_.schemes.at(linear);
      if (scheme == wanted) continue;
      return Invalid("{}: {} is {}, but {}, packed with it, is {}",
                     tensors_.find(linear + ".weight")->second.file, linear, KindName(scheme), linears[0],
                     KindName(wanted));
    }
    return {};
  }

  Status CheckPacked(int layer) const {
    const std::string mlp = LayerPrefix(layer) + "mlp.";
    if (!config_.IsMoe(layer)) return CheckSame({mlp + "gate_proj", mlp + "up_proj"});
    std::vector<std::string> gate_up;
    std::vector<std::string> down;
    for (int expert = 0; expert < config_.n_routed_experts; ++expert) {
      const std::string prefix = Format("{}experts.{}.", mlp, expert);
      gate_up.push_back(prefix + "gate_proj");
      gate_up.push_back(prefix + "up_proj");
      down.push_back(prefix + "down_proj");
    }
    RETURN_IF_ERROR(CheckSame(gate_up));
    RETURN_IF_ERROR(CheckSame(down));
    if (config_.n_shared_experts == 0) return {};
    return CheckSame({mlp + "shared_experts.gate_proj", mlp + "shared_experts.up_proj"});
  }

  // All or nothing: a converter may have dropped the MTP layers, whatever config.json says.
  Status CheckMtp() {
    const std::string first = LayerPrefix(config_.num_layers);
    const auto at = tensors_.lower_bound(first);
    if (config_.num_nextn_predict_layers == 0 || at == tensors_.end() || !at->first.starts_with(first))
      return {};
    for (int i = 0; i < config_.num_nextn_predict_layers; ++i) {
      for (const ModelTensor& tensor : MtpTensors(config_, config_.num_layers + i)) {
        RETURN_IF_ERROR(TakeFloat(tensor));
      }
    }
    checked_.has_mtp = true;
    return {};
  }

  Status CheckSurplus() const {
    for (const auto& [name, entry] : tensors_) {
      // inv_freq follows from config.json; old exports of the family carry it.
      if (used_.contains(name) || dispensable_.contains(name) || name.ends_with(".rotary_emb.inv_freq"))
        continue;
      return Invalid(
          "{}: tensor {} ({} {}) is surplus: the model that config.json describes has no use for it",
          entry.file, name, DtypeName(entry.dtype), entry.shape);
    }
    return {};
  }

  const TensorMap& tensors_;
  const QuantDescription& description_;
  const ModelConfig& config_;
  const std::string& folder_;
  CheckedTensors checked_;
  std::set<std::string_view> used_;  // views into tensors_
  std::set<std::string> dispensable_;
};

}  // namespace

Result<CheckedTensors> CheckTensors(const TensorMap& tensors, const QuantDescription& description,
                                    const ModelConfig& config, const std::string& folder) {
  return TensorChecker(tensors, description, config, folder).Run();
}

}  // namespace tessera
