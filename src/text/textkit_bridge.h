// What crosses from textkit: owned bytes, and statuses as errors. For tokenizer.cc and chat_template.cc only.
#pragma once

#include <string>
#include <string_view>

#include "base/error.h"
#include "textkit.h"

namespace tessera {

// Bytes that textkit allocated.
class TextkitBytes {
 public:
  TextkitBytes() = default;
  TextkitBytes(const TextkitBytes&) = delete;
  TextkitBytes& operator=(const TextkitBytes&) = delete;
  ~TextkitBytes() { tk_bytes_free(&bytes_); }

  tk_bytes* out() { return &bytes_; }
  std::string_view view() const {
    return bytes_.len == 0 ? std::string_view()
                           : std::string_view(reinterpret_cast<char*>(bytes_.data), bytes_.len);
  }

 private:
  tk_bytes bytes_ = {nullptr, 0, 0};
};

inline const uint8_t* BytePointer(std::string_view text) {
  return reinterpret_cast<const uint8_t*>(text.data());
}

// `status` is not TK_OK. `what` says what was done, as in "chat template".
inline std::unexpected<Error> TextkitError(std::string_view what, int32_t status,
                                           const TextkitBytes& message) {
  const ErrorKind kind = status == TK_ERR_PANIC ? ErrorKind::kInternal : ErrorKind::kInvalid;
  return Fail(kind, "{}: {}", what, message.view());
}

}  // namespace tessera
