// Bytes from another process: no message may crash, read beyond its end or take memory that is not there.
#include <cstddef>
#include <cstdint>

#include "cluster/messages.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  if (size == 0) return 0;
  const auto bytes = std::as_bytes(std::span(data + 1, size - 1));
  const auto again = [](const auto& decoded) {
    if (decoded) (void)Encode(*decoded);
  };
  switch (data[0] % 7) {
    case 0:
      again(DecodeHello(bytes));
      break;
    case 1:
      again(DecodeWelcome(bytes));
      break;
    case 2:
      again(DecodeRankSetup(bytes));
      break;
    case 3:
      again(DecodeRankLoaded(bytes));
      break;
    case 4:
      again(DecodeRankReport(bytes));
      break;
    case 5:
      again(DecodeStep(bytes));
      break;
    default:
      again(DecodeTexts(bytes));
  }
  return 0;
}
