// What the tests of this room share: seeded inputs, weights with their packed form, outputs surrounded by
// canary bytes. Not part of the library.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include "kernels/kernels.h"

namespace tessera::kernels {

// The tables to hold against the reference: every one that this CPU can run.
inline std::vector<Isa> VectorIsas() {
  std::vector<Isa> isas;
  for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (ForIsa(isa)) isas.push_back(isa);
  }
  return isas;
}
inline const Kernels& Reference() {
  return **ForIsa(Isa::kScalar);
}

// A test of one instruction set; its thread flushes denormals, as every caller of a kernel does.
class KernelTest : public ::testing::TestWithParam<Isa> {
 protected:
  void SetUp() override { SetFlushToZero(); }
  const Kernels& kernels() const { return **ForIsa(GetParam()); }
};
inline std::string IsaTestName(const ::testing::TestParamInfo<Isa>& info) {
  return std::string(IsaName(info.param));
}

inline uint32_t Bits(float x) {
  return std::bit_cast<uint32_t>(x);
}
// Equal bits, or both NaN: the payload of a NaN is not part of the contract.
inline bool SameFloat(float a, float b) {
  return Bits(a) == Bits(b) || (std::isnan(a) && std::isnan(b));
}
inline bool SameBf16(Bf16 a, Bf16 b) {
  return SameFloat(ToFloat(a), ToFloat(b));
}

// About normal: a sum of three uniform values, of unit size.
inline float Normal(RandomStream& random) {
  return (random.Unit() + random.Unit() + random.Unit() - 1.5f) * 2.0f;
}

// A float of any kind: mostly ordinary, sometimes huge, tiny, denormal, zero of either sign, a tie. NaN and
// infinity only where `non_finite`.
inline float AnyFloat(RandomStream& random, bool non_finite) {
  switch (random.Below(12)) {
    case 0:
      return std::bit_cast<float>(random.Below(0x007fffff) | random.Below(2) << 31);  // denormal
    case 1:
      return random.Below(2) != 0 ? -0.0f : 0.0f;
    case 2:
      return std::bit_cast<float>(random.Next32() & 0xbfffffff);  // tiny
    case 3:
      return Normal(random) * 1e30f;
    case 4:
      return static_cast<float>(static_cast<int>(random.Below(256)) - 128) + 0.5f;
    case 5:
      return std::bit_cast<float>((Bits(Normal(random)) & 0xffff0000) | 0x8000);  // a bf16 tie
    case 6:
      if (non_finite) return std::bit_cast<float>(0x7f800000u | random.Below(2) << 31);
      return Normal(random);
    case 7:
      if (non_finite) return std::bit_cast<float>(0x7fc00000u);
      return Normal(random);
    default:
      return Normal(random);
  }
}

inline std::vector<float> NormalFloats(RandomStream& random, int n, float scale = 1.0f) {
  std::vector<float> values(n);
  for (float& value : values) value = Normal(random) * scale;
  return values;
}
inline std::vector<Bf16> NormalBf16(RandomStream& random, int n, float scale = 1.0f) {
  std::vector<Bf16> values(n);
  for (Bf16& value : values) value = ToBf16(Normal(random) * scale);
  return values;
}

// 64-byte aligned memory of exactly `count` values, so that a sanitizer sees an access beyond it.
template <typename T>
class Aligned {
 public:
  explicit Aligned(size_t count)
      : values_(static_cast<T*>(::operator new(count * sizeof(T) + (count == 0), std::align_val_t(64)))) {
    std::memset(static_cast<void*>(values_), 0, count * sizeof(T));
  }
  Aligned(const Aligned&) = delete;
  Aligned& operator=(const Aligned&) = delete;
  ~Aligned() { ::operator delete(values_, std::align_val_t(64)); }
  T* data() { return values_; }
  T& operator[](size_t i) { return values_[i]; }

 private:
  T* values_;
};

// A weight [num_outputs][num_leaves * leaf_k] and its packed form.
struct Int8Weight {
  Int8Weight(RandomStream& random, int num_outputs, int num_leaves, int leaf_k)
      : shape{.num_outputs = num_outputs, .num_leaves = num_leaves, .leaf_k = leaf_k},
        values(size_t(num_outputs) * num_leaves * leaf_k),
        packed(shape.size_bytes()) {
    for (int8_t& value : values) {
      value = random.Below(16) == 0 ? (random.Below(2) != 0 ? -128 : 127)
                                    : static_cast<int8_t>(random.Below(256));
    }
    PackInt8(values.data(), int64_t{num_leaves} * leaf_k, shape, 0, shape.num_panels(), packed.data());
    shape.panels = packed.data();
  }
  PackedInt8 shape;
  std::vector<int8_t> values;
  Aligned<uint8_t> packed;
};

struct Bf16Weight {
  Bf16Weight(RandomStream& random, int num_outputs, int num_leaves, int leaf_k, float scale = 1.0f)
      : shape{.num_outputs = num_outputs, .num_leaves = num_leaves, .leaf_k = leaf_k},
        values(NormalBf16(random, num_outputs * num_leaves * leaf_k, scale)),
        packed(shape.size_bytes() / 2) {
    Pack();
  }
  void Pack() {
    PackBf16(values.data(), int64_t{shape.num_leaves} * shape.leaf_k, shape, 0, shape.num_panels(),
             packed.data());
    shape.panels = packed.data();
  }
  PackedBf16 shape;
  std::vector<Bf16> values;
  Aligned<Bf16> packed;
};

// Quantised rows in the leaf layout of a weight, with exact sums.
struct Int8Input {
  Int8Input(RandomStream& random, int num_rows, int num_leaves, int leaf_k, bool with_minus_128)
      : leaf_pad((leaf_k + 3) / 4 * 4),
        stride(int64_t{num_leaves} * leaf_pad + 5),
        data(num_rows * stride),
        scales(num_rows * num_leaves),
        sums(num_rows * num_leaves) {
    for (int row = 0; row < num_rows; ++row) {
      for (int leaf = 0; leaf < num_leaves; ++leaf) {
        scales[row * num_leaves + leaf] = (random.Unit() + 0.01f) * 0.01f;
        for (int k = 0; k < leaf_k; ++k) {
          int value = static_cast<int>(random.Below(255)) - 127;
          if (random.Below(8) == 0) value = with_minus_128 ? -128 : 127;
          data[row * stride + leaf * leaf_pad + k] = static_cast<int8_t>(value);
          sums[row * num_leaves + leaf] += value;
        }
      }
    }
  }
  Int8Rows view() const { return {data.data(), stride, scales.data(), sums.data()}; }
  int leaf_pad;
  int64_t stride;
  std::vector<int8_t> data;
  std::vector<float> scales;
  std::vector<int32_t> sums;
};

// bf16 rows in the leaf layout of a weight.
struct Bf16Input {
  Bf16Input(RandomStream& random, int num_rows, int num_leaves, int leaf_k)
      : leaf_pad((leaf_k + 1) / 2 * 2), stride(int64_t{num_leaves} * leaf_pad + 3), data(num_rows * stride) {
    for (int row = 0; row < num_rows; ++row) {
      for (int leaf = 0; leaf < num_leaves; ++leaf) {
        for (int k = 0; k < leaf_k; ++k) data[row * stride + leaf * leaf_pad + k] = ToBf16(Normal(random));
      }
    }
  }
  Bf16Rows view() const { return {data.data(), stride}; }
  int leaf_pad;
  int64_t stride;
  std::vector<Bf16> data;
};

}  // namespace tessera::kernels
