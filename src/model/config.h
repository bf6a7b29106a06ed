// config.json of a DeepSeek-V3 class model, checked: every size, rule and flag that the engine depends on.
// Anything it does not implement is refused by name, never approximated.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace tessera {

struct YarnConfig {  // rope_scaling; factor 1 stands for "no rope_scaling"
  double factor = 1;
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 1;
  double mscale_all_dim = 0;
  int original_max_position_embeddings = 4096;
};

struct ModelConfig {
  int vocab_size = 0;  // rows of embedding and lm_head
  int hidden_size = 0;
  int num_layers = 0;
  int num_nextn_predict_layers = 0;
  int num_heads = 0;
  int q_lora_rank = 0;
  int kv_lora_rank = 0;
  int qk_nope_head_dim = 0;
  int qk_rope_head_dim = 0;
  int v_head_dim = 0;
  int intermediate_size = 0;      // dense FFN
  int moe_intermediate_size = 0;  // one expert
  int first_k_dense_replace = 0;  // layers below are dense
  int n_routed_experts = 0;
  int n_shared_experts = 0;
  int num_experts_per_tok = 0;
  int n_group = 1;
  int topk_group = 1;
  float routed_scaling_factor = 1;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 10000;
  YarnConfig yarn;
  int max_position_embeddings = 0;
  int bos_token_id = 0;
  std::vector<int32_t> eos_token_ids;
  std::string quant_method;  // quantization_config.quant_method, empty where there is none

  bool IsMoe(int layer) const { return layer >= first_k_dense_replace; }
  int qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int latent_width() const { return kv_lora_rank + qk_rope_head_dim; }
};

// kInvalid names the field, the value seen and the values accepted: unknown architecture, router, activation
// or rope type, sizes out of bounds, K axes of row-parallel linears that 16 does not divide, groups that hold
// too few experts (numerics.md, "router"). Unknown fields are ignored unless they would change the
// arithmetic.
Result<ModelConfig> ParseModelConfig(std::string_view json);
Result<ModelConfig> LoadModelConfig(const std::string& folder);  // folder/config.json

// Sampling defaults of generation_config.json; what the file does not say is absent.
struct GenerationDefaults {
  std::optional<double> temperature;
  std::optional<double> top_p;
  std::optional<int> top_k;
  std::optional<double> min_p;
  std::optional<double> repetition_penalty;
  std::optional<int> max_new_tokens;
  std::vector<int32_t> eos_token_ids;  // empty: config.json's
};
Result<GenerationDefaults> LoadGenerationDefaults(const std::string& folder);  // a missing file is no error

}  // namespace tessera
