// Loads in two passes: the first lays out every packed array in one Arena, the second reads, checks and packs
// them with all threads, a few megabytes at a time. So memory peaks at the packed weights plus one buffer per
// thread.
#include "model/weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "model/jobs.h"
#include "model/tensor_table.h"

namespace tessera {
namespace {

using kernels::Bf16;
using kernels::kFloatPanel;
using kernels::kInt8Panel;
using kernels::kNumLeaves;

constexpr int64_t kChunkBytes = int64_t{4} << 20;  // of a tensor, read and packed at once
constexpr size_t kAlignBytes = 64;

bool IsFinite(uint16_t bf16_bits) {
  return (bf16_bits & 0x7F80) != 0x7F80;
}

class WeightLoader {
 public:
  WeightLoader(const Checkpoint& checkpoint, const ModelConfig& config)
      : checkpoint_(checkpoint), config_(config) {}

  Result<Weights> Run(ThreadPool& threads, const Progress& progress);

 private:
  // -- First pass: shapes, sizes and jobs. Arrays get their place when the arena exists.
  template <typename Packed, typename T>
  void Reserve(Packed& packed, const T* Packed::* panels);
  void Plan();
  void PlanLayer(int layer, LayerWeights& weights);
  void PlanUpProjections(const std::string& tensor, LayerWeights& weights);
  void PlanFeedForward(const std::string& prefix, int width, FeedForward& ffn);
  void PlanLinear(const std::string& name, int num_outputs, int k, int num_leaves, Linear& linear);
  void PlanBf16(const std::string& tensor, kernels::PackedBf16& packed);
  void PlanInt8(const std::string& tensor, kernels::PackedInt8& packed);
  void PlanFloats(const std::string& tensor, std::vector<float>& target);
  void PlanRouter(const std::string& tensor, kernels::PackedFloat& packed);
  void PlanEmbedding();
  // `run` may use the thread's buffer as it likes.
  void AddJob(uint64_t bytes, std::function<Status(std::vector<std::byte>& buffer)> run) {
    jobs_.push_back({bytes, [this, run = std::move(run)](int thread) {
                       return run(buffers_[static_cast<size_t>(thread)]);
                     }});
  }

  // -- Second pass.
  Result<std::span<const Bf16>> ReadBf16(const std::string& tensor, int64_t first, int64_t count,
                                         std::vector<std::byte>& buffer) const;
  Status CheckFinite(const std::string& tensor, int64_t first, std::span<const Bf16> values) const;
  Status LoadStatic(const std::string& name, const std::string& beta, Linear& linear) const;
  Status LoadZeroPoint(const std::string& name, Linear& linear) const;
  Status LoadDeqScale(const std::string& name, Linear& linear) const;
  Status LoadQuantBias(const std::string& name, Linear& linear) const;
  Status RequireZeroOffset(const std::string& name) const;
  void LogUnequalInputs() const;

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  Weights weights_;
  size_t arena_bytes_ = 0;
  std::vector<std::function<void()>> placements_;
  std::vector<Job> jobs_;
  std::vector<std::vector<std::byte>> buffers_;  // one for each thread
};

// Remembers that `packed` needs its bytes in the arena.
template <typename Packed, typename T>
void WeightLoader::Reserve(Packed& packed, const T* Packed::* panels) {
  const auto bytes = static_cast<size_t>(packed.size_bytes());
  arena_bytes_ += (bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
  placements_.push_back([this, &packed, panels, bytes] {
    packed.*panels = reinterpret_cast<const T*>(weights_.arena.Take(bytes));
  });
}

Result<std::span<const Bf16>> WeightLoader::ReadBf16(const std::string& tensor, int64_t first, int64_t count,
                                                     std::vector<std::byte>& buffer) const {
  buffer.resize(static_cast<size_t>(count) * sizeof(Bf16));
  RETURN_IF_ERROR(checkpoint_.ReadPart(tensor, static_cast<uint64_t>(first) * sizeof(Bf16), buffer));
  const std::span values(reinterpret_cast<const Bf16*>(buffer.data()), static_cast<size_t>(count));
  RETURN_IF_ERROR(CheckFinite(tensor, first, values));
  return values;
}

Status WeightLoader::CheckFinite(const std::string& tensor, int64_t first,
                                 std::span<const Bf16> values) const {
  // A sum without branches, then a search: the check costs less than the copy.
  uint32_t num_bad = 0;
  for (const Bf16 value : values) num_bad += IsFinite(value.bits) ? 0 : 1;
  if (num_bad == 0) return {};
  const auto at = std::ranges::find_if(values, [](Bf16 value) { return !IsFinite(value.bits); });
  return Invalid("{}: tensor {}: value {} is {}, finite values are wanted", checkpoint_.Entry(tensor).file,
                 tensor, first + (at - values.begin()), kernels::ToFloat(*at));
}

// Chunks of whole panels: fn(panel_begin, panel_end).
template <typename Fn>
void ForChunks(int num_panels, int64_t panel_bytes, const Fn& fn) {
  const int step = static_cast<int>(std::max<int64_t>(1, kChunkBytes / std::max<int64_t>(1, panel_bytes)));
  for (int begin = 0; begin < num_panels; begin += step) fn(begin, std::min(num_panels, begin + step));
}

void WeightLoader::PlanBf16(const std::string& tensor, kernels::PackedBf16& packed) {
  Reserve(packed, &kernels::PackedBf16::panels);
  const int64_t k = int64_t{packed.num_leaves} * packed.leaf_k;
  ForChunks(packed.num_panels(), kFloatPanel * k * 2, [&](int begin, int end) {
    const int first_row = begin * kFloatPanel;
    const int num_rows = std::min(packed.num_outputs, end * kFloatPanel) - first_row;
    AddJob(static_cast<uint64_t>(num_rows * k * 2),
           [this, &packed, tensor, k, begin, first_row, num_rows](std::vector<std::byte>& buffer) -> Status {
             ASSIGN_OR_RETURN(const auto rows, ReadBf16(tensor, first_row * k, num_rows * k, buffer));
             kernels::PackedBf16 part = packed;
             part.num_outputs = num_rows;
             Bf16* target = const_cast<Bf16*>(packed.panels) + begin * packed.panel_elements();
             kernels::PackBf16(rows.data(), k, part, 0, part.num_panels(), target);
             return {};
           });
  });
}

void WeightLoader::PlanInt8(const std::string& tensor, kernels::PackedInt8& packed) {
  Reserve(packed, &kernels::PackedInt8::panels);
  const int64_t k = int64_t{packed.num_leaves} * packed.leaf_k;
  ForChunks(packed.num_panels(), kInt8Panel * k, [&](int begin, int end) {
    const int first_row = begin * kInt8Panel;
    const int num_rows = std::min(packed.num_outputs, end * kInt8Panel) - first_row;
    AddJob(static_cast<uint64_t>(num_rows * k),
           [this, &packed, tensor, k, begin, first_row, num_rows](std::vector<std::byte>& buffer) -> Status {
             buffer.resize(static_cast<size_t>(num_rows * k));
             RETURN_IF_ERROR(checkpoint_.ReadPart(tensor, static_cast<uint64_t>(first_row * k), buffer));
             kernels::PackedInt8 part = packed;
             part.num_outputs = num_rows;
             uint8_t* target = const_cast<uint8_t*>(packed.panels) + begin * packed.panel_bytes();
             kernels::PackInt8(reinterpret_cast<const int8_t*>(buffer.data()), k, part, 0, part.num_panels(),
                               target);
             return {};
           });
  });
}

void WeightLoader::PlanFloats(const std::string& tensor, std::vector<float>& target) {
  const TensorEntry& entry = checkpoint_.Entry(tensor);
  AddJob(entry.end - entry.begin, [this, &target, tensor](std::vector<std::byte>&) -> Status {
    ASSIGN_OR_RETURN(target, checkpoint_.ReadFloats(tensor));
    return {};
  });
}

void WeightLoader::PlanRouter(const std::string& tensor, kernels::PackedFloat& packed) {
  packed.num_outputs = config_.n_routed_experts;
  packed.k = config_.hidden_size;
  Reserve(packed, &kernels::PackedFloat::panels);
  const TensorEntry& entry = checkpoint_.Entry(tensor);
  AddJob(entry.end - entry.begin, [this, &packed, tensor](std::vector<std::byte>&) -> Status {
    ASSIGN_OR_RETURN(const std::vector<float> rows, checkpoint_.ReadFloats(tensor));
    kernels::PackFloat(rows.data(), packed.k, packed, const_cast<float*>(packed.panels));
    return {};
  });
}

// The rows go into the arena as they are.
void WeightLoader::PlanEmbedding() {
  const std::string tensor = "model.embed_tokens.weight";
  const int64_t hidden = config_.hidden_size;
  const auto bytes = static_cast<size_t>(config_.vocab_size * hidden * 2);
  arena_bytes_ += (bytes + kAlignBytes - 1) / kAlignBytes * kAlignBytes;
  placements_.push_back(
      [this, bytes] { weights_.embedding = reinterpret_cast<const Bf16*>(weights_.arena.Take(bytes)); });
  ForChunks(config_.vocab_size, hidden * 2, [&](int begin, int end) {
    const int64_t first = begin * hidden;
    const int64_t count = (end - begin) * hidden;
    AddJob(static_cast<uint64_t>(count * 2), [this, tensor, first, count](std::vector<std::byte>&) -> Status {
      const std::span target(const_cast<Bf16*>(weights_.embedding) + first, static_cast<size_t>(count));
      RETURN_IF_ERROR(
          checkpoint_.ReadPart(tensor, static_cast<uint64_t>(first * 2), std::as_writable_bytes(target)));
      return CheckFinite(tensor, first, target);
    });
  });
}

// kv_b holds, per head, n rows of Wk and v rows of Wv over R inputs. The absorbed form needs Wk transposed.
void WeightLoader::PlanUpProjections(const std::string& tensor, LayerWeights& weights) {
  const int nope = config_.qk_nope_head_dim;
  const int value = config_.v_head_dim;
  const int rank = config_.kv_lora_rank;
  weights.key_up.resize(static_cast<size_t>(config_.num_heads));
  weights.value_up.resize(static_cast<size_t>(config_.num_heads));
  for (size_t head = 0; head < weights.key_up.size(); ++head) {
    kernels::PackedBf16& key_up = weights.key_up[head];
    kernels::PackedBf16& value_up = weights.value_up[head];
    key_up.num_outputs = rank;
    key_up.leaf_k = nope;
    value_up.num_outputs = value;
    value_up.leaf_k = rank;
    Reserve(key_up, &kernels::PackedBf16::panels);
    Reserve(value_up, &kernels::PackedBf16::panels);
    const int64_t count = int64_t{nope + value} * rank;
    const int64_t first = static_cast<int64_t>(head) * count;
    AddJob(static_cast<uint64_t>(count * 2),
           [=, this, &key_up, &value_up](std::vector<std::byte>& buffer) -> Status {
             ASSIGN_OR_RETURN(const auto rows, ReadBf16(tensor, first, count, buffer));
             std::vector<Bf16> transposed(static_cast<size_t>(rank) * static_cast<size_t>(nope));
             for (int n = 0; n < nope; ++n) {
               const Bf16* row = rows.data() + int64_t{n} * rank;
               for (int r = 0; r < rank; ++r) transposed[static_cast<size_t>(int64_t{r} * nope + n)] = row[r];
             }
             kernels::PackBf16(transposed.data(), nope, key_up, 0, key_up.num_panels(),
                               const_cast<Bf16*>(key_up.panels));
             kernels::PackBf16(rows.data() + int64_t{nope} * rank, rank, value_up, 0, value_up.num_panels(),
                               const_cast<Bf16*>(value_up.panels));
             return {};
           });
  }
}

void WeightLoader::PlanLinear(const std::string& name, int num_outputs, int k, int num_leaves,
                              Linear& linear) {
  linear.scheme = checkpoint_.SchemeOf(name);
  linear.num_outputs = num_outputs;
  linear.k = k;
  linear.num_leaves = num_leaves;
  if (linear.scheme == Scheme::kBf16) {
    linear.bf16 = {.num_outputs = num_outputs, .num_leaves = num_leaves, .leaf_k = k / num_leaves};
    return PlanBf16(name + ".weight", linear.bf16);
  }
  linear.int8 = {.num_outputs = num_outputs, .num_leaves = num_leaves, .leaf_k = k / num_leaves};
  PlanInt8(name + ".weight", linear.int8);
  if (linear.scheme == Scheme::kInt8Dynamic) {
    PlanFloats(name + ".weight_scale", linear.weight_scale);
    AddJob(0, [this, name](std::vector<std::byte>&) { return RequireZeroOffset(name); });
    return;
  }
  std::string beta;
  const std::string layer = name.substr(0, name.find("self_attn."));
  if (name.ends_with(".q_a_proj") || name.ends_with(".kv_a_proj_with_mqa"))
    beta = layer + "input_layernorm.bias";
  if (name.ends_with(".q_b_proj")) beta = layer + "self_attn.q_a_layernorm.bias";
  AddJob(uint64_t{8} * static_cast<uint64_t>(num_outputs),
         [this, name, beta, &linear](std::vector<std::byte>&) { return LoadStatic(name, beta, linear); });
}

void WeightLoader::PlanFeedForward(const std::string& prefix, int width, FeedForward& ffn) {
  PlanLinear(prefix + "gate_proj", width, config_.hidden_size, 1, ffn.gate);
  PlanLinear(prefix + "up_proj", width, config_.hidden_size, 1, ffn.up);
  PlanLinear(prefix + "down_proj", config_.hidden_size, width, kNumLeaves, ffn.down);
}

void WeightLoader::PlanLayer(int layer, LayerWeights& weights) {
  const std::string prefix = LayerPrefix(layer);
  const std::string attention = prefix + "self_attn.";
  const int hidden = config_.hidden_size;
  const int heads = config_.num_heads;
  PlanFloats(prefix + "input_layernorm.weight", weights.input_norm);
  PlanFloats(prefix + "post_attention_layernorm.weight", weights.post_attention_norm);
  PlanFloats(attention + "q_a_layernorm.weight", weights.q_a_norm);
  PlanFloats(attention + "kv_a_layernorm.weight", weights.kv_a_norm);
  PlanLinear(attention + "q_a_proj", config_.q_lora_rank, hidden, 1, weights.q_a);
  PlanLinear(attention + "q_b_proj", heads * config_.qk_head_dim(), config_.q_lora_rank, 1, weights.q_b);
  PlanLinear(attention + "kv_a_proj_with_mqa", config_.latent_width(), hidden, 1, weights.kv_a);
  PlanUpProjections(attention + "kv_b_proj.weight", weights);
  PlanLinear(attention + "o_proj", hidden, heads * config_.v_head_dim, kNumLeaves, weights.o);
  if (!config_.IsMoe(layer))
    return PlanFeedForward(prefix + "mlp.", config_.intermediate_size, weights.dense);
  PlanRouter(prefix + "mlp.gate.weight", weights.router);
  PlanFloats(prefix + "mlp.gate.e_score_correction_bias", weights.router_bias);
  weights.experts.resize(static_cast<size_t>(config_.n_routed_experts));
  for (size_t expert = 0; expert < weights.experts.size(); ++expert) {
    PlanFeedForward(Format("{}mlp.experts.{}.", prefix, expert), config_.moe_intermediate_size,
                    weights.experts[expert]);
  }
  if (config_.n_shared_experts > 0) {
    PlanFeedForward(prefix + "mlp.shared_experts.", config_.n_shared_experts * config_.moe_intermediate_size,
                    weights.shared);
  }
}

void WeightLoader::Plan() {
  PlanEmbedding();
  weights_.layers.resize(static_cast<size_t>(config_.num_layers));
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    PlanLayer(layer, weights_.layers[static_cast<size_t>(layer)]);
  }
  PlanFloats("model.norm.weight", weights_.final_norm);
  weights_.lm_head = {.num_outputs = config_.vocab_size, .leaf_k = config_.hidden_size};
  PlanBf16("lm_head.weight", weights_.lm_head);
}

// The original's integer zero point, stored as a float or int8, as one value or (all equal) one per channel.
Status WeightLoader::LoadZeroPoint(const std::string& name, Linear& linear) const {
  const std::string tensor = name + ".input_offset";
  const std::string& file = checkpoint_.Entry(tensor).file;
  std::vector<float> offsets;
  if (checkpoint_.Entry(tensor).dtype == Dtype::kInt8) {
    ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_.Read(tensor));
    for (const std::byte byte : bytes) offsets.push_back(static_cast<float>(static_cast<int8_t>(byte)));
  } else {
    ASSIGN_OR_RETURN(offsets, checkpoint_.ReadFloats(tensor));
  }
  for (const float offset : offsets) {
    if (offset != std::rint(offset) || offset < -128 || offset > 127) {
      return Invalid("{}: tensor {} is {}, a whole number from -128 to 127 is wanted", file, tensor, offset);
    }
    if (offset != offsets[0]) {
      return Invalid("{}: tensor {} holds {} and {}: offsets that differ between channels are not supported",
                     file, tensor, offsets[0], offset);
    }
  }
  linear.zero_point = offsets[0];
  return {};
}

// fp32, or int64 whose low half is the bits of an fp32.
Status WeightLoader::LoadDeqScale(const std::string& name, Linear& linear) const {
  const std::string tensor = name + ".deq_scale";
  const TensorEntry& entry = checkpoint_.Entry(tensor);
  if (entry.dtype != Dtype::kInt64) {
    ASSIGN_OR_RETURN(linear.deq_scale, checkpoint_.ReadFloats(tensor));
    return {};
  }
  ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_.Read(tensor));
  linear.deq_scale.resize(bytes.size() / 8);
  for (size_t i = 0; i < linear.deq_scale.size(); ++i) {
    uint64_t word = 0;
    std::memcpy(&word, &bytes[8 * i], 8);
    const uint64_t high = word >> 32;  // zero, or the sign of a 32-bit integer that was widened
    const float value = std::bit_cast<float>(static_cast<uint32_t>(word));
    if (!std::isfinite(value) || (high != 0 && high != 0xFFFFFFFF)) {
      return Invalid("{}: tensor {}: value {} is {:#x}, the bits of a finite fp32 are wanted", entry.file,
                     tensor, i, word);
    }
    linear.deq_scale[i] = value;
  }
  return {};
}

Status WeightLoader::LoadQuantBias(const std::string& name, Linear& linear) const {
  const std::string tensor = name + ".quant_bias";
  ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_.Read(tensor));
  linear.quant_bias.resize(bytes.size() / 4);
  std::memcpy(linear.quant_bias.data(), bytes.data(), bytes.size());
  // The sum of the products and the bias stays in int32 (numerics.md).
  const int64_t bound = (int64_t{1} << 31) - 1 - int64_t{128} * 128 * linear.k;
  for (size_t i = 0; i < linear.quant_bias.size(); ++i) {
    if (std::abs(int64_t{linear.quant_bias[i]}) > bound) {
      return Invalid("{}: tensor {}: value {} is {}, magnitudes up to {} are exact for K = {}",
                     checkpoint_.Entry(tensor).file, tensor, i, linear.quant_bias[i], bound, linear.k);
    }
  }
  return {};
}

Status WeightLoader::LoadStatic(const std::string& name, const std::string& beta, Linear& linear) const {
  const std::string tensor = name + ".input_scale";
  ASSIGN_OR_RETURN(linear.inverse_scale, checkpoint_.ReadFloats(tensor));
  for (float& scale : linear.inverse_scale) {
    const float inverse = 1.0f / scale;
    if (!(scale > 0) || !std::isfinite(inverse)) {
      return Invalid("{}: tensor {} is {}, a positive scale with a finite inverse is wanted",
                     checkpoint_.Entry(tensor).file, tensor, scale);
    }
    scale = inverse;
  }
  RETURN_IF_ERROR(LoadZeroPoint(name, linear));
  RETURN_IF_ERROR(LoadDeqScale(name, linear));
  RETURN_IF_ERROR(LoadQuantBias(name, linear));
  if (!beta.empty() && checkpoint_.Has(beta)) {
    ASSIGN_OR_RETURN(linear.beta, checkpoint_.ReadFloats(beta));
  }
  return RequireZeroOffset(name);
}

// Weights are symmetric: an offset, where stored, is zero.
Status WeightLoader::RequireZeroOffset(const std::string& name) const {
  const std::string tensor = name + ".weight_offset";
  if (!checkpoint_.Has(tensor)) return {};
  const TensorEntry& entry = checkpoint_.Entry(tensor);
  ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_.Read(tensor));
  // Zero in every dtype, up to the sign of a floating-point zero.
  const auto width = static_cast<size_t>(DtypeBytes(entry.dtype));
  const bool is_float =
      entry.dtype != Dtype::kInt8 && entry.dtype != Dtype::kInt32 && entry.dtype != Dtype::kInt64;
  for (size_t i = 0; i < bytes.size(); ++i) {
    const bool holds_sign = is_float && i % width == width - 1;
    if ((bytes[i] & std::byte{holds_sign ? uint8_t{0x7F} : uint8_t{0xFF}}) != std::byte{0}) {
      return Invalid("{}: tensor {}: value {} is not zero: asymmetric weights are not supported", entry.file,
                     tensor, i / width);
    }
  }
  return {};
}

// q_a and kv_a read the same input; the original quantises it once, with q_a's scale. Here each uses its own.
void WeightLoader::LogUnequalInputs() const {
  int num_layers = 0;
  int first = -1;
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    const LayerWeights& weights = weights_.layers[static_cast<size_t>(layer)];
    if (weights.q_a.scheme != Scheme::kInt8Static || weights.kv_a.scheme != Scheme::kInt8Static) continue;
    if (weights.q_a.inverse_scale == weights.kv_a.inverse_scale &&
        weights.q_a.zero_point == weights.kv_a.zero_point) {
      continue;
    }
    if (num_layers++ == 0) first = layer;
  }
  if (num_layers == 0) return;
  LogWarning(
      "q_a_proj and kv_a_proj_with_mqa have different input_scale or input_offset in {} layers, the first is "
      "layer {}; each uses its own",
      num_layers, first);
}

Result<Weights> WeightLoader::Run(ThreadPool& threads, const Progress& progress) {
  Plan();
  ASSIGN_OR_RETURN(weights_.arena, Arena::Allocate(arena_bytes_));
  for (const auto& place : placements_) place();
  buffers_.resize(static_cast<size_t>(threads.num_threads()));
  RETURN_IF_ERROR(RunJobs(jobs_, threads, progress));
  LogUnequalInputs();
  return std::move(weights_);
}

}  // namespace

Result<Weights> Weights::Load(const Checkpoint& checkpoint, const ModelConfig& config, ThreadPool& threads,
                              const std::function<void(uint64_t done, uint64_t total)>& progress) {
  return WeightLoader(checkpoint, config).Run(threads, progress);
}

}  // namespace tessera
