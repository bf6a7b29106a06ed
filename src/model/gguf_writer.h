// Writes a GGUF file, version 3: metadata, a table of tensors, then their rows in any order from any thread.
// Knows the container and two of its types; what a model is called in it is gguf_model.h. Nothing here reads
// GGUF: Tessera does not serve it.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/bytes.h"
#include "base/error.h"
#include "model/output_file.h"

namespace tessera {

enum class GgufType : uint32_t {
  kFp32 = 0,
  kQ8 = 8,  // "Q8_0": blocks of 32 values of a row, each an fp16 scale and 32 int8
};
inline constexpr int kGgufBlock = 32;

class GgufWriter {
 public:
  // All of these before Create. A key or a name is added once.
  void AddText(std::string_view key, std::string_view value);
  void AddUint32(std::string_view key, uint32_t value);
  void AddFloat(std::string_view key, float value);
  void AddBool(std::string_view key, bool value);
  // `shape` as in safetensors: the contiguous dimension last (the file has it first). kQ8: a multiple of 32.
  void AddTensor(const std::string& name, GgufType type, std::vector<int64_t> shape);

  // kInvalid as OutputFile::Create. All tensors then read as zero.
  Status Create(const std::string& path);

  // Thread-safe. REQUIRES: the values lie in the tensor, which is kFp32.
  Status WriteFloats(std::string_view name, int64_t first, std::span<const float> values) const;
  // Rows, counted over all dimensions but the last, of a kQ8 tensor: codes[row * columns + i] * scales[row].
  // Every block of a row carries the row's scale, which an fp16 number must hold exactly. Thread-safe.
  Status WriteRows(std::string_view name, int64_t first_row, std::span<const int8_t> codes,
                   std::span<const float> scales) const;

  uint64_t num_bytes() const { return num_bytes_; }  // of all tensors

 private:
  struct Tensor {
    GgufType type = GgufType::kFp32;
    std::vector<int64_t> shape;
    uint64_t begin = 0;  // from the start of the tensors; after Create of the file
    uint64_t num_bytes = 0;
  };
  void AddKey(std::string_view key, uint32_t type);
  const Tensor& Find(std::string_view name, GgufType type) const;

  ByteWriter metadata_, table_;
  uint64_t num_keys_ = 0;
  uint64_t num_bytes_ = 0;
  std::map<std::string, Tensor, std::less<>> tensors_;
  std::optional<OutputFile> file_;
};

// An fp32 number that fp16 holds exactly: rounded up to eleven bits, and at least 2^-14, fp16's smallest
// normal number. REQUIRES: 0 <= value <= 65504.
float RoundUpToFp16(float value);

}  // namespace tessera
