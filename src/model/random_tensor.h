// The values of one random tensor: normal, by a counter-based generator. Any element can be computed alone.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "base/random.h"

namespace tessera {

class RandomTensor {
 public:
  RandomTensor(uint64_t seed, std::string_view name, double standard_deviation)
      : seed_(seed), hash_(Fnv1a(name)), unit_(standard_deviation / kByteSumDeviation) {}

  // No element is larger.
  double largest() const { return kLargestByteSum * unit_; }

  // Elements first, first + 1, ... Each is a sum of eight random bytes: mean 0, nearly normal (excess
  // kurtosis -0.15), at most 4.9 standard deviations; two elements a block of Philox. Integers and one
  // multiplication: the same bits everywhere.
  void Fill(uint64_t first, std::span<float> out) const {
    for (size_t i = 0; i < out.size();) {
      const uint64_t index = first + i;
      const PhiloxCounter words =
          Philox4x32(seed_, {static_cast<uint32_t>(index >> 1), static_cast<uint32_t>(index >> 33),
                             static_cast<uint32_t>(hash_), static_cast<uint32_t>(hash_ >> 32)});
      if (index % 2 == 0) out[i++] = Scaled(uint64_t{words[1]} << 32 | words[0]);
      if (i < out.size()) out[i++] = Scaled(uint64_t{words[3]} << 32 | words[2]);
    }
  }

 private:
  // sqrt(8 * (256^2 - 1) / 12): of a sum of eight bytes; their mean is 1020.
  static constexpr double kByteSumDeviation = 209.02152999152983;

  static constexpr double kLargestByteSum = 1020;  // beyond the mean

  static constexpr uint64_t Fnv1a(std::string_view text) {
    uint64_t hash = 0xCBF29CE484222325;
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
    return hash;
  }
  float Scaled(uint64_t bytes) const {
    const uint64_t pairs = (bytes & 0x00FF00FF00FF00FF) + (bytes >> 8 & 0x00FF00FF00FF00FF);
    const auto sum = static_cast<int>(pairs * 0x0001000100010001 >> 48);
    return static_cast<float>(static_cast<double>(sum - 1020) * unit_);
  }

  uint64_t seed_;
  uint64_t hash_;
  double unit_;
};

}  // namespace tessera
