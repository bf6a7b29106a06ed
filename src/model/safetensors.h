// The safetensors container: a header of JSON, then bytes. Every offset, dtype and shape of a hostile file is
// checked before use: ranges inside the file, no overlap, no hole, dtype x shape = range.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/file.h"

namespace tessera {

enum class Dtype { kBf16, kFp16, kFp32, kFp8E4m3, kInt8, kUint8, kInt32, kInt64 };
std::string_view DtypeName(Dtype dtype);  // as in the file: "BF16", "F32", "I8", ...
int DtypeBytes(Dtype dtype);

struct TensorEntry {
  Dtype dtype = Dtype::kFp32;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // byte range in the file
  std::string file;             // for messages
};

// The header of a file of `file_bytes` bytes whose first bytes are `head` (8 length bytes and the JSON).
Result<std::map<std::string, TensorEntry, std::less<>>> ParseSafetensorsHeader(std::string_view head,
                                                                               uint64_t file_bytes,
                                                                               const std::string& path);

class SafetensorsFile {
 public:
  static Result<SafetensorsFile> Open(const std::string& path);
  const std::map<std::string, TensorEntry, std::less<>>& tensors() const { return tensors_; }
  Status Read(const TensorEntry& entry, std::span<std::byte> target) const;  // thread-safe
  // Part of a tensor's bytes, from `offset` within it. Thread-safe; REQUIRES: the part lies in the tensor.
  Status ReadPart(const TensorEntry& entry, uint64_t offset, std::span<std::byte> target) const;
  // Says that such a part will be read soon; see RandomAccessFile.
  void Prefetch(const TensorEntry& entry, uint64_t offset, uint64_t num_bytes) const;

 private:
  SafetensorsFile(RandomAccessFile file, std::map<std::string, TensorEntry, std::less<>> tensors)
      : file_(std::move(file)), tensors_(std::move(tensors)) {}
  RandomAccessFile file_;
  std::map<std::string, TensorEntry, std::less<>> tensors_;
};

}  // namespace tessera
