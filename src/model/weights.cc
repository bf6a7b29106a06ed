// The second pass of loading: reads, checks and packs.
#include "model/weights.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/log.h"
#include "model/weight_loader.h"

namespace tessera {

using kernels::Bf16;

namespace {

// What is read at once: it is packed while it is still in the cache of the core that read it.
constexpr int64_t kReadBytes = int64_t{256} << 10;
// Columns of other ranks up to this many bytes per row are read too: that costs less than a call per row.
constexpr int64_t kSkipBytes = 4096;

bool IsFinite(Bf16 value) {
  return (value.bits & 0x7F80) != 0x7F80;
}

// In pieces of fixed size without branches, which the compiler turns into vectors.
bool AllFinite(std::span<const Bf16> values) {
  constexpr size_t kPiece = 64;
  uint16_t bad = 0;
  size_t i = 0;
  for (; i + kPiece <= values.size(); i += kPiece) {
    for (size_t j = 0; j < kPiece; ++j) bad |= static_cast<uint16_t>((values[i + j].bits & 0x7F80) == 0x7F80);
  }
  for (; i < values.size(); ++i) bad |= static_cast<uint16_t>(!IsFinite(values[i]));
  return bad == 0;
}

}  // namespace

// Which columns of a part's rows are read.
Slice WeightLoader::ColumnsToRead(const Part& part, int value_bytes) {
  const bool whole = int64_t{part.whole_columns - part.columns.size()} * value_bytes <= kSkipBytes;
  return whole ? Slice{0, part.whole_columns} : part.columns;
}

// Rows that are read whole lie side by side. Others have gaps, which are not worth fetching.
void WeightLoader::Prefetch(const Part& part, Slice rows, int value_bytes) const {
  if (ColumnsToRead(part, value_bytes).size() < part.whole_columns) return;
  const int64_t row_bytes = int64_t{part.whole_columns} * value_bytes;
  checkpoint_->Prefetch(part.tensor, static_cast<uint64_t>(rows.begin * row_bytes),
                        static_cast<uint64_t>(rows.size() * row_bytes));
}

// Rows of a part in pieces of whole panels: `take` gets the rows, where the part's first value of them lies,
// and how many values one row is away from the next.
template <typename T, typename Take>
Status WeightLoader::ReadPieces(const Part& part, Slice rows, int panel, std::vector<std::byte>& buffer,
                                const Take& take) const {
  constexpr int64_t kBytes = sizeof(T);
  const Slice columns = ColumnsToRead(part, kBytes);
  const int64_t stride = columns.size();
  const int64_t panel_bytes = std::max<int64_t>(1, stride * panel * kBytes);
  const int step = static_cast<int>(std::max<int64_t>(1, kReadBytes / panel_bytes)) * panel;
  for (int begin = rows.begin; begin < rows.end; begin += step) {
    const Slice piece = {begin, std::min(rows.end, begin + step)};
    buffer.resize(static_cast<size_t>(piece.size() * stride * kBytes));
    RETURN_IF_ERROR(checkpoint_->ReadRows(part.tensor, piece.begin, piece.end, columns.begin * kBytes,
                                          columns.end * kBytes, part.whole_columns * kBytes, buffer));
    const T* values = reinterpret_cast<const T*>(buffer.data()) + (part.columns.begin - columns.begin);
    RETURN_IF_ERROR(take(piece, values, stride));
  }
  return {};
}

Status WeightLoader::CheckFinite(const Part& part, Slice rows, const Bf16* values, int64_t stride) const {
  for (int row = rows.begin; row < rows.end; ++row, values += stride) {
    const std::span columns(values, static_cast<size_t>(part.columns.size()));
    if (AllFinite(columns)) continue;
    const auto at = std::ranges::find_if(columns, [](Bf16 value) { return !IsFinite(value); });
    return Invalid("{}: tensor {}: value {} is {}, finite values are wanted",
                   checkpoint_->Entry(part.tensor).file, part.tensor,
                   int64_t{row} * part.whole_columns + part.columns.begin + (at - columns.begin()),
                   kernels::ToFloat(*at));
  }
  return {};
}

Status WeightLoader::LoadBf16(const Part& part, Slice rows, const kernels::PackedBf16& packed,
                              std::vector<std::byte>& buffer) const {
  return ReadPieces<Bf16>(part, rows, kernels::kFloatPanel, buffer,
                          [&](Slice piece, const Bf16* values, int64_t stride) -> Status {
                            RETURN_IF_ERROR(CheckFinite(part, piece, values, stride));
                            kernels::PackedBf16 shape = packed;
                            shape.num_outputs = piece.size();
                            const int64_t panel = (piece.begin - part.rows.begin) / kernels::kFloatPanel;
                            kernels::PackBf16(
                                values, stride, shape, 0, shape.num_panels(),
                                const_cast<Bf16*>(packed.panels) + panel * packed.panel_elements());
                            return {};
                          });
}

Status WeightLoader::LoadInt8(const Part& part, Slice rows, const kernels::PackedInt8& packed,
                              std::vector<std::byte>& buffer) const {
  return ReadPieces<int8_t>(part, rows, kernels::kInt8Panel, buffer,
                            [&](Slice piece, const int8_t* values, int64_t stride) -> Status {
                              kernels::PackedInt8 shape = packed;
                              shape.num_outputs = piece.size();
                              const int64_t panel = (piece.begin - part.rows.begin) / kernels::kInt8Panel;
                              kernels::PackInt8(
                                  values, stride, shape, 0, shape.num_panels(),
                                  const_cast<uint8_t*>(packed.panels) + panel * packed.panel_bytes());
                              return {};
                            });
}

Status WeightLoader::LoadEmbedding(const Part& part) const {
  const int hidden = config_.hidden_size;
  const auto count = static_cast<size_t>(int64_t{part.rows.size()} * hidden);
  const int64_t first = int64_t{part.rows.begin - share_.embedding.begin} * hidden;
  const std::span target(const_cast<Bf16*>(weights_.embedding) + first, count);
  const int64_t row_bytes = hidden * int64_t{sizeof(Bf16)};
  RETURN_IF_ERROR(checkpoint_->ReadRows(part.tensor, part.rows.begin, part.rows.end, 0, row_bytes, row_bytes,
                                        std::as_writable_bytes(target)));
  return CheckFinite(part, part.rows, target.data(), hidden);
}

// The absorbed form needs Wk transposed.
Status WeightLoader::LoadUpProjections(const Part& head, const kernels::PackedBf16& key_up,
                                       const kernels::PackedBf16& key_of_latent,
                                       const kernels::PackedBf16& value_up,
                                       std::vector<std::byte>& buffer) const {
  const int nope = config_.qk_nope_head_dim;
  const auto pack = [&](Slice piece, const Bf16* values, int64_t stride) -> Status {
    RETURN_IF_ERROR(CheckFinite(head, piece, values, stride));
    kernels::PackBf16Transposed(values, stride, key_up, const_cast<Bf16*>(key_up.panels));
    kernels::PackBf16(values, stride, key_of_latent, 0, key_of_latent.num_panels(),
                      const_cast<Bf16*>(key_of_latent.panels));
    kernels::PackBf16(values + nope * stride, stride, value_up, 0, value_up.num_panels(),
                      const_cast<Bf16*>(value_up.panels));
    return {};
  };
  return ReadPieces<Bf16>(head, head.rows, head.rows.size(), buffer, pack);
}

// Values [begin, end) of a vector.
Result<std::vector<float>> WeightLoader::ReadFloats(const std::string& tensor, Slice values) const {
  ASSIGN_OR_RETURN(std::vector<float> all, checkpoint_->ReadFloats(tensor));
  CHECK_LE(static_cast<size_t>(values.end), all.size());
  all.resize(static_cast<size_t>(values.end));
  all.erase(all.begin(), all.begin() + values.begin);
  return all;
}

// The original's integer zero point, stored as a float or int8, as one value or (all equal) one per channel.
Status WeightLoader::LoadZeroPoint(const std::string& name, Linear& linear) const {
  const std::string tensor = name + ".input_offset";
  const std::string& file = checkpoint_->Entry(tensor).file;
  std::vector<float> offsets;
  if (checkpoint_->Entry(tensor).dtype == Dtype::kInt8) {
    ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_->Read(tensor));
    for (const std::byte byte : bytes) offsets.push_back(static_cast<float>(static_cast<int8_t>(byte)));
  } else {
    ASSIGN_OR_RETURN(offsets, checkpoint_->ReadFloats(tensor));
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
Status WeightLoader::LoadDeqScale(const std::string& name, Slice rows, Linear& linear) const {
  const std::string tensor = name + ".deq_scale";
  const TensorEntry& entry = checkpoint_->Entry(tensor);
  if (entry.dtype != Dtype::kInt64) {
    ASSIGN_OR_RETURN(linear.deq_scale, ReadFloats(tensor, rows));
    return {};
  }
  ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_->Read(tensor));
  linear.deq_scale.resize(static_cast<size_t>(rows.size()));
  for (size_t i = 0; i < linear.deq_scale.size(); ++i) {
    uint64_t word = 0;
    std::memcpy(&word, &bytes[8 * (static_cast<size_t>(rows.begin) + i)], 8);
    const uint64_t high = word >> 32;  // zero, or the sign of a 32-bit integer that was widened
    const float value = std::bit_cast<float>(static_cast<uint32_t>(word));
    if (!std::isfinite(value) || (high != 0 && high != 0xFFFFFFFF)) {
      return Invalid("{}: tensor {}: value {} is {:#x}, the bits of a finite fp32 are wanted", entry.file,
                     tensor, static_cast<size_t>(rows.begin) + i, word);
    }
    linear.deq_scale[i] = value;
  }
  return {};
}

Status WeightLoader::LoadQuantBias(const std::string& name, const Cut& cut, Linear& linear) const {
  const std::string tensor = name + ".quant_bias";
  ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_->Read(tensor));
  std::vector<int32_t> all(bytes.size() / 4);
  std::memcpy(all.data(), bytes.data(), bytes.size());
  // The sum of the products and the bias stays in int32 (numerics.md), whoever holds which leaf.
  const int64_t bound = (int64_t{1} << 31) - 1 - int64_t{128} * 128 * cut.k;
  for (size_t i = 0; i < all.size(); ++i) {
    if (std::abs(int64_t{all[i]}) > bound) {
      return Invalid("{}: tensor {}: value {} is {}, magnitudes up to {} are exact for K = {}",
                     checkpoint_->Entry(tensor).file, tensor, i, all[i], bound, cut.k);
    }
  }
  linear.quant_bias.assign(all.begin() + cut.rows.begin, all.begin() + cut.rows.end);
  // Part of leaf 0, and counted once.
  if (cut.leaves.begin > 0) std::ranges::fill(linear.quant_bias, 0);
  return {};
}

Status WeightLoader::LoadStatic(const std::string& name, const std::string& beta, const Cut& cut,
                                Linear& linear) const {
  const int leaf_k = cut.k / cut.whole_leaves;
  const Slice columns = {cut.leaves.begin * leaf_k, cut.leaves.end * leaf_k};
  const std::string tensor = name + ".input_scale";
  ASSIGN_OR_RETURN(linear.inverse_scale, checkpoint_->ReadFloats(tensor));
  if (linear.inverse_scale.size() > 1) {
    ASSIGN_OR_RETURN(linear.inverse_scale, ReadFloats(tensor, columns));
  }
  for (float& scale : linear.inverse_scale) {
    const float inverse = 1.0f / scale;
    if (!(scale > 0) || !std::isfinite(inverse)) {
      return Invalid("{}: tensor {} is {}, a positive scale with a finite inverse is wanted",
                     checkpoint_->Entry(tensor).file, tensor, scale);
    }
    scale = inverse;
  }
  RETURN_IF_ERROR(LoadZeroPoint(name, linear));
  RETURN_IF_ERROR(LoadDeqScale(name, cut.rows, linear));
  RETURN_IF_ERROR(LoadQuantBias(name, cut, linear));
  if (!beta.empty() && checkpoint_->Has(beta)) {
    ASSIGN_OR_RETURN(linear.beta, ReadFloats(beta, columns));
  }
  return RequireZeroOffset(name);
}

// Weights are symmetric: an offset, where stored, is zero.
Status WeightLoader::RequireZeroOffset(const std::string& name) const {
  const std::string tensor = name + ".weight_offset";
  if (!checkpoint_->Has(tensor)) return {};
  const TensorEntry& entry = checkpoint_->Entry(tensor);
  ASSIGN_OR_RETURN(const std::vector<std::byte> bytes, checkpoint_->Read(tensor));
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
  ASSIGN_OR_RETURN(weights_.arena, Arena::Allocate(arena_bytes_));
  for (const auto& place : placements_) place();
  buffers_.resize(static_cast<size_t>(threads.num_threads()));
  RETURN_IF_ERROR(RunJobs(jobs_, threads, progress));
  LogUnequalInputs();
  return std::move(weights_);
}

Result<Weights> Weights::Load(const Checkpoint& checkpoint, const ModelConfig& config, const RankShare& share,
                              ThreadPool& threads,
                              const std::function<void(uint64_t done, uint64_t total)>& progress) {
  WeightLoader loader(&checkpoint, config, share,
                      [&](std::string_view linear) { return checkpoint.SchemeOf(linear); });
  loader.Plan();
  return loader.Run(threads, progress);
}

}  // namespace tessera
