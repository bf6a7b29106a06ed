// Shapes by checkpoints.md, section 1 (docs/checkpoints.md); weights are [outputs, inputs].
#include "model/tensor_table.h"

#include "base/format.h"

namespace tessera {
namespace {

void AddFeedForward(const std::string& prefix, int64_t hidden, int64_t width,
                    std::vector<ModelTensor>& tensors) {
  tensors.push_back({prefix + "gate_proj.weight", {width, hidden}, TensorKind::kLinear});
  tensors.push_back({prefix + "up_proj.weight", {width, hidden}, TensorKind::kLinear});
  tensors.push_back({prefix + "down_proj.weight", {hidden, width}, TensorKind::kLinear});
}

void Append(std::vector<ModelTensor> more, std::vector<ModelTensor>& tensors) {
  tensors.insert(tensors.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

}  // namespace

std::string LayerPrefix(int layer) {
  return Format("model.layers.{}.", layer);
}

std::vector<ModelTensor> LayerTensors(const ModelConfig& config, int layer) {
  const std::string prefix = LayerPrefix(layer);
  const std::string attention = prefix + "self_attn.";
  const int64_t hidden = config.hidden_size;
  const int64_t heads = config.num_heads;
  std::vector<ModelTensor> tensors = {
      {prefix + "input_layernorm.weight", {hidden}, TensorKind::kNorm},
      {prefix + "post_attention_layernorm.weight", {hidden}, TensorKind::kNorm},
      {attention + "q_a_proj.weight", {config.q_lora_rank, hidden}, TensorKind::kLinear},
      {attention + "q_a_layernorm.weight", {config.q_lora_rank}, TensorKind::kNorm},
      {attention + "q_b_proj.weight",
       {heads * config.qk_head_dim(), config.q_lora_rank},
       TensorKind::kLinear},
      {attention + "kv_a_proj_with_mqa.weight", {config.latent_width(), hidden}, TensorKind::kLinear},
      {attention + "kv_a_layernorm.weight", {config.kv_lora_rank}, TensorKind::kNorm},
      {attention + "kv_b_proj.weight",
       {heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank},
       TensorKind::kMatrix},
      {attention + "o_proj.weight", {hidden, heads * config.v_head_dim}, TensorKind::kLinear},
  };
  if (!config.IsMoe(layer)) {
    AddFeedForward(prefix + "mlp.", hidden, config.intermediate_size, tensors);
    return tensors;
  }
  tensors.push_back({prefix + "mlp.gate.weight", {config.n_routed_experts, hidden}, TensorKind::kRouter});
  tensors.push_back(
      {prefix + "mlp.gate.e_score_correction_bias", {config.n_routed_experts}, TensorKind::kRouterBias});
  for (int expert = 0; expert < config.n_routed_experts; ++expert) {
    AddFeedForward(Format("{}mlp.experts.{}.", prefix, expert), hidden, config.moe_intermediate_size,
                   tensors);
  }
  if (config.n_shared_experts > 0) {
    AddFeedForward(prefix + "mlp.shared_experts.", hidden,
                   int64_t{config.n_shared_experts} * config.moe_intermediate_size, tensors);
  }
  return tensors;
}

std::vector<ModelTensor> MainTensors(const ModelConfig& config) {
  const int64_t vocab = config.vocab_size;
  const int64_t hidden = config.hidden_size;
  std::vector<ModelTensor> tensors = {{"model.embed_tokens.weight", {vocab, hidden}, TensorKind::kMatrix}};
  for (int layer = 0; layer < config.num_layers; ++layer) Append(LayerTensors(config, layer), tensors);
  tensors.push_back({"model.norm.weight", {hidden}, TensorKind::kNorm});
  tensors.push_back({"lm_head.weight", {vocab, hidden}, TensorKind::kMatrix});
  return tensors;
}

std::vector<ModelTensor> MtpTensors(const ModelConfig& config, int layer) {
  const std::string prefix = LayerPrefix(layer);
  const int64_t vocab = config.vocab_size;
  const int64_t hidden = config.hidden_size;
  std::vector<ModelTensor> tensors = {
      {prefix + "embed_tokens.weight", {vocab, hidden}, TensorKind::kMatrix},
      {prefix + "enorm.weight", {hidden}, TensorKind::kNorm},
      {prefix + "hnorm.weight", {hidden}, TensorKind::kNorm},
      {prefix + "eh_proj.weight", {hidden, 2 * hidden}, TensorKind::kMatrix},
      {prefix + "shared_head.norm.weight", {hidden}, TensorKind::kNorm},
      {prefix + "shared_head.head.weight", {vocab, hidden}, TensorKind::kMatrix},
  };
  Append(LayerTensors(config, layer), tensors);
  return tensors;
}

}  // namespace tessera
