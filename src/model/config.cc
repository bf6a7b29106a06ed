// Reads config.json and generation_config.json field by field; the first problem wins.
#include "model/config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <span>

#include "base/file.h"
#include "base/json.h"

namespace tessera {
namespace {

// Bounds of all sizes. Every product of two or three of them fits 64 bits, and a K axis stays below 65,792,
// where u8 x s8 sums leave int32 (numerics.md).
constexpr int kMaxVocab = 1 << 22;
constexpr int kMaxWidth = 1 << 16;
constexpr int kMaxLayers = 1024;
constexpr int kMaxMtpLayers = 8;
constexpr int kMaxHeads = 4096;
constexpr int kMaxHeadDim = 4096;
constexpr int kMaxRank = 1 << 14;
constexpr int kMaxExperts = 4096;
constexpr int kMaxPositions = 1 << 24;
constexpr int kNumLeaves = 16;
constexpr int kMaxTermsPerOutput = 256;
static_assert(int64_t{kMaxWidth} * 128 * 255 < INT64_C(1) << 31);

constexpr std::array<std::string_view, 6> kQuantMethods = {
    "fp8", "blockwise_int8", "compressed-tensors", "w8a8_int8", "ascend", "golden-stick"};

// Takes fields from one JSON object and keeps the first error. A field that is absent, or null, gives
// `absent` where that is set and an error otherwise.
class FieldReader {
 public:
  FieldReader(const JsonValue& object, std::string where) : object_(object), where_(std::move(where)) {}

  const JsonValue* Find(std::string_view name) const {
    const JsonValue* value = object_.Find(name);
    return value != nullptr && !value->is_null() ? value : nullptr;
  }

  int Integer(std::string_view name, int min, int max, std::optional<int> absent = std::nullopt) {
    const JsonValue* value = Find(name);
    if (value == nullptr && absent) return *absent;
    if (value == nullptr || !value->is_integer() || value->integer() < min || value->integer() > max) {
      Refuse(name, Format("a whole number from {} to {} is wanted", min, max));
      return min;
    }
    return static_cast<int>(value->integer());
  }

  double Number(std::string_view name, double min, double max, std::optional<double> absent = std::nullopt) {
    const JsonValue* value = Find(name);
    if (value == nullptr && absent) return *absent;
    if (value == nullptr || !value->is_number() || !(value->number() >= min && value->number() <= max)) {
      Refuse(name, Format("a number from {} to {} is wanted", min, max));
      return min;
    }
    return value->number();
  }

  // The field must say `wanted`, or be absent where `may_be_absent`.
  void MustBeText(std::string_view name, std::string_view wanted, bool may_be_absent) {
    const JsonValue* value = Find(name);
    if (value == nullptr && may_be_absent) return;
    if (value == nullptr || !value->is_text() || value->text() != wanted) {
      Refuse(name, Format("only \"{}\" is supported", wanted));
    }
  }
  void MustBeBool(std::string_view name, bool wanted) {
    const JsonValue* value = Find(name);
    if (value != nullptr && (value->AsBool() == nullptr || *value->AsBool() != wanted)) {
      Refuse(name, Format("only {} is supported", wanted));
    }
  }
  void MustBeAbsent(std::string_view name) {
    if (Find(name) != nullptr) Refuse(name, "not supported");
  }

  // An id or a list of ids below `limit`.
  std::vector<int32_t> Ids(std::string_view name, int limit) {
    const JsonValue* value = Find(name);
    std::vector<int32_t> ids;
    if (value == nullptr) return ids;
    const bool is_list = value->is_array();
    const std::span<const JsonValue> list = is_list ? std::span(value->items()) : std::span(value, 1);
    for (const JsonValue& id : list) {
      if (!id.is_integer() || id.integer() < 0 || id.integer() >= limit) {
        Refuse(name, Format("{} is not a token id below {}", id.Describe(), limit));
        return {};
      }
      ids.push_back(static_cast<int32_t>(id.integer()));
    }
    return ids;
  }

  void Refuse(std::string_view name, std::string_view wanted) {
    const JsonValue* value = object_.Find(name);
    Refuse(Format("{} is {}: {}", name, value == nullptr ? "missing" : value->Describe(), wanted));
  }
  void Refuse(std::string message) {
    if (!error_) error_ = Error{ErrorKind::kInvalid, Format("{}: {}", where_, message)};
  }
  const std::optional<Error>& error() const { return error_; }
  const std::string& where() const { return where_; }

 private:
  const JsonValue& object_;
  std::string where_;
  std::optional<Error> error_;
};

void CheckKind(FieldReader& fields) {
  const JsonValue* architectures = fields.Find("architectures");
  if (architectures == nullptr || architectures->items().size() != 1 ||
      architectures->items()[0].text() != "DeepseekV3ForCausalLM") {
    const bool one = architectures != nullptr && architectures->items().size() == 1;
    fields.Refuse(Format("architectures is {}: only [\"DeepseekV3ForCausalLM\"] is supported",
                         one ? "[" + architectures->items()[0].Describe() + "]"
                             : (architectures == nullptr ? "missing" : architectures->Describe())));
  }
  fields.MustBeText("model_type", "deepseek_v3", false);
  // Absent means what DeepSeek-V3's own configuration class gives: the value required here.
  fields.MustBeText("topk_method", "noaux_tc", true);
  fields.MustBeText("scoring_func", "sigmoid", true);
  fields.MustBeText("hidden_act", "silu", true);
  fields.MustBeBool("norm_topk_prob", true);
  fields.MustBeBool("attention_bias", false);
  fields.MustBeBool("mlp_bias", false);
  fields.MustBeBool("tie_word_embeddings", false);
  fields.MustBeBool("rope_interleave", true);
  fields.MustBeAbsent("sliding_window");
  fields.MustBeAbsent("index_topk");  // sparse attention of later models
  fields.Integer("moe_layer_freq", 1, 1, 1);
}

void ReadSizes(FieldReader& fields, ModelConfig& config) {
  config.vocab_size = fields.Integer("vocab_size", 1, kMaxVocab);
  config.hidden_size = fields.Integer("hidden_size", 1, kMaxWidth);
  config.num_layers = fields.Integer("num_hidden_layers", 1, kMaxLayers);
  config.num_nextn_predict_layers = fields.Integer("num_nextn_predict_layers", 0, kMaxMtpLayers, 0);
  config.num_heads = fields.Integer("num_attention_heads", 1, kMaxHeads);
  if (const int heads = fields.Integer("num_key_value_heads", 1, kMaxHeads, config.num_heads);
      heads != config.num_heads) {
    fields.Refuse("num_key_value_heads", Format("must equal num_attention_heads, {}", config.num_heads));
  }
  config.q_lora_rank = fields.Integer("q_lora_rank", 1, kMaxRank);
  config.kv_lora_rank = fields.Integer("kv_lora_rank", 2, kMaxRank);
  config.qk_nope_head_dim = fields.Integer("qk_nope_head_dim", 1, kMaxHeadDim);
  config.qk_rope_head_dim = fields.Integer("qk_rope_head_dim", 2, kMaxHeadDim);
  config.v_head_dim = fields.Integer("v_head_dim", 1, kMaxHeadDim);
  if (config.kv_lora_rank % 2 != 0) fields.Refuse("kv_lora_rank", "an even number is wanted");
  if (config.qk_rope_head_dim % 2 != 0) fields.Refuse("qk_rope_head_dim", "an even number is wanted");
  config.intermediate_size = fields.Integer("intermediate_size", 1, kMaxWidth);
  config.moe_intermediate_size = fields.Integer("moe_intermediate_size", 1, kMaxWidth);
  config.first_k_dense_replace = fields.Integer("first_k_dense_replace", 0, config.num_layers);
  config.n_routed_experts = fields.Integer("n_routed_experts", 1, kMaxExperts);
  config.n_shared_experts = fields.Integer("n_shared_experts", 0, kMaxExperts, 0);
  config.num_experts_per_tok = fields.Integer("num_experts_per_tok", 1, config.n_routed_experts);
  config.n_group = fields.Integer("n_group", 1, config.n_routed_experts);
  config.topk_group = fields.Integer("topk_group", 1, config.n_group);
  config.max_position_embeddings = fields.Integer("max_position_embeddings", 1, kMaxPositions);
  config.routed_scaling_factor = static_cast<float>(fields.Number("routed_scaling_factor", 1e-6, 1e6));
  config.rms_norm_eps = static_cast<float>(fields.Number("rms_norm_eps", 1e-12, 1));
}

void CheckRouter(FieldReader& fields, const ModelConfig& config) {
  if (config.n_routed_experts % config.n_group != 0) {
    fields.Refuse("n_group", Format("must divide n_routed_experts, {}", config.n_routed_experts));
    return;
  }
  const int group = config.n_routed_experts / config.n_group;
  if (group < 2) fields.Refuse("n_group", Format("groups of {} expert, at least 2 are wanted", group));
  if (config.topk_group * group < config.num_experts_per_tok) {
    fields.Refuse("topk_group", Format("the kept groups hold {} experts, fewer than num_experts_per_tok, {}",
                                       config.topk_group * group, config.num_experts_per_tok));
  }
  const int terms = kNumLeaves * (config.num_experts_per_tok + (config.n_shared_experts > 0 ? 1 : 0));
  if (terms > kMaxTermsPerOutput) {
    fields.Refuse("num_experts_per_tok",
                  Format("{} fixed-point terms per output ({} for each expert and the shared "
                         "one), at most {} are exact",
                         terms, kNumLeaves, kMaxTermsPerOutput));
  }
}

// The K axes of row-parallel linears are cut in 16 leaves.
void CheckLeaves(FieldReader& fields, const ModelConfig& config) {
  const auto check = [&](std::string_view what, int64_t k) {
    if (k % kNumLeaves != 0)
      fields.Refuse(Format("{} is {}: a multiple of {} is wanted", what, k, kNumLeaves));
    if (k > kMaxWidth) fields.Refuse(Format("{} is {}: at most {} is supported", what, k, kMaxWidth));
  };
  check("num_attention_heads * v_head_dim", int64_t{config.num_heads} * config.v_head_dim);
  if (config.first_k_dense_replace > 0) check("intermediate_size", config.intermediate_size);
  if (config.first_k_dense_replace < config.num_layers || config.num_nextn_predict_layers > 0) {
    check("moe_intermediate_size", config.moe_intermediate_size);
    check("n_shared_experts * moe_intermediate_size",
          int64_t{config.n_shared_experts} * config.moe_intermediate_size);
  }
}

// rope_scaling, or the newer rope_parameters, which holds rope_theta too.
void ReadRope(FieldReader& fields, ModelConfig& config) {
  config.rope_theta = fields.Number("rope_theta", 1.0001, 1e12, 10000);
  const bool old_form = fields.Find("rope_scaling") != nullptr;
  const std::string_view name = old_form ? "rope_scaling" : "rope_parameters";
  const JsonValue* object = fields.Find(name);
  if (object == nullptr) return;
  if (!object->is_object()) return fields.Refuse(name, "an object is wanted");
  constexpr std::array<std::string_view, 9> kKnown = {
      "type",   "rope_type",      "rope_theta",
      "factor", "beta_fast",      "beta_slow",
      "mscale", "mscale_all_dim", "original_max_position_embeddings"};
  FieldReader rope(*object, fields.where() + ": " + std::string(name));
  for (const JsonMember& member : object->members()) {
    if (std::ranges::find(kKnown, member.key) == kKnown.end()) rope.Refuse(member.key, "not supported");
  }
  config.rope_theta = rope.Number("rope_theta", 1.0001, 1e12, config.rope_theta);
  const JsonValue* type = rope.Find("rope_type") != nullptr ? rope.Find("rope_type") : rope.Find("type");
  if (type != nullptr && type->text() == "default") {
    rope.MustBeText("type", "default", true);
  } else {
    rope.MustBeText("rope_type", "yarn", true);
    rope.MustBeText("type", "yarn", rope.Find("rope_type") != nullptr);
    YarnConfig& yarn = config.yarn;
    yarn.factor = rope.Number("factor", 1, 1e6);
    yarn.beta_fast = rope.Number("beta_fast", 1e-3, 1e6, 32);
    yarn.beta_slow = rope.Number("beta_slow", 1e-3, 1e6, 1);
    yarn.mscale = rope.Number("mscale", 0, 1e3, 1);
    yarn.mscale_all_dim = rope.Number("mscale_all_dim", 0, 1e3, 0);
    yarn.original_max_position_embeddings =
        rope.Integer("original_max_position_embeddings", 1, kMaxPositions);
    if (yarn.beta_fast < yarn.beta_slow)
      rope.Refuse("beta_fast", Format("below beta_slow, {}", yarn.beta_slow));
  }
  if (rope.error() && !fields.error()) fields.Refuse(rope.error()->message.substr(fields.where().size() + 2));
}

void ReadQuantization(FieldReader& fields, ModelConfig& config) {
  const JsonValue* object = fields.Find("quantization_config");
  if (object == nullptr) return;
  const JsonValue* method = object->Find("quant_method");
  if (method == nullptr || !method->is_text()) {
    return fields.Refuse("quantization_config.quant_method is missing or no text");
  }
  if (std::ranges::find(kQuantMethods, method->text()) == kQuantMethods.end()) {
    return fields.Refuse(Format("quantization_config.quant_method is {}: known are {}", method->Describe(),
                                fmt::join(kQuantMethods, ", ")));
  }
  config.quant_method = method->text();
}

Result<ModelConfig> ReadConfig(std::string_view json, const std::string& where) {
  ASSIGN_OR_RETURN(const JsonValue root, ParseJson(json, where));
  if (!root.is_object()) return Invalid("{} holds {}, an object is wanted", where, root.Describe());
  FieldReader fields(root, where);
  ModelConfig config;
  CheckKind(fields);
  ReadSizes(fields, config);
  if (!fields.error()) {
    CheckRouter(fields, config);
    CheckLeaves(fields, config);
  }
  ReadRope(fields, config);
  ReadQuantization(fields, config);
  config.bos_token_id = fields.Integer("bos_token_id", 0, config.vocab_size - 1, 0);
  config.eos_token_ids = fields.Ids("eos_token_id", config.vocab_size);
  if (fields.error()) return std::unexpected(*fields.error());
  return config;
}

template <typename T>
std::optional<T> Present(const FieldReader& fields, std::string_view name, T value) {
  return fields.Find(name) != nullptr ? std::optional<T>(value) : std::nullopt;
}

}  // namespace

Result<ModelConfig> ParseModelConfig(std::string_view json) {
  return ReadConfig(json, "config.json");
}

Result<ModelConfig> LoadModelConfig(const std::string& folder) {
  const std::string path = folder + "/config.json";
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  return ReadConfig(text, path);
}

Result<GenerationDefaults> LoadGenerationDefaults(const std::string& folder) {
  const std::string path = folder + "/generation_config.json";
  GenerationDefaults defaults;
  if (!FileExists(path)) return defaults;
  ASSIGN_OR_RETURN(const JsonValue root, ReadJsonFile(path));
  if (!root.is_object()) return Invalid("{} holds {}, an object is wanted", path, root.Describe());
  FieldReader fields(root, path);
  defaults.temperature = Present(fields, "temperature", fields.Number("temperature", 0, 1e6, 0));
  defaults.top_p = Present(fields, "top_p", fields.Number("top_p", 1e-9, 1, 1));
  defaults.top_k = Present(fields, "top_k", fields.Integer("top_k", -1, kMaxVocab, 0));
  defaults.min_p = Present(fields, "min_p", fields.Number("min_p", 0, 1, 0));
  defaults.repetition_penalty =
      Present(fields, "repetition_penalty", fields.Number("repetition_penalty", 1e-6, 1e6, 1));
  defaults.max_new_tokens =
      Present(fields, "max_new_tokens", fields.Integer("max_new_tokens", 1, kMaxPositions, 1));
  defaults.eos_token_ids = fields.Ids("eos_token_id", kMaxVocab);
  if (fields.error()) return std::unexpected(*fields.error());
  return defaults;
}

}  // namespace tessera
