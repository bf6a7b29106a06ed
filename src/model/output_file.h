// A file of known size that many threads fill in any order. For the containers that are written here:
// safetensors (shard_writer.h) and GGUF (gguf_writer.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "base/error.h"

namespace tessera {

class OutputFile {
 public:
  // kInvalid names the path when it exists already, or when it cannot be created or given its size; it reads
  // as zeros until it is written.
  static Result<OutputFile> Create(const std::string& path, uint64_t size_bytes);
  OutputFile(OutputFile&& other) noexcept
      : path_(std::move(other.path_)), descriptor_(std::exchange(other.descriptor_, -1)) {}
  OutputFile& operator=(OutputFile&&) = delete;
  ~OutputFile();

  // Thread-safe. kInvalid, naming the path, when the disk is full.
  Status Write(uint64_t offset, std::span<const std::byte> bytes) const;

 private:
  OutputFile(std::string path, int descriptor) : path_(std::move(path)), descriptor_(descriptor) {}
  std::string path_;
  int descriptor_;
};

}  // namespace tessera
