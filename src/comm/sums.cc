// Compiled with -O3 (CMakeLists.txt): GCC 12 leaves these loops scalar at -O2.
#include "comm/sums.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace tessera {
namespace {

// Long enough to amortise the outer loop, short enough that `out` stays in the first-level cache.
constexpr size_t kAddBlock = 1024;

size_t WidthOf(std::span<const int64_t> values) {
  uint64_t magnitude = 0;  // bits that differ from the sign bit, of any value
  for (const int64_t value : values) magnitude |= static_cast<uint64_t>(value ^ (value >> 63));
  return magnitude == 0 && std::ranges::all_of(values, [](int64_t v) { return v == 0; })
             ? 0
             : std::bit_width(magnitude) / 8 + 1;
}

// Eight bytes are moved per value, whatever the width; the last values of the buffer, where that would reach
// beyond it, go byte by byte.
template <size_t kWidth>
void PackBlock(std::span<const int64_t> values, std::byte* to, const std::byte* end) {
  for (const int64_t value : values) {
    if (to + sizeof(value) <= end) [[likely]]
      std::memcpy(to, &value, sizeof(value));
    else
      std::memcpy(to, &value, kWidth);
    to += kWidth;
  }
}

template <size_t kWidth>
void UnpackAddBlock(const std::byte* from, const std::byte* end, std::span<int64_t> out) {
  constexpr int kShift = 64 - 8 * static_cast<int>(kWidth);
  for (int64_t& sum : out) {
    uint64_t bits = 0;
    if (from + sizeof(bits) <= end) [[likely]]
      std::memcpy(&bits, from, sizeof(bits));
    else
      std::memcpy(&bits, from, kWidth);
    from += kWidth;
    // Sums wrap like unsigned numbers: foreign values may be anything.
    const auto value = static_cast<uint64_t>(static_cast<int64_t>(bits << kShift) >> kShift);
    sum = static_cast<int64_t>(static_cast<uint64_t>(sum) + value);
  }
}

using PackFunction = void (*)(std::span<const int64_t>, std::byte*, const std::byte*);
using UnpackFunction = void (*)(const std::byte*, const std::byte*, std::span<int64_t>);
constexpr PackFunction kPack[] = {PackBlock<1>, PackBlock<2>, PackBlock<3>, PackBlock<4>,
                                  PackBlock<5>, PackBlock<6>, PackBlock<7>, PackBlock<8>};
constexpr UnpackFunction kUnpackAdd[] = {UnpackAddBlock<1>, UnpackAddBlock<2>, UnpackAddBlock<3>,
                                         UnpackAddBlock<4>, UnpackAddBlock<5>, UnpackAddBlock<6>,
                                         UnpackAddBlock<7>, UnpackAddBlock<8>};

}  // namespace

void SumRows(std::span<int64_t> out, std::span<const int64_t* const> rows) {
  // Unsigned: rows may come from foreign memory, where a sum could overflow.
  using Word = uint64_t;
  for (size_t begin = 0; begin < out.size(); begin += kAddBlock) {
    const size_t size = std::min(kAddBlock, out.size() - begin);
    auto* __restrict to = reinterpret_cast<Word*>(out.data() + begin);
    const auto* first = reinterpret_cast<const Word*>(rows[0] + begin);
    size_t next = 1;
    if (first != to && rows.size() > 1) {
      const auto* __restrict a = first;
      const auto* __restrict b = reinterpret_cast<const Word*>(rows[next++] + begin);
      for (size_t i = 0; i < size; ++i) to[i] = a[i] + b[i];
    } else if (first != to) {
      std::memcpy(to, first, size * sizeof(Word));
    }
    for (; next < rows.size(); ++next) {
      const auto* __restrict from = reinterpret_cast<const Word*>(rows[next] + begin);
      for (size_t i = 0; i < size; ++i) to[i] += from[i];
    }
  }
}

void PackInt64(std::span<const int64_t> values, std::vector<std::byte>& packed) {
  const size_t before = packed.size();
  packed.resize(before + MaxPackedBytes(values.size()));
  const std::byte* end = packed.data() + packed.size();
  std::byte* to = packed.data() + before;
  for (size_t begin = 0; begin < values.size(); begin += kPackedBlock) {
    const auto block = values.subspan(begin, std::min(kPackedBlock, values.size() - begin));
    const size_t width = WidthOf(block);
    *to++ = static_cast<std::byte>(width);
    if (width > 0) kPack[width - 1](block, to, end);
    to += width * block.size();
  }
  packed.resize(static_cast<size_t>(to - packed.data()));
}

Status UnpackAddInt64(std::span<const std::byte> packed, std::span<int64_t> out) {
  const std::byte* from = packed.data();
  const std::byte* const end = from + packed.size();
  for (size_t begin = 0; begin < out.size(); begin += kPackedBlock) {
    const auto block = out.subspan(begin, std::min(kPackedBlock, out.size() - begin));
    if (from == end) return Invalid("packed integers end at value {} of {}", begin, out.size());
    const auto width = static_cast<size_t>(*from++);
    if (width > sizeof(int64_t)) return Invalid("packed integers of {} bytes at value {}", width, begin);
    if (width * block.size() > static_cast<size_t>(end - from))
      return Invalid("packed integers end inside the block at value {} of {}", begin, out.size());
    if (width > 0) kUnpackAdd[width - 1](from, end, block);
    from += width * block.size();
  }
  if (from != end) return Invalid("packed integers have {} bytes too many", end - from);
  return {};
}

}  // namespace tessera
