// A checkpoint folder on disk, opened and checked, nothing loaded: which tensor lies in which file, its dtype
// and shape, and which quantisation scheme the folder uses. Two forms: plain bf16, and ModelSlim W8A8 (a
// description JSON, two index files; the quantised one wins for the main layers, the plain one for the MTP
// layer).
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/config.h"
#include "model/safetensors.h"

namespace tessera {

enum class Scheme { kBf16, kInt8Static, kInt8Dynamic };  // of one linear

class Checkpoint {
 public:
  // Opens every shard named by the indexes (or the only .safetensors file where there is no index) and checks
  // that the tensors are exactly those that `config` calls for, with the right dtypes and shapes. Missing,
  // surplus and contradictory tensors are kInvalid and name tensor and file. The MTP layer is checked as the
  // others are. `quantization`: the scheme that a flag asks for ("", "ascend", ...), refused when the tensors
  // contradict it.
  static Result<Checkpoint> Open(const std::string& folder, const ModelConfig& config,
                                 std::string_view quantization = "");

  // The scheme of a linear, e.g. "model.layers.0.self_attn.q_a_proj".
  Scheme SchemeOf(std::string_view linear) const;
  bool Has(std::string_view tensor) const;
  const TensorEntry& Entry(std::string_view tensor) const;  // CHECKs that it exists
  // Reads the whole tensor's bytes. Thread-safe.
  Result<std::vector<std::byte>> Read(std::string_view tensor) const;
  // Part of them, from byte `offset` of the tensor on; REQUIRES: the part lies in the tensor. Thread-safe.
  Status ReadPart(std::string_view tensor, uint64_t offset, std::span<std::byte> target) const;
  // Says that such a part will be read soon; see RandomAccessFile. Thread-safe.
  void Prefetch(std::string_view tensor, uint64_t offset, uint64_t num_bytes) const;
  // Bytes [column_begin, column_end) of rows [row_begin, row_end) of the tensor, row after row; a row is
  // row_bytes wide. REQUIRES: the part lies in the tensor, `target` fits it. Thread-safe.
  Status ReadRows(std::string_view tensor, int64_t row_begin, int64_t row_end, int64_t column_begin,
                  int64_t column_end, int64_t row_bytes, std::span<std::byte> target) const;
  // The tensor as fp32, from bf16, fp16 or fp32; every value finite.
  Result<std::vector<float>> ReadFloats(std::string_view tensor) const;
  uint64_t total_bytes() const;  // of the tensors of the main layers
  bool has_mtp() const;
  std::string_view description() const;  // "W8A8 (ModelSlim)" or "bf16", for the log

 private:
  struct Content;
  explicit Checkpoint(std::shared_ptr<const Content> content) : content_(std::move(content)) {}
  std::shared_ptr<const Content> content_;  // shared: a Checkpoint is a cheap handle
};

}  // namespace tessera
