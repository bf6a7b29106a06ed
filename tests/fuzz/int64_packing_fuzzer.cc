// Fuzzes the packed integers that ranks of other hosts send. An input is one byte, how many values are
// expected in steps of 7, then the packed bytes.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/check.h"
#include "comm/sums.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tessera;
  if (size < 1) return 0;
  // Copied to memory of their own, so that a read beyond the end is seen.
  const std::vector<uint8_t> copy(data + 1, data + size);
  const auto packed = std::as_bytes(std::span(copy));
  std::vector<int64_t> values(size_t{data[0]} * 7);
  if (const Status added = UnpackAddInt64(packed, values); !added) {
    CHECK(!added.error().message.empty());
    return 0;
  }
  // What was accepted packs to the same values, in no more bytes.
  std::vector<std::byte> again;
  PackInt64(values, again);
  CHECK_LE(again.size(), packed.size());
  std::vector<int64_t> same(values.size());
  CHECK(UnpackAddInt64(again, same).has_value());
  CHECK(same == values);
  return 0;
}
