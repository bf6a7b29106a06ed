// See output_file.h. pwrite has no shared position: threads need no lock.
#include "model/output_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace tessera {

Result<OutputFile> OutputFile::Create(const std::string& path, uint64_t size_bytes) {
  const int descriptor = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (descriptor < 0) return Invalid("cannot create {}: {}", path, std::strerror(errno));
  OutputFile file(path, descriptor);
  if (ftruncate(descriptor, static_cast<off_t>(size_bytes)) != 0) {
    return Invalid("cannot give {} its {} bytes: {}", path, size_bytes, std::strerror(errno));
  }
  return file;
}

OutputFile::~OutputFile() {
  if (descriptor_ >= 0) close(descriptor_);
}

Status OutputFile::Write(uint64_t offset, std::span<const std::byte> bytes) const {
  while (!bytes.empty()) {
    const ssize_t wrote = pwrite(descriptor_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote <= 0) return Invalid("cannot write {}: {}", path_, std::strerror(errno));
    offset += static_cast<uint64_t>(wrote);
    bytes = bytes.subspan(static_cast<size_t>(wrote));
  }
  return {};
}

}  // namespace tessera
