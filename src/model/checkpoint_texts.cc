// Written as text: the keys keep the order in which readers of such files expect them.
#include "model/checkpoint_texts.h"

#include <array>
#include <string_view>

#include "base/format.h"

namespace tessera {
namespace {

constexpr std::array<std::string_view, 3> kFirstTokens = {"<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
                                                          "<｜▁pad▁｜>"};
// The two thought marks come last: they are ordinary added tokens, not special ones.
constexpr std::array<std::string_view, 13> kLastTokens = {"<｜User｜>",
                                                          "<｜Assistant｜>",
                                                          "<｜tool▁calls▁begin｜>",
                                                          "<｜tool▁calls▁end｜>",
                                                          "<｜tool▁call▁begin｜>",
                                                          "<｜tool▁sep｜>",
                                                          "<｜tool▁call▁end｜>",
                                                          "<｜tool▁outputs▁begin｜>",
                                                          "<｜tool▁outputs▁end｜>",
                                                          "<｜tool▁output▁begin｜>",
                                                          "<｜tool▁output▁end｜>",
                                                          "<think>",
                                                          "</think>"};
static_assert(kFirstTokens.size() + 256 + kLastTokens.size() == kByteTokenizerSize);

std::string Utf8(int code_point) {
  if (code_point < 0x80) return {static_cast<char>(code_point)};
  return {static_cast<char>(0xC0 | code_point >> 6), static_cast<char>(0x80 | (code_point & 0x3F))};
}

// The letter that a byte-level vocabulary writes for a byte: itself where it is visible, else 256, 257, ...
// in order.
bool IsVisible(int byte) {
  return (byte > 0x20 && byte < 0x7F) || (byte >= 0xA1 && byte <= 0xFF && byte != 0xAD);
}

std::string Quoted(std::string_view text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

std::string AddedToken(int id, std::string_view content, bool special) {
  return Format(R"(    {{"id": {}, "content": {}, "single_word": false, "lstrip": false, "rstrip": false, )"
                R"("normalized": false, "special": {}}})",
                id, Quoted(content), special);
}

std::string RopeText(const YarnConfig& yarn) {
  if (yarn.factor == 1) return "null";
  return Format(R"({{"beta_fast": {}, "beta_slow": {}, "factor": {}, "mscale": {}, "mscale_all_dim": {}, )"
                R"("original_max_position_embeddings": {}, "type": "yarn"}})",
                yarn.beta_fast, yarn.beta_slow, yarn.factor, yarn.mscale, yarn.mscale_all_dim,
                yarn.original_max_position_embeddings);
}

}  // namespace

std::string ConfigText(const ModelConfig& config) {
  std::string out = R"({
  "architectures": ["DeepseekV3ForCausalLM"],
  "model_type": "deepseek_v3",
  "attention_bias": false,
  "attention_dropout": 0.0,
  "hidden_act": "silu",
  "moe_layer_freq": 1,
  "norm_topk_prob": true,
  "scoring_func": "sigmoid",
  "tie_word_embeddings": false,
  "topk_method": "noaux_tc",
  "torch_dtype": "bfloat16",
  "use_cache": true,
)";
  const auto add = [&out](std::string_view name, auto value) {
    out += Format("  \"{}\": {},\n", name, value);
  };
  add("vocab_size", config.vocab_size);
  add("hidden_size", config.hidden_size);
  add("num_hidden_layers", config.num_layers);
  add("num_nextn_predict_layers", config.num_nextn_predict_layers);
  add("num_attention_heads", config.num_heads);
  add("num_key_value_heads", config.num_heads);
  add("q_lora_rank", config.q_lora_rank);
  add("kv_lora_rank", config.kv_lora_rank);
  add("qk_nope_head_dim", config.qk_nope_head_dim);
  add("qk_rope_head_dim", config.qk_rope_head_dim);
  add("v_head_dim", config.v_head_dim);
  add("intermediate_size", config.intermediate_size);
  add("moe_intermediate_size", config.moe_intermediate_size);
  add("first_k_dense_replace", config.first_k_dense_replace);
  add("n_routed_experts", config.n_routed_experts);
  add("n_shared_experts", config.n_shared_experts);
  add("num_experts_per_tok", config.num_experts_per_tok);
  add("n_group", config.n_group);
  add("topk_group", config.topk_group);
  add("routed_scaling_factor", config.routed_scaling_factor);
  add("rms_norm_eps", config.rms_norm_eps);
  add("rope_theta", config.rope_theta);
  add("rope_scaling", RopeText(config.yarn));
  add("max_position_embeddings", config.max_position_embeddings);
  add("bos_token_id", config.bos_token_id);
  out += Format("  \"eos_token_id\": [{}]\n}}\n", fmt::join(config.eos_token_ids, ", "));
  return out;
}

std::string GenerationConfigText(const ModelConfig& config) {
  return Format(
      "{{\n  \"_from_model_config\": true,\n  \"bos_token_id\": {},\n  \"eos_token_id\": [{}],\n"
      "  \"do_sample\": true,\n  \"temperature\": 0.6,\n  \"top_p\": 0.95\n}}\n",
      config.bos_token_id, fmt::join(config.eos_token_ids, ", "));
}

std::string ByteTokenizerText() {
  std::string added;
  std::string vocabulary;
  int id = 0;
  const auto add_mark = [&](std::string_view token, bool special) {
    added += Format("{}{}", added.empty() ? "" : ",\n", AddedToken(id, token, special));
    ++id;
  };
  for (const std::string_view token : kFirstTokens) {
    vocabulary += Format("{}{}: {}", vocabulary.empty() ? "" : ", ", Quoted(token), id);
    add_mark(token, true);
  }
  int invisible = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const int code_point = IsVisible(byte) ? byte : invisible++;
    vocabulary += Format(", {}: {}", Quoted(Utf8(code_point)), id++);
  }
  for (const std::string_view token : kLastTokens) add_mark(token, !token.ends_with("think>"));
  return Format(R"({{
  "version": "1.0",
  "truncation": null,
  "padding": null,
  "added_tokens": [
{}
  ],
  "normalizer": null,
  "pre_tokenizer": {{
    "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false
  }},
  "post_processor": null,
  "decoder": {{"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}},
  "model": {{
    "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
    "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
    "vocab": {{{}}},
    "merges": []
  }}
}}
)",
                added, vocabulary);
}

std::string ByteTokenizerConfigText() {
  constexpr std::string_view kTemplate =
      "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] "
      "}}"
      "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
      "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'] + eos_token }}"
      "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}";
  std::string chat_template;
  for (const char c : kTemplate) c == '\n' ? chat_template += "\\n" : chat_template += c;
  return Format(R"({{
  "add_bos_token": true,
  "add_eos_token": false,
  "bos_token": {},
  "eos_token": {},
  "pad_token": {},
  "unk_token": null,
  "clean_up_tokenization_spaces": false,
  "model_max_length": 16384,
  "tokenizer_class": "LlamaTokenizerFast",
  "chat_template": {}
}}
)",
                Quoted(kFirstTokens[0]), Quoted(kFirstTokens[1]), Quoted(kFirstTokens[1]),
                "\"" + chat_template + "\"");
}

}  // namespace tessera
