// The dimensions of the presets, and the table that names every dimension for flags.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "model/random_checkpoint.h"

namespace tessera {
namespace {

template <auto Field>
constexpr RandomDimension Size(std::string_view name, std::string_view help) {
  return {name, help, true, [](const ModelConfig& config) { return static_cast<double>(config.*Field); },
          [](ModelConfig& config, double value) { config.*Field = static_cast<int>(value); }};
}
template <auto Field>
constexpr RandomDimension Real(std::string_view name, std::string_view help) {
  return {name, help, false, [](const ModelConfig& config) { return static_cast<double>(config.*Field); },
          [](ModelConfig& config, double value) {
            config.*Field = static_cast<std::remove_reference_t<decltype(config.*Field)>>(value);
          }};
}
template <auto Field>
constexpr RandomDimension YarnReal(std::string_view name, std::string_view help) {
  return {name, help, false, [](const ModelConfig& config) { return config.yarn.*Field; },
          [](ModelConfig& config, double value) { config.yarn.*Field = value; }};
}

constexpr std::array kDimensions = {
    Size<&ModelConfig::vocab_size>("vocab-size", "rows of embedding and lm_head"),
    Size<&ModelConfig::hidden_size>("hidden-size", "width of the residual stream"),
    Size<&ModelConfig::num_layers>("num-hidden-layers", "decoder layers, without MTP"),
    Size<&ModelConfig::num_nextn_predict_layers>("num-nextn-predict-layers", "MTP layers"),
    Size<&ModelConfig::num_heads>("num-attention-heads", "heads; times v-head-dim a multiple of 16"),
    Size<&ModelConfig::q_lora_rank>("q-lora-rank", "width of the compressed query"),
    Size<&ModelConfig::kv_lora_rank>("kv-lora-rank", "width of the latent cache, even"),
    Size<&ModelConfig::qk_nope_head_dim>("qk-nope-head-dim", "part of a query head without positions"),
    Size<&ModelConfig::qk_rope_head_dim>("qk-rope-head-dim", "part of a query head with positions, even"),
    Size<&ModelConfig::v_head_dim>("v-head-dim", "width of a value head"),
    Size<&ModelConfig::intermediate_size>("intermediate-size", "width of the dense FFN, a multiple of 16"),
    Size<&ModelConfig::moe_intermediate_size>("moe-intermediate-size",
                                              "width of one expert, a multiple of 16"),
    Size<&ModelConfig::first_k_dense_replace>("first-k-dense-replace",
                                              "how many of the first layers are dense"),
    Size<&ModelConfig::n_routed_experts>("n-routed-experts", "routed experts of a layer"),
    Size<&ModelConfig::n_shared_experts>("n-shared-experts", "shared experts of a layer, may be 0"),
    Size<&ModelConfig::num_experts_per_tok>("num-experts-per-tok", "routed experts of a token"),
    Size<&ModelConfig::n_group>("n-group", "expert groups"),
    Size<&ModelConfig::topk_group>("topk-group", "expert groups kept for a token"),
    Size<&ModelConfig::max_position_embeddings>("max-position-embeddings", "longest sequence"),
    Real<&ModelConfig::routed_scaling_factor>("routed-scaling-factor",
                                              "factor of the routed experts' weights"),
    Real<&ModelConfig::rms_norm_eps>("rms-norm-eps", "added to the mean square"),
    Real<&ModelConfig::rope_theta>("rope-theta", "base of the rotary frequencies"),
    YarnReal<&YarnConfig::factor>("rope-factor", "YaRN's factor; 1: no YaRN"),
    YarnReal<&YarnConfig::beta_fast>("rope-beta-fast", "YaRN's fast bound, rotations"),
    YarnReal<&YarnConfig::beta_slow>("rope-beta-slow", "YaRN's slow bound, rotations"),
    YarnReal<&YarnConfig::mscale>("rope-mscale", "YaRN's factor of cos and sin"),
    YarnReal<&YarnConfig::mscale_all_dim>("rope-mscale-all-dim", "YaRN's factor of the softmax scale"),
    RandomDimension{"rope-original-max-position-embeddings", "YaRN's trained length", true,
                    [](const ModelConfig& config) {
                      return static_cast<double>(config.yarn.original_max_position_embeddings);
                    },
                    [](ModelConfig& config, double value) {
                      config.yarn.original_max_position_embeddings = static_cast<int>(value);
                    }},
};

// What all presets share with R1.
ModelConfig Base() {
  ModelConfig config;
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  config.first_k_dense_replace = 1;
  config.n_shared_experts = 1;
  config.routed_scaling_factor = 2.5f;
  config.yarn = {.factor = 40, .mscale_all_dim = 1};
  config.max_position_embeddings = 163840;
  config.eos_token_ids = {1};
  return config;
}

ModelConfig Toy() {
  ModelConfig config = Base();
  config.vocab_size = 1024;
  config.hidden_size = 512;
  config.num_layers = 3;
  config.num_nextn_predict_layers = 1;
  config.num_heads = 16;
  config.q_lora_rank = 256;
  config.intermediate_size = 1024;
  config.moe_intermediate_size = 256;
  config.n_routed_experts = 8;
  config.num_experts_per_tok = 2;
  return config;
}

ModelConfig Odd() {
  ModelConfig config = Base();
  config.vocab_size = 331;
  config.hidden_size = 96;
  config.num_layers = 3;
  config.num_nextn_predict_layers = 1;
  config.num_heads = 6;
  config.q_lora_rank = 41;
  config.kv_lora_rank = 38;
  config.qk_nope_head_dim = 25;
  config.qk_rope_head_dim = 10;
  config.v_head_dim = 24;
  config.intermediate_size = 176;
  config.moe_intermediate_size = 48;
  config.n_routed_experts = 9;
  config.n_shared_experts = 2;
  config.num_experts_per_tok = 4;
  config.n_group = 3;
  config.topk_group = 2;
  config.routed_scaling_factor = 1.75f;
  config.yarn = {.factor = 8, .mscale_all_dim = 0.75, .original_max_position_embeddings = 32};
  config.max_position_embeddings = 256;
  return config;
}

ModelConfig R1Slice() {
  ModelConfig config = Base();
  config.vocab_size = 16384;
  config.hidden_size = 7168;
  config.num_layers = 5;
  config.num_heads = 128;
  config.q_lora_rank = 1536;
  config.intermediate_size = 18432;
  config.moe_intermediate_size = 2048;
  config.n_routed_experts = 32;
  config.num_experts_per_tok = 8;
  return config;
}

}  // namespace

Result<RandomCheckpointOptions> RandomPreset(std::string_view name) {
  RandomCheckpointOptions options;
  if (name == "toy") {
    options.config = Toy();
  } else if (name == "odd") {
    options.config = Odd();
    // With 0.02 the sublayers make up all of the residual: rounding to bf16 alone then changes the likeliest
    // token at 6 to 9 % of positions against fp32; with 2 at 0 to 2 %, and goldens can tell an error from
    // rounding.
    options.embedding_deviation = 2;
  } else if (name == "r1-slice") {
    options.config = R1Slice();
    options.noise = false;
    options.format = RandomFormat::kW8a8;  // what Tessera is measured with
  } else {
    return Invalid("preset {}: toy, odd and r1-slice are known", name);
  }
  return options;
}

std::span<const RandomDimension> RandomDimensions() {
  return kDimensions;
}

Status SetDimension(RandomCheckpointOptions& options, std::string_view name, double value) {
  const auto at = std::ranges::find(kDimensions, name, &RandomDimension::name);
  if (at == kDimensions.end()) return Invalid("unknown dimension {}", name);
  if (at->integral && (value != std::rint(value) || std::abs(value) > std::numeric_limits<int>::max())) {
    return Invalid("{} is {}: a whole number is wanted", name, value);
  }
  at->set(options.config, value);
  return {};
}

}  // namespace tessera
