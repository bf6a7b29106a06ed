// Plain POSIX files; every failure names the path.
#include "base/file.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace tessera {

Result<RandomAccessFile> RandomAccessFile::Open(const std::string& path) {
  RandomAccessFile file;
  file.path_ = path;
  file.descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file.descriptor_ < 0)
    return Fail(ErrorKind::kNotFound, "cannot open {}: {}", path, std::strerror(errno));
  struct stat status;
  if (fstat(file.descriptor_, &status) != 0 || !S_ISREG(status.st_mode))
    return Invalid("{} is not a regular file", path);
  file.size_ = static_cast<uint64_t>(status.st_size);
  return file;
}

RandomAccessFile::~RandomAccessFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

Status RandomAccessFile::Read(uint64_t offset, std::span<std::byte> target) const {
  size_t done = 0;
  while (done < target.size()) {
    const ssize_t got =
        pread(descriptor_, target.data() + done, target.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      return Invalid("{}: cannot read bytes {} to {}: {}", path_, offset, offset + target.size(),
                     got < 0 ? std::strerror(errno) : "the file ends before");
    }
    done += static_cast<size_t>(got);
  }
  return {};
}

void RandomAccessFile::Prefetch(uint64_t offset, uint64_t num_bytes) const {
  // Linux fetches no more per call than a device reads ahead, 128 KiB where nobody changed that.
  constexpr uint64_t kPiece = uint64_t{128} << 10;
  const uint64_t end = std::min(offset + num_bytes, size_);
  // Where the end is there already, so is mostly the rest, and asking would only cost time.
  std::byte last{};
  const iovec target = {&last, 1};
  if (end == 0 || preadv2(descriptor_, &target, 1, static_cast<off_t>(end - 1), RWF_NOWAIT) == 1) return;
  for (; offset < end; offset += kPiece) {
    const uint64_t size = std::min(kPiece, end - offset);
    posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_WILLNEED);
  }
}

Result<std::string> ReadFile(const std::string& path, uint64_t max_bytes) {
  ASSIGN_OR_RETURN(RandomAccessFile file, RandomAccessFile::Open(path));
  if (file.size_bytes() > max_bytes) {
    return Invalid("{} has {} bytes, at most {} are accepted", path, file.size_bytes(), max_bytes);
  }
  std::string content(file.size_bytes(), '\0');
  RETURN_IF_ERROR(file.Read(0, std::as_writable_bytes(std::span(content))));
  return content;
}

Status WriteFile(const std::string& path, std::string_view content) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr) return Invalid("cannot write {}: {}", path, std::strerror(errno));
  const size_t written = std::fwrite(content.data(), 1, content.size(), file);
  const bool closed = std::fclose(file) == 0;
  if (written != content.size() || !closed) return Invalid("cannot write {}: {}", path, std::strerror(errno));
  return {};
}

bool FileExists(const std::string& path) {
  struct stat status;
  return stat(path.c_str(), &status) == 0;
}

Result<std::vector<std::string>> ListFiles(const std::string& folder) {
  DIR* stream = opendir(folder.c_str());
  if (stream == nullptr)
    return Fail(ErrorKind::kNotFound, "cannot open folder {}: {}", folder, std::strerror(errno));
  std::vector<std::string> names;
  while (const dirent* entry = readdir(stream)) {
    struct stat status;
    if (stat((folder + "/" + entry->d_name).c_str(), &status) == 0 && S_ISREG(status.st_mode)) {
      names.emplace_back(entry->d_name);
    }
  }
  closedir(stream);
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace tessera
