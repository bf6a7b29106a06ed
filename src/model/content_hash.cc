// Files in the order of their names.
#include "model/content_hash.h"

#include <algorithm>
#include <filesystem>
#include <vector>

#include "base/file.h"
#include "base/sha256.h"

namespace tessera {
namespace {

constexpr uint64_t kWholeBytes = uint64_t{256} << 20;
constexpr uint64_t kEndBytes = uint64_t{1} << 20;
constexpr uint64_t kSampleBytes = uint64_t{64} << 10;
constexpr uint64_t kSampleEvery = uint64_t{512} << 20;

class Digest {
 public:
  void Add(std::span<const std::byte> bytes) {
    const Sha256 part = HashSha256(bytes);
    parts_.insert(parts_.end(), part.begin(), part.end());
  }
  void Add(const std::string& text) { Add(std::as_bytes(std::span(text))); }
  std::string Text() const { return Hex(HashSha256(std::as_bytes(std::span(parts_)))); }

 private:
  std::vector<uint8_t> parts_;
};

}  // namespace

Result<std::string> HashCheckpoint(const std::string& folder) {
  std::vector<std::filesystem::path> files;
  uint64_t total = 0;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename();
    const bool counts = name == "config.json" || name.ends_with(".safetensors") ||
                        (name.starts_with("quant") && name.ends_with(".json"));
    if (!counts || !entry.is_regular_file(error)) continue;
    files.push_back(entry.path());
    total += entry.file_size(error);
  }
  if (error) return Invalid("{}: {}", folder, error.message());
  std::ranges::sort(files);
  Digest digest;
  for (const auto& path : files) {
    ASSIGN_OR_RETURN(const RandomAccessFile file, RandomAccessFile::Open(path.string()));
    const uint64_t size = file.size_bytes();
    digest.Add(Format("{} {}", path.filename().string(), size));
    std::vector<std::byte> buffer;
    const auto add = [&](uint64_t begin, uint64_t count) -> Status {
      buffer.resize(std::min(count, size - std::min(size, begin)));
      RETURN_IF_ERROR(file.Read(begin, buffer));
      digest.Add(buffer);
      return {};
    };
    if (total <= kWholeBytes) {
      for (uint64_t at = 0; at < size; at += kEndBytes) RETURN_IF_ERROR(add(at, kEndBytes));
      continue;
    }
    RETURN_IF_ERROR(add(0, kEndBytes));
    for (uint64_t at = kSampleEvery; at < size; at += kSampleEvery) RETURN_IF_ERROR(add(at, kSampleBytes));
    RETURN_IF_ERROR(add(size - std::min(size, kEndBytes), kEndBytes));
  }
  return digest.Text();
}

}  // namespace tessera
