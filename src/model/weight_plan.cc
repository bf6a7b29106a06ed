// The first pass of loading: which part of which tensor this rank holds, and what it costs.
#include <algorithm>
#include <utility>

#include "base/format.h"
#include "model/tensor_table.h"
#include "model/weight_loader.h"

namespace tessera {
namespace {

using kernels::Bf16;
using kernels::kFloatPanel;
using kernels::kInt8Panel;
using kernels::kNumLeaves;

constexpr int64_t kChunkBytes = int64_t{4} << 20;  // of a tensor, read and packed at once
constexpr size_t kAlignBytes = 64;

size_t Aligned(size_t bytes) {
  return (bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
}

// Chunks of whole panels: fn(rows), rows of the part in absolute numbers.
template <typename Fn>
void ForChunks(Slice rows, int panel, int64_t row_bytes, const Fn& fn) {
  const int64_t panel_bytes = std::max<int64_t>(1, row_bytes * panel);
  const int step = static_cast<int>(std::max<int64_t>(1, kChunkBytes / panel_bytes)) * panel;
  for (int begin = rows.begin; begin < rows.end; begin += step)
    fn(Slice{begin, std::min(rows.end, begin + step)});
}

// Rows of a tensor that are held from end to end.
Part WholeRows(std::string tensor, Slice rows, int columns) {
  return {.tensor = std::move(tensor), .rows = rows, .columns = {0, columns}, .whole_columns = columns};
}

}  // namespace

// Remembers that `packed` needs its bytes in the arena.
template <typename Packed, typename T>
void WeightLoader::Reserve(Packed& packed, const T* Packed::* panels) {
  const auto bytes = static_cast<size_t>(packed.size_bytes());
  arena_bytes_ += Aligned(bytes);
  placements_.push_back([this, &packed, panels, bytes] {
    packed.*panels = reinterpret_cast<const T*>(weights_.arena.Take(bytes));
  });
}

void WeightLoader::Hold(const std::string& tensor, Slice rows, Slice columns, uint64_t bytes) {
  if (bytes == 0) return;
  held_.push_back({tensor, rows, columns, bytes});
  weights_.size_bytes += bytes;
}

WeightLoader::Cut WeightLoader::ByRows(int num_outputs, int k, Slice rows) const {
  return {.num_outputs = num_outputs, .k = k, .rows = rows};
}
WeightLoader::Cut WeightLoader::ByLeaves(int num_outputs, int k, Slice leaves) const {
  return {.num_outputs = num_outputs,
          .k = k,
          .rows = {0, num_outputs},
          .whole_leaves = kNumLeaves,
          .leaves = leaves};
}

void WeightLoader::PlanBf16(const Part& part, kernels::PackedBf16& packed) {
  Reserve(packed, &kernels::PackedBf16::panels);
  Hold(part.tensor, part.rows, part.columns, static_cast<uint64_t>(packed.size_bytes()));
  const int64_t row_bytes = part.columns.size() * int64_t{sizeof(Bf16)};
  ForChunks(part.rows, kFloatPanel, row_bytes, [&](Slice rows) {
    AddReadJob(part, rows, sizeof(Bf16),
               [this, part, rows, &packed](auto& buffer) { return LoadBf16(part, rows, packed, buffer); });
  });
}

void WeightLoader::PlanInt8(const Part& part, kernels::PackedInt8& packed) {
  Reserve(packed, &kernels::PackedInt8::panels);
  Hold(part.tensor, part.rows, part.columns, static_cast<uint64_t>(packed.size_bytes()));
  ForChunks(part.rows, kInt8Panel, part.columns.size(), [&](Slice rows) {
    AddReadJob(part, rows, sizeof(int8_t),
               [this, part, rows, &packed](auto& buffer) { return LoadInt8(part, rows, packed, buffer); });
  });
}

void WeightLoader::PlanFloats(const std::string& tensor, Slice values, std::vector<float>& target) {
  const uint64_t bytes = uint64_t{sizeof(float)} * static_cast<uint64_t>(values.size());
  Hold(tensor, values, {0, 1}, bytes);
  AddJob(bytes, [this, &target, tensor, values](auto&) -> Status {
    ASSIGN_OR_RETURN(target, ReadFloats(tensor, values));
    return {};
  });
}

void WeightLoader::PlanRouter(const std::string& tensor, kernels::PackedFloat& packed) {
  packed.num_outputs = config_.n_routed_experts;
  packed.k = config_.hidden_size;
  Reserve(packed, &kernels::PackedFloat::panels);
  const auto bytes = static_cast<uint64_t>(packed.size_bytes());
  Hold(tensor, {0, packed.num_outputs}, {0, packed.k}, bytes);
  AddJob(bytes, [this, &packed, tensor](auto&) -> Status {
    ASSIGN_OR_RETURN(const std::vector<float> rows, checkpoint_->ReadFloats(tensor));
    kernels::PackFloat(rows.data(), packed.k, packed, const_cast<float*>(packed.panels));
    return {};
  });
}

// The rows go into the arena as they are.
void WeightLoader::PlanEmbedding() {
  const std::string tensor = "model.embed_tokens.weight";
  const int64_t row_bytes = config_.hidden_size * int64_t{sizeof(Bf16)};
  const auto bytes = static_cast<size_t>(share_.embedding.size() * row_bytes);
  arena_bytes_ += Aligned(bytes);
  Hold(tensor, share_.embedding, {0, config_.hidden_size}, bytes);
  placements_.push_back(
      [this, bytes] { weights_.embedding = reinterpret_cast<const Bf16*>(weights_.arena.Take(bytes)); });
  ForChunks(share_.embedding, 1, row_bytes, [&](Slice rows) {
    const Part part = WholeRows(tensor, rows, config_.hidden_size);
    AddReadJob(part, rows, sizeof(Bf16), [this, part](auto&) { return LoadEmbedding(part); });
  });
}

// kv_b holds, per head, n rows of Wk and v rows of Wv over R inputs. Wk is held twice: one form of attention
// takes queries up to the latent with it, the other makes keys of latents.
void WeightLoader::PlanUpProjections(const std::string& tensor, LayerWeights& weights) {
  const int rank = config_.kv_lora_rank;
  const int per_head = config_.qk_nope_head_dim + config_.v_head_dim;
  const auto num_heads = static_cast<size_t>(share_.heads.size());
  weights.key_up.resize(num_heads);
  weights.key_of_latent.resize(num_heads);
  weights.value_up.resize(num_heads);
  uint64_t bytes = 0;
  for (size_t i = 0; i < num_heads; ++i) {
    kernels::PackedBf16& key_up = weights.key_up[i];
    kernels::PackedBf16& key_of_latent = weights.key_of_latent[i];
    kernels::PackedBf16& value_up = weights.value_up[i];
    key_up = {.num_outputs = rank, .leaf_k = config_.qk_nope_head_dim};
    key_of_latent = {.num_outputs = config_.qk_nope_head_dim, .leaf_k = rank};
    value_up = {.num_outputs = config_.v_head_dim, .leaf_k = rank};
    Reserve(key_up, &kernels::PackedBf16::panels);
    Reserve(key_of_latent, &kernels::PackedBf16::panels);
    Reserve(value_up, &kernels::PackedBf16::panels);
    bytes += static_cast<uint64_t>(key_up.size_bytes() + key_of_latent.size_bytes() + value_up.size_bytes());
    const int head = share_.heads.begin + static_cast<int>(i);
    const Part part = WholeRows(tensor, {head * per_head, (head + 1) * per_head}, rank);
    AddReadJob(part, part.rows, sizeof(Bf16), [this, part, i, &weights](auto& buffer) {
      return LoadUpProjections(part, weights.key_up[i], weights.key_of_latent[i], weights.value_up[i],
                               buffer);
    });
  }
  Hold(tensor, {share_.heads.begin * per_head, share_.heads.end * per_head}, {0, rank}, bytes);
}

void WeightLoader::PlanLinear(const std::string& name, const Cut& cut, Linear& linear) {
  const int leaf_k = cut.k / cut.whole_leaves;
  linear.scheme = scheme_of_(name);
  linear.num_outputs = cut.rows.size();
  linear.k = leaf_k * cut.leaves.size();
  linear.num_leaves = cut.leaves.size();
  if (linear.empty()) return;
  const Part part = {.tensor = name + ".weight",
                     .rows = cut.rows,
                     .columns = {cut.leaves.begin * leaf_k, cut.leaves.end * leaf_k},
                     .whole_columns = cut.k};
  if (linear.scheme == Scheme::kBf16) {
    linear.bf16 = {.num_outputs = linear.num_outputs, .num_leaves = linear.num_leaves, .leaf_k = leaf_k};
    return PlanBf16(part, linear.bf16);
  }
  linear.int8 = {.num_outputs = linear.num_outputs, .num_leaves = linear.num_leaves, .leaf_k = leaf_k};
  PlanInt8(part, linear.int8);
  if (linear.scheme == Scheme::kInt8Dynamic) {
    PlanFloats(name + ".weight_scale", cut.rows, linear.weight_scale);
    AddJob(0, [this, name](auto&) { return RequireZeroOffset(name); });
    return;
  }
  std::string beta;
  const std::string layer = name.substr(0, name.find("self_attn."));
  if (name.ends_with(".q_a_proj") || name.ends_with(".kv_a_proj_with_mqa"))
    beta = layer + "input_layernorm.bias";
  if (name.ends_with(".q_b_proj")) beta = layer + "self_attn.q_a_layernorm.bias";
  const uint64_t bytes = uint64_t{8} * static_cast<uint64_t>(linear.num_outputs);
  Hold(name + ".quant_bias, .deq_scale", cut.rows, {0, 1}, bytes);
  AddJob(bytes, [this, name, beta, cut, &linear](auto&) { return LoadStatic(name, beta, cut, linear); });
}

void WeightLoader::PlanFeedForward(const std::string& prefix, int width, Slice leaves, FeedForward& ffn) {
  const int leaf = width / kNumLeaves;
  const Slice rows = {leaves.begin * leaf, leaves.end * leaf};
  PlanLinear(prefix + "gate_proj", ByRows(width, config_.hidden_size, rows), ffn.gate);
  PlanLinear(prefix + "up_proj", ByRows(width, config_.hidden_size, rows), ffn.up);
  PlanLinear(prefix + "down_proj", ByLeaves(config_.hidden_size, width, leaves), ffn.down);
}

void WeightLoader::PlanLayer(int layer, LayerWeights& weights) {
  const std::string prefix = LayerPrefix(layer);
  const std::string attention = prefix + "self_attn.";
  const int hidden = config_.hidden_size;
  const int heads = config_.num_heads;
  const int head_dim = config_.qk_head_dim();
  const Slice whole = {0, hidden};
  PlanFloats(prefix + "input_layernorm.weight", whole, weights.input_norm);
  PlanFloats(prefix + "post_attention_layernorm.weight", whole, weights.post_attention_norm);
  PlanFloats(attention + "q_a_layernorm.weight", {0, config_.q_lora_rank}, weights.q_a_norm);
  PlanFloats(attention + "kv_a_layernorm.weight", {0, config_.kv_lora_rank}, weights.kv_a_norm);
  PlanLinear(attention + "q_a_proj", ByRows(config_.q_lora_rank, hidden, {0, config_.q_lora_rank}),
             weights.q_a);
  PlanLinear(attention + "q_b_proj",
             ByRows(heads * head_dim, config_.q_lora_rank,
                    {share_.heads.begin * head_dim, share_.heads.end * head_dim}),
             weights.q_b);
  PlanLinear(attention + "kv_a_proj_with_mqa",
             ByRows(config_.latent_width(), hidden, {0, config_.latent_width()}), weights.kv_a);
  PlanUpProjections(attention + "kv_b_proj.weight", weights);
  PlanLinear(attention + "o_proj", ByLeaves(hidden, heads * config_.v_head_dim, share_.tensor_leaves),
             weights.o);
  if (!config_.IsMoe(layer))
    return PlanFeedForward(prefix + "mlp.", config_.intermediate_size, share_.tensor_leaves, weights.dense);
  PlanRouter(prefix + "mlp.gate.weight", weights.router);
  PlanFloats(prefix + "mlp.gate.e_score_correction_bias", {0, config_.n_routed_experts}, weights.router_bias);
  weights.experts.resize(static_cast<size_t>(share_.experts.size()));
  for (size_t i = 0; i < weights.experts.size(); ++i) {
    PlanFeedForward(Format("{}mlp.experts.{}.", prefix, share_.experts.begin + static_cast<int>(i)),
                    config_.moe_intermediate_size, share_.expert_leaves, weights.experts[i]);
  }
  if (config_.n_shared_experts > 0) {
    PlanFeedForward(prefix + "mlp.shared_experts.", config_.n_shared_experts * config_.moe_intermediate_size,
                    share_.shared_leaves, weights.shared);
  }
}

void WeightLoader::Plan() {
  PlanEmbedding();
  weights_.layers.resize(static_cast<size_t>(config_.num_layers));
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    PlanLayer(layer, weights_.layers[static_cast<size_t>(layer)]);
  }
  PlanFloats("model.norm.weight", {0, config_.hidden_size}, weights_.final_norm);
  weights_.lm_head = {.num_outputs = share_.head.size(), .leaf_k = config_.hidden_size};
  PlanBf16(WholeRows("lm_head.weight", share_.head, config_.hidden_size), weights_.lm_head);
}

std::vector<HeldTensor> ListHeldTensors(const ModelConfig& config, const RankShare& share,
                                        const std::function<Scheme(std::string_view linear)>& scheme_of) {
  WeightLoader loader(nullptr, config, share, scheme_of);
  loader.Plan();
  return loader.held();
}

}  // namespace tessera
