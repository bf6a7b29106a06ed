// The keys of the YAML that count, and what each is held against.
#include "cli/model_yaml.h"

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "base/format.h"
#include "base/json.h"
#include "cli/config_file.h"

namespace tessera::cli {
namespace {

constexpr int64_t kMaxDegree = 1 << 24;
constexpr std::array<std::string_view, 8> kOtherQuantMethods = {
    "awq-a16w4", "awq-a16w8", "gptq-perchannel", "gptq-pergroup", "smoothquant", "osl", "a16w8", "a8dynw8"};
constexpr std::array<std::string_view, 6> kTypes = {"compute_dtype",        "layernorm_compute_type",
                                                    "softmax_compute_type", "rotary_dtype",
                                                    "router_dense_type",    "param_init_type"};

// Reads one mapping of the file and keeps the first complaint. `where` is its dotted name. In YAML `None` is
// a string; here it stands for a key that is absent.
class Section {
 public:
  Section(const JsonValue* object, std::string path, std::string where, Status& status)
      : object_(object), path_(std::move(path)), where_(std::move(where)), status_(status) {
    if (object_ == nullptr || object_->is_null() || IsNone(*object_)) {
      object_ = nullptr;
    } else if (!object_->is_object()) {
      Refuse("", Format("{}, a mapping is wanted", object_->Describe()));
      object_ = nullptr;
    }
  }

  const JsonValue* Find(std::string_view key) const {
    const JsonValue* value = object_ == nullptr ? nullptr : object_->Find(key);
    return value == nullptr || value->is_null() || IsNone(*value) ? nullptr : value;
  }
  Section Sub(const std::string& key) const {
    return Section(Find(key), path_, where_.empty() ? key : where_ + "." + key, status_);
  }

  std::optional<int64_t> Degree(std::string_view key) {
    const JsonValue* value = Find(key);
    if (value == nullptr) return std::nullopt;
    if (value->is_integer() && value->integer() >= 1 && value->integer() <= kMaxDegree)
      return value->integer();
    Refuse(key, Format("{}, a whole number of at least 1 is wanted", value->Describe()));
    return std::nullopt;
  }
  bool Switch(std::string_view key) {
    const JsonValue* value = Find(key);
    if (value == nullptr) return false;
    if (value->AsBool() != nullptr) return *value->AsBool();
    Refuse(key, Format("{}, True or False is wanted", value->Describe()));
    return false;
  }
  // Equal to what config.json says, up to fp32; `field` is its name there.
  void MustEqual(std::string_view key, std::string_view field, double wanted) {
    const JsonValue* value = Find(key);
    if (value == nullptr) return;
    if (value->is_number() && static_cast<float>(value->number()) == static_cast<float>(wanted)) return;
    Refuse(key,
           Format("{}, but {} is {} in config.json: both must be the same; correct the one that is wrong",
                  value->Describe(), field, NumberText(wanted)));
  }
  void MustBeText(std::string_view key, std::string_view wanted) {
    const JsonValue* value = Find(key);
    if (value == nullptr || (value->is_text() && value->text() == wanted)) return;
    Refuse(key, Format("{}, only \"{}\" is supported", value->Describe(), wanted));
  }
  void Refuse(std::string_view key, const std::string& complaint) {
    if (!status_) return;
    status_ =
        Invalid("{}: {}{}{} is {}", path_, where_, where_.empty() || key.empty() ? "" : ".", key, complaint);
  }
  std::string Name(std::string_view key) const { return Format("{}: {}.{}", path_, where_, key); }

 private:
  static bool IsNone(const JsonValue& value) { return value.is_text() && value.text() == "None"; }
  static std::string NumberText(double value) { return Format("{}", value); }

  const JsonValue* object_;
  std::string path_, where_;
  Status& status_;
};

void CheckShapes(Section model, const ModelConfig& c) {
  struct Size {
    const char* key;
    const char* field;
    double value;
  };
  for (const Size& size :
       {Size{"hidden_size", "hidden_size", 1.0 * c.hidden_size},
        {"num_layers", "num_hidden_layers", 1.0 * c.num_layers},
        {"num_heads", "num_attention_heads", 1.0 * c.num_heads},
        {"max_position_embeddings", "max_position_embeddings", 1.0 * c.max_position_embeddings},
        {"intermediate_size", "intermediate_size", 1.0 * c.intermediate_size},
        {"kv_lora_rank", "kv_lora_rank", 1.0 * c.kv_lora_rank},
        {"q_lora_rank", "q_lora_rank", 1.0 * c.q_lora_rank},
        {"qk_rope_head_dim", "qk_rope_head_dim", 1.0 * c.qk_rope_head_dim},
        {"qk_nope_head_dim", "qk_nope_head_dim", 1.0 * c.qk_nope_head_dim},
        {"v_head_dim", "v_head_dim", 1.0 * c.v_head_dim},
        {"vocab_size", "vocab_size", 1.0 * c.vocab_size},
        {"rms_norm_eps", "rms_norm_eps", c.rms_norm_eps},
        {"theta", "rope_theta", c.rope_theta},
        {"bos_token_id", "bos_token_id", 1.0 * c.bos_token_id}}) {
    model.MustEqual(size.key, size.field, size.value);
  }
  const JsonValue* eos = model.Find("eos_token_id");
  if (eos != nullptr && eos->is_integer() &&
      std::find(c.eos_token_ids.begin(), c.eos_token_ids.end(), eos->integer()) == c.eos_token_ids.end()) {
    model.Refuse("eos_token_id", Format("{}, but eos_token_id is {} in config.json: both must be the same; "
                                        "correct the one that is wrong",
                                        eos->integer(), fmt::join(c.eos_token_ids, ", ")));
  }
}

void CheckRope(Section model, const YarnConfig& yarn) {
  if (yarn.factor != 1) {
    model.MustBeText("extend_method", "YARN");
  } else if (const JsonValue* method = model.Find("extend_method"); method != nullptr) {
    model.Refuse("extend_method",
                 Format("{}, but config.json has no rope_scaling; wanted None", method->Describe()));
  }
  const JsonValue* scaling = model.Find("scaling_factor");
  if (scaling != nullptr && scaling->is_number())
    return model.MustEqual("scaling_factor", "rope_scaling.factor", yarn.factor);
  Section rope = model.Sub("scaling_factor");
  rope.MustEqual("factor", "rope_scaling.factor", yarn.factor);
  rope.MustEqual("beta_fast", "rope_scaling.beta_fast", yarn.beta_fast);
  rope.MustEqual("beta_slow", "rope_scaling.beta_slow", yarn.beta_slow);
  rope.MustEqual("mscale", "rope_scaling.mscale", yarn.mscale);
  rope.MustEqual("mscale_all_dim", "rope_scaling.mscale_all_dim", yarn.mscale_all_dim);
  rope.MustEqual("original_max_position_embeddings", "rope_scaling.original_max_position_embeddings",
                 yarn.original_max_position_embeddings);
}

void CheckExperts(Section moe, const ModelConfig& c) {
  moe.MustEqual("expert_num", "n_routed_experts", c.n_routed_experts);
  moe.MustEqual("num_experts_chosen", "num_experts_per_tok", c.num_experts_per_tok);
  moe.MustEqual("shared_expert_num", "n_shared_experts", c.n_shared_experts);
  moe.MustEqual("routed_scaling_factor", "routed_scaling_factor", c.routed_scaling_factor);
  moe.MustEqual("first_k_dense_replace", "first_k_dense_replace", c.first_k_dense_replace);
  moe.MustEqual("moe_intermediate_size", "moe_intermediate_size", c.moe_intermediate_size);
  moe.MustEqual("topk_group", "topk_group", c.topk_group);
  moe.MustEqual("n_group", "n_group", c.n_group);
  moe.MustBeText("routing_policy", "TopkRouterV2");
  if (moe.Find("norm_topk_prob") != nullptr && !moe.Switch("norm_topk_prob"))
    moe.Refuse("norm_topk_prob", "False, but this router always normalises; wanted True");
}

bool IsQuantized(Section quantization) {
  const JsonValue* method = quantization.Find("quant_method");
  if (method == nullptr) return false;
  if (method->is_text() && method->text() == "ptq") {
    quantization.MustBeText("weight_dtype", "int8");
    quantization.MustBeText("activation_dtype", "int8");
    return true;
  }
  const bool known = method->is_text() && std::find(kOtherQuantMethods.begin(), kOtherQuantMethods.end(),
                                                    method->text()) != kOtherQuantMethods.end();
  quantization.Refuse("quant_method",
                      Format("{}, {}; supported is ptq (ModelSlim W8A8), or no quantization_config at all",
                             method->Describe(), known ? "which is not supported" : "which is not known"));
  return false;
}

void NoteTypes(const Section& model, std::vector<std::string>& notes) {
  for (const std::string_view key : kTypes) {
    const JsonValue* value = model.Find(key);
    if (value == nullptr || (value->is_text() && value->text() == "bfloat16")) continue;
    notes.push_back(Format("{} is {}: without effect, the types of docs/numerics.md hold", model.Name(key),
                           value->Describe()));
  }
}

}  // namespace

Result<ModelYaml> ReadModelYaml(const std::string& path, const ModelConfig& config) {
  ASSIGN_OR_RETURN(const std::string json, YamlFileToJson(path));
  ASSIGN_OR_RETURN(const JsonValue value, ParseJson(json, path));
  Status status;
  const Section root(&value, path, "", status);
  const Section model = root.Sub("model").Sub("model_config");
  Section parallel = root.Sub("parallel_config");
  ModelYaml yaml{.path = path};
  yaml.data_parallel = parallel.Degree("data_parallel");
  yaml.model_parallel = parallel.Degree("model_parallel");
  yaml.pipeline_stage = parallel.Degree("pipeline_stage");
  yaml.expert_parallel = parallel.Degree("expert_parallel");
  yaml.vocab_emb_dp = parallel.Switch("vocab_emb_dp");
  CheckShapes(model, config);
  CheckRope(model, config.yarn);
  // Both sections stand inside of model_config or beside it.
  for (const Section& place : {model, root}) {
    CheckExperts(place.Sub("moe_config"), config);
    yaml.is_quantized = IsQuantized(place.Sub("quantization_config")) || yaml.is_quantized;
  }
  NoteTypes(model, yaml.notes);
  if (!status) return std::unexpected(status.error());
  return yaml;
}

}  // namespace tessera::cli
