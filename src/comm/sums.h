// Loops over int64 arrays: adding, and packing without loss for the wire. Internal to comm/.
//
// Packed form: blocks of 64 values (the last may be shorter); each is one byte w in 0..8, then every value of
// the block as a signed little-endian number of w bytes, the least w that holds them all. A zero block is one
// byte. Sums of fixed point (docs/numerics.md) mostly take 4 to 5 bytes a value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "base/error.h"

namespace tessera {

// out[i] := the sum of row[i] over all rows, at least one. rows[0] may be `out` itself; apart from that, rows
// do not overlap `out`.
void SumRows(std::span<int64_t> out, std::span<const int64_t* const> rows);

inline constexpr size_t kPackedBlock = 64;
// The most bytes that `count` values take packed.
constexpr size_t MaxPackedBytes(size_t count) {
  return count * sizeof(int64_t) + (count + kPackedBlock - 1) / kPackedBlock;
}
// Appends the packed form.
void PackInt64(std::span<const int64_t> values, std::vector<std::byte>& packed);
// out[i] += value i. kInvalid, with the place, when `packed` is not the form of exactly out.size() values;
// `out` is then spoilt.
Status UnpackAddInt64(std::span<const std::byte> packed, std::span<int64_t> out);

}  // namespace tessera
