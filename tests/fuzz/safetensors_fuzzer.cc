// Fuzzes the safetensors header. An input is 4 bytes, how much longer the pretended file is than what follows
// (little-endian), then the first bytes of that file.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/check.h"
#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  if (size < 4) return 0;
  const uint64_t extra = data[0] | data[1] << 8 | data[2] << 16 | uint64_t{data[3]} << 24;
  const std::string_view head(reinterpret_cast<const char*>(data) + 4, size - 4);
  const uint64_t file_bytes = head.size() + extra;
  const auto tensors = ParseSafetensorsHeader(head, file_bytes, "file");
  if (!tensors) {
    CHECK(!tensors.error().message.empty());
    return 0;
  }
  // What the loader relies on: entries inside the file, sizes that agree, no byte in two tensors.
  uint64_t total = 0;
  for (const auto& [name, entry] : *tensors) {
    CHECK_LE(entry.begin, entry.end);
    CHECK_LE(entry.end, file_bytes);
    uint64_t bytes = static_cast<uint64_t>(DtypeBytes(entry.dtype));
    for (const int64_t length : entry.shape) bytes *= static_cast<uint64_t>(length);
    CHECK_EQ(bytes, entry.end - entry.begin);
    total += bytes;
  }
  CHECK_LE(total + 8, file_bytes);
  return 0;
}
