// See gguf_model.h. Names and keys are the format's own; a missing expert_gating_func would mean softmax.
#include "model/gguf_model.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "base/check.h"
#include "model/tensor_table.h"

namespace tessera {
namespace {

constexpr uint32_t kMostlyQ8 = 7;  // of general.file_type
constexpr uint32_t kQuantisationVersion = 2;
constexpr uint32_t kSigmoidGate = 2;

// What follows "model.layers.N." in a checkpoint, and "blk.N." in GGUF; below, tensors of no layer.
constexpr std::array<std::pair<std::string_view, std::string_view>, 20> kLayerNames = {{
    {"input_layernorm.weight", "attn_norm.weight"},
    {"post_attention_layernorm.weight", "ffn_norm.weight"},
    {"self_attn.q_a_proj.weight", "attn_q_a.weight"},
    {"self_attn.q_a_layernorm.weight", "attn_q_a_norm.weight"},
    {"self_attn.q_b_proj.weight", "attn_q_b.weight"},
    {"self_attn.kv_a_proj_with_mqa.weight", "attn_kv_a_mqa.weight"},
    {"self_attn.kv_a_layernorm.weight", "attn_kv_a_norm.weight"},
    {"self_attn.kv_b_proj.weight", "attn_"},
    {"self_attn.o_proj.weight", "attn_output.weight"},
    {"mlp.gate_proj.weight", "ffn_gate.weight"},
    {"mlp.up_proj.weight", "ffn_up.weight"},
    {"mlp.down_proj.weight", "ffn_down.weight"},
    {"mlp.gate.weight", "ffn_gate_inp.weight"},
    {"mlp.gate.e_score_correction_bias", "exp_probs_b.bias"},
    {"mlp.shared_experts.gate_proj.weight", "ffn_gate_shexp.weight"},
    {"mlp.shared_experts.up_proj.weight", "ffn_up_shexp.weight"},
    {"mlp.shared_experts.down_proj.weight", "ffn_down_shexp.weight"},
    {"model.embed_tokens.weight", "token_embd.weight"},
    {"model.norm.weight", "output_norm.weight"},
    {"lm_head.weight", "output.weight"},
}};

std::string_view Renamed(std::string_view name) {
  const auto at = std::ranges::find(kLayerNames, name, [](const auto& pair) { return pair.first; });
  CHECK(at != kLayerNames.end());
  return at->second;
}

// "3.up_proj.weight" is "ffn_up_exps.weight" from expert 3 on.
std::pair<std::string, int64_t> ExpertName(std::string_view name) {
  const size_t dot = name.find('.');
  const std::string_view kind = name.substr(dot + 1, name.find('_') - dot - 1);
  return {Format("ffn_{}_exps.weight", kind), std::stoll(std::string(name.substr(0, dot)))};
}

Status Check(const ModelConfig& config) {
  const auto whole = [](std::string_view name, int64_t size) -> Status {
    if (size % kGgufBlock == 0) return {};
    return Invalid("GGUF: {} is {}: Q8_0 wants a multiple of {}", name, size, kGgufBlock);
  };
  RETURN_IF_ERROR(whole("hidden_size", config.hidden_size));
  RETURN_IF_ERROR(whole("q_lora_rank", config.q_lora_rank));
  RETURN_IF_ERROR(whole("kv_lora_rank", config.kv_lora_rank));
  RETURN_IF_ERROR(whole("qk_nope_head_dim", config.qk_nope_head_dim));
  RETURN_IF_ERROR(whole("num_attention_heads * v_head_dim", int64_t{config.num_heads} * config.v_head_dim));
  RETURN_IF_ERROR(whole("intermediate_size", config.intermediate_size));
  RETURN_IF_ERROR(whole("moe_intermediate_size", config.moe_intermediate_size));
  if (config.n_shared_experts == 0) return Invalid("GGUF: n_shared_experts is 0: deepseek2 has at least 1");
  if (config.yarn.factor != 1 && config.yarn.mscale != config.yarn.mscale_all_dim) {
    return Invalid("GGUF: rope mscale is {}, mscale_all_dim {}: the format has one number for both",
                   config.yarn.mscale, config.yarn.mscale_all_dim);
  }
  return {};
}

}  // namespace

void GgufModel::AddMetadata() {
  const auto number = [this](std::string_view key, int64_t value) {
    writer_.AddUint32(Format("deepseek2.{}", key), static_cast<uint32_t>(value));
  };
  const auto real = [this](std::string_view key, double value) {
    writer_.AddFloat(Format("deepseek2.{}", key), static_cast<float>(value));
  };
  writer_.AddText("general.architecture", "deepseek2");
  writer_.AddText("general.name", "random");
  writer_.AddUint32("general.file_type", kMostlyQ8);
  writer_.AddUint32("general.quantization_version", kQuantisationVersion);
  number("block_count", config_.num_layers);
  number("context_length", config_.max_position_embeddings);
  number("embedding_length", config_.hidden_size);
  number("feed_forward_length", config_.intermediate_size);
  number("leading_dense_block_count", config_.first_k_dense_replace);
  number("expert_feed_forward_length", config_.moe_intermediate_size);
  number("expert_count", config_.n_routed_experts);
  number("expert_used_count", config_.num_experts_per_tok);
  number("expert_shared_count", config_.n_shared_experts);
  number("expert_gating_func", kSigmoidGate);
  real("expert_weights_scale", config_.routed_scaling_factor);
  writer_.AddBool("deepseek2.expert_weights_norm", true);
  if (config_.n_group > 1) {
    number("expert_group_count", config_.n_group);
    number("expert_group_used_count", config_.topk_group);
  }
  number("attention.head_count", config_.num_heads);
  number("attention.head_count_kv", 1);  // the latent is one head that all query heads share
  number("attention.q_lora_rank", config_.q_lora_rank);
  number("attention.kv_lora_rank", config_.kv_lora_rank);
  number("attention.key_length", config_.latent_width());
  number("attention.value_length", config_.kv_lora_rank);
  number("attention.key_length_mla", config_.qk_head_dim());
  number("attention.value_length_mla", config_.v_head_dim);
  real("attention.layer_norm_rms_epsilon", config_.rms_norm_eps);
  number("rope.dimension_count", config_.qk_rope_head_dim);
  real("rope.freq_base", config_.rope_theta);
  if (const YarnConfig& yarn = config_.yarn; yarn.factor != 1) {
    writer_.AddText("deepseek2.rope.scaling.type", "yarn");
    real("rope.scaling.factor", yarn.factor);
    number("rope.scaling.original_context_length", yarn.original_max_position_embeddings);
    real("rope.scaling.yarn_log_multiplier", 0.1 * yarn.mscale_all_dim);
    real("rope.scaling.yarn_beta_fast", yarn.beta_fast);
    real("rope.scaling.yarn_beta_slow", yarn.beta_slow);
  }
  number("vocab_size", config_.vocab_size);
  writer_.AddText("tokenizer.ggml.model", "no_vocab");
}

void GgufModel::AddTensors() {
  const int64_t heads = config_.num_heads;
  for (const ModelTensor& tensor : MainTensors(config_)) {
    const bool is_float = tensor.kind == TensorKind::kNorm || tensor.kind == TensorKind::kRouter ||
                          tensor.kind == TensorKind::kRouterBias;
    const GgufType type = is_float ? GgufType::kFp32 : GgufType::kQ8;
    const std::string_view name = tensor.name;
    constexpr std::string_view kLayers = "model.layers.", kExperts = "mlp.experts.";
    Place place;
    if (!name.starts_with(kLayers)) {
      place.tensor = Renamed(name);
      writer_.AddTensor(place.tensor, type, tensor.shape);
      places_.emplace(name, std::move(place));
      continue;
    }
    const size_t dot = name.find('.', kLayers.size());
    const std::string_view rest = name.substr(dot + 1);
    const std::string layer = Format("blk.{}.", name.substr(kLayers.size(), dot - kLayers.size()));
    if (rest.starts_with(kExperts)) {
      const auto [expert_tensor, expert] = ExpertName(rest.substr(kExperts.size()));
      place = {layer + expert_tensor, expert * tensor.shape[0], false};
      if (expert == 0) {
        writer_.AddTensor(place.tensor, type, {config_.n_routed_experts, tensor.shape[0], tensor.shape[1]});
      }
    } else if (rest == "self_attn.kv_b_proj.weight") {
      place = {layer + std::string(Renamed(rest)), 0, true};
      writer_.AddTensor(place.tensor + "k_b.weight", type,
                        {heads, config_.kv_lora_rank, config_.qk_nope_head_dim});
      writer_.AddTensor(place.tensor + "v_b.weight", type, {heads, config_.v_head_dim, config_.kv_lora_rank});
    } else {
      place.tensor = layer + std::string(Renamed(rest));
      writer_.AddTensor(place.tensor, type, tensor.shape);
    }
    places_.emplace(name, std::move(place));
  }
}

Result<GgufModel> GgufModel::Create(const std::string& path, const ModelConfig& config) {
  RETURN_IF_ERROR(Check(config));
  GgufModel model(config);
  model.AddMetadata();
  model.AddTensors();
  RETURN_IF_ERROR(model.writer_.Create(path));
  return model;
}

Status GgufModel::WriteFloats(const std::string& tensor, int64_t first, std::span<const float> values) const {
  return writer_.WriteFloats(places_.at(tensor).tensor, first, values);
}

Status GgufModel::WriteRows(const std::string& tensor, int64_t first_row, std::span<const int8_t> codes,
                            std::span<const float> scales) const {
  const Place& place = places_.at(tensor);
  if (!place.is_kv_b) return writer_.WriteRows(place.tensor, place.first_row + first_row, codes, scales);
  const int64_t head_rows = config_.qk_nope_head_dim + config_.v_head_dim;
  CHECK(first_row % head_rows == 0 && static_cast<int64_t>(scales.size()) % head_rows == 0);
  CHECK(std::ranges::all_of(scales, [&](float scale) { return scale == scales[0]; }));
  return WriteHeads(place.tensor, first_row / head_rows, codes, scales[0]);
}

// A head of kv_b is [nope + v, R]. attn_v_b has its value rows as they are, attn_k_b its key rows as columns:
// the absorbed query is a product over nope.
Status GgufModel::WriteHeads(const std::string& prefix, int64_t first_head, std::span<const int8_t> codes,
                             float scale) const {
  const auto nope = static_cast<size_t>(config_.qk_nope_head_dim);
  const auto value = static_cast<size_t>(config_.v_head_dim);
  const auto rank = static_cast<size_t>(config_.kv_lora_rank);
  const std::vector<float> scales(std::max(rank, value), scale);
  std::vector<int8_t> key(rank * nope);
  for (size_t h = 0; h < codes.size() / ((nope + value) * rank); ++h) {
    const std::span<const int8_t> head = codes.subspan(h * (nope + value) * rank, (nope + value) * rank);
    for (size_t n = 0; n < nope; ++n) {
      for (size_t r = 0; r < rank; ++r) key[r * nope + n] = head[n * rank + r];
    }
    const int64_t number = first_head + static_cast<int64_t>(h);
    RETURN_IF_ERROR(writer_.WriteRows(prefix + "k_b.weight", number * config_.kv_lora_rank, key,
                                      std::span(scales).first(rank)));
    RETURN_IF_ERROR(writer_.WriteRows(prefix + "v_b.weight", number * config_.v_head_dim,
                                      head.subspan(nope * rank), std::span(scales).first(value)));
  }
  return {};
}

}  // namespace tessera
