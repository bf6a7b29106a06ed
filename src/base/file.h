// Files: whole small ones as text, parts of large ones by offset, names of a folder.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"

namespace tessera {

// The whole file. kNotFound or kInvalid, naming the path, when it cannot be read or exceeds `max_bytes`.
Result<std::string> ReadFile(const std::string& path, uint64_t max_bytes = uint64_t{64} << 20);
Status WriteFile(const std::string& path, std::string_view content);
bool FileExists(const std::string& path);
// Names (not paths) of the regular files and links in a folder, sorted.
Result<std::vector<std::string>> ListFiles(const std::string& folder);

// An open file, read by offset. Reading is thread-safe.
class RandomAccessFile {
 public:
  static Result<RandomAccessFile> Open(const std::string& path);
  RandomAccessFile(RandomAccessFile&& other) noexcept
      : path_(std::move(other.path_)),
        descriptor_(std::exchange(other.descriptor_, -1)),
        size_(other.size_) {}
  RandomAccessFile& operator=(RandomAccessFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(descriptor_, other.descriptor_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~RandomAccessFile();

  const std::string& path() const { return path_; }
  uint64_t size_bytes() const { return size_; }
  // Fills `target` from `offset`; kInvalid, naming path and range, when the file ends before.
  Status Read(uint64_t offset, std::span<std::byte> target) const;
  // The kernel begins to fetch this range, as far as it is not in memory, while the caller goes on. A hint.
  void Prefetch(uint64_t offset, uint64_t num_bytes) const;

 private:
  RandomAccessFile() = default;
  std::string path_;
  int descriptor_ = -1;
  uint64_t size_ = 0;
};

}  // namespace tessera
