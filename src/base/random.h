// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based
// generator. The same (key, counter) gives the same four words everywhere, in any order.
#pragma once

#include <array>
#include <cstdint>

namespace tessera {

using PhiloxCounter = std::array<uint32_t, 4>;

constexpr PhiloxCounter Philox4x32(uint64_t key, PhiloxCounter counter) {
  uint32_t key0 = static_cast<uint32_t>(key);
  uint32_t key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// 24 random bits as a float in [0, 1).
constexpr float UnitFloat(uint32_t word) {
  return static_cast<float>(word >> 8) * 0x1p-24f;
}

// A small sequential generator for tests and simulations: values of one stream, in order.
class RandomStream {
 public:
  explicit RandomStream(uint64_t seed, uint64_t stream = 0) : seed_(seed), stream_(stream) {}
  uint32_t Next32() {
    if (used_ == 4) {
      block_ = Philox4x32(seed_, {static_cast<uint32_t>(index_), static_cast<uint32_t>(index_ >> 32),
                                  static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)});
      ++index_;
      used_ = 0;
    }
    return block_[used_++];
  }
  uint64_t Next64() { return uint64_t{Next32()} << 32 | Next32(); }
  // Uniform in [0, bound); bound > 0.
  uint32_t Below(uint32_t bound) { return static_cast<uint32_t>(uint64_t{Next32()} * bound >> 32); }
  float Unit() { return UnitFloat(Next32()); }

 private:
  uint64_t seed_;
  uint64_t stream_;
  uint64_t index_ = 0;
  PhiloxCounter block_ = {};
  int used_ = 4;
};

}  // namespace tessera
