// Any bytes as what a connection sends. Nothing may crash, limits hold, and the requests that are found do
// not depend on how the bytes were cut: once whole, once byte by byte, once in pieces that the input itself
// decides.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "http/http1.h"

namespace tessera {
namespace {

constexpr HttpLimits kLimits{.max_header_bytes = 2048, .max_headers = 16, .max_body_bytes = 1024};

// What was found, as one text.
std::string Read(std::string_view bytes, size_t piece) {
  std::string found;
  RequestReader reader(kLimits);
  while (!bytes.empty()) {
    const size_t size = piece == 0 ? 1 + static_cast<uint8_t>(bytes[0]) % 64 : piece;
    reader.Append(bytes.substr(0, size));
    bytes.remove_prefix(std::min(size, bytes.size()));
    while (true) {
      const RequestReader::State before = reader.state();
      const RequestReader::State now = reader.Advance();
      if (now == RequestReader::State::kRefused) {
        CHECK_GE(reader.status(), 400);
        CHECK(!reader.reason().empty());
        return found + "refused " + std::to_string(reader.status());
      }
      if (now == RequestReader::State::kDone) {
        const HttpRequest request = reader.Take();
        CHECK_LE(request.headers.size(), kLimits.max_headers);
        CHECK_LE(request.body.size(), kLimits.max_body_bytes);
        found += request.method + ' ' + request.path + '?' + request.query +
                 (request.keep_alive ? " keep" : " close");
        for (const auto& [name, value] : request.headers) found += '|' + name + '=' + value;
        found += '#' + request.body + '\n';
      } else if (now == before) {
        break;
      }
    }
  }
  return found;
}

}  // namespace
}  // namespace tessera

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  const std::string whole = tessera::Read(bytes, size + 1);
  const std::string single = tessera::Read(bytes, 1);
  const std::string mixed = tessera::Read(bytes, 0);
  CHECK_EQ(whole, single);
  CHECK_EQ(whole, mixed);
  return 0;
}
