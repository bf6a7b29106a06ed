// Packs weights for the kernels: every layout is a transposition of 32-bit words (a quad of int8, a pair of
// bf16 or one fp32 of each output), done in blocks so that loading runs at the speed of memory. Called at
// load only.
#include <emmintrin.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "base/check.h"
#include "kernels/kernels.h"

namespace tessera::kernels {
namespace {

constexpr int64_t kWord = 4;         // bytes
constexpr int64_t kBlockWords = 16;  // one cache line of a row

// Writes `num_words` words, a multiple of 4, of four rows: target[word * step + row] = the row's word ^ flip.
// Strides in bytes.
void TransposeBlock(const std::byte* rows, int64_t stride, int64_t num_words, uint32_t flip,
                    std::byte* target, int64_t step) {
  const __m128i flips = _mm_set1_epi32(static_cast<int>(flip));
  const auto load = [&](int row, int64_t at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + row * stride + at));
  };
  const auto store = [&](int64_t word, __m128i lanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + word * step), _mm_xor_si128(lanes, flips));
  };
  for (int64_t word = 0; word < num_words; word += 4) {
    const __m128i a = load(0, word * kWord);
    const __m128i b = load(1, word * kWord);
    const __m128i c = load(2, word * kWord);
    const __m128i d = load(3, word * kWord);
    const __m128i ab_low = _mm_unpacklo_epi32(a, b);
    const __m128i ab_high = _mm_unpackhi_epi32(a, b);
    const __m128i cd_low = _mm_unpacklo_epi32(c, d);
    const __m128i cd_high = _mm_unpackhi_epi32(c, d);
    store(word, _mm_unpacklo_epi64(ab_low, cd_low));
    store(word + 1, _mm_unpackhi_epi64(ab_low, cd_low));
    store(word + 2, _mm_unpacklo_epi64(ab_high, cd_high));
    store(word + 3, _mm_unpackhi_epi64(ab_high, cd_high));
  }
}

// One leaf of one panel: target[word][lane] = word of row `lane` ^ flip, where rows from num_rows on and
// bytes from leaf_bytes on count as zero. The second loop alone is the meaning; the first does whole blocks
// of it.
template <int kLanes>
void PackLeaf(const std::byte* rows, int64_t stride, int num_rows, int64_t leaf_bytes, uint32_t flip,
              std::byte* target) {
  constexpr int64_t kStep = kLanes * kWord;
  int64_t at = 0;
  if (num_rows == kLanes) {
    while (leaf_bytes - at >= 4 * kWord) {
      const int64_t num_words = std::min(kBlockWords, (leaf_bytes - at) / (4 * kWord) * 4);
      for (int lane = 0; lane < kLanes; lane += 4)
        TransposeBlock(rows + lane * stride + at, stride, num_words, flip, target + lane * kWord, kStep);
      at += num_words * kWord;
      target += num_words * kStep;
    }
  }
  for (; at < leaf_bytes; at += kWord, target += kStep) {
    const auto inside = static_cast<size_t>(std::min(kWord, leaf_bytes - at));
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t word = 0;
      if (lane < num_rows) std::memcpy(&word, rows + lane * stride + at, inside);
      word ^= flip;
      std::memcpy(target + lane * kWord, &word, kWord);
    }
  }
}

// Row-major weights as bytes: [num_outputs][num_leaves][leaf_bytes], rows `stride` bytes apart.
struct Source {
  const void* weight;
  int64_t stride;
  int num_outputs, num_leaves;
  int64_t leaf_bytes;
};

// Panels [panel_begin, panel_end).
template <int kLanes>
void PackPanels(const Source& source, uint32_t flip, int panel_begin, int panel_end, void* target) {
  CHECK_GE(panel_begin, 0);
  CHECK_LE(panel_end, (source.num_outputs + kLanes - 1) / kLanes);
  const int64_t packed_leaf_bytes = (source.leaf_bytes + kWord - 1) / kWord * kWord * kLanes;
  auto* at = static_cast<std::byte*>(target) + panel_begin * packed_leaf_bytes * source.num_leaves;
  for (int panel = panel_begin; panel < panel_end; ++panel) {
    const auto* rows = static_cast<const std::byte*>(source.weight) + int64_t{panel} * kLanes * source.stride;
    const int num_rows = std::min(kLanes, source.num_outputs - panel * kLanes);
    for (int leaf = 0; leaf < source.num_leaves; ++leaf, at += packed_leaf_bytes)
      PackLeaf<kLanes>(rows + leaf * source.leaf_bytes, source.stride, num_rows, source.leaf_bytes, flip, at);
  }
}

}  // namespace

void PackInt8(const int8_t* weight, int64_t stride, const PackedInt8& shape, int panel_begin, int panel_end,
              uint8_t* target) {
  constexpr uint32_t kPlus128 = 0x80808080;
  PackPanels<kInt8Panel>({weight, stride, shape.num_outputs, shape.num_leaves, shape.leaf_k}, kPlus128,
                         panel_begin, panel_end, target);
}

void PackBf16(const Bf16* weight, int64_t stride, const PackedBf16& shape, int panel_begin, int panel_end,
              Bf16* target) {
  constexpr int64_t kBytes = sizeof(Bf16);
  PackPanels<kFloatPanel>(
      {weight, stride * kBytes, shape.num_outputs, shape.num_leaves, shape.leaf_k * kBytes}, 0, panel_begin,
      panel_end, target);
}

void PackBf16Transposed(const Bf16* weight, int64_t stride, const PackedBf16& shape, Bf16* target) {
  CHECK_EQ(shape.num_leaves, 1);
  for (int panel = 0; panel < shape.num_panels(); ++panel) {
    const Bf16* columns = weight + panel * kFloatPanel;
    const int num_lanes = std::min(kFloatPanel, shape.num_outputs - panel * kFloatPanel);
    for (int k = 0; k < shape.leaf_pad(); k += 2, target += 2 * kFloatPanel) {
      Bf16 even[kFloatPanel] = {};
      Bf16 odd[kFloatPanel] = {};
      std::copy_n(columns + k * stride, num_lanes, even);
      if (k + 1 < shape.leaf_k) std::copy_n(columns + (k + 1) * stride, num_lanes, odd);
      for (int lane = 0; lane < kFloatPanel; ++lane) {
        target[2 * lane] = even[lane];
        target[2 * lane + 1] = odd[lane];
      }
    }
  }
}

void PackFloat(const float* weight, int64_t stride, const PackedFloat& shape, float* target) {
  constexpr int64_t kBytes = sizeof(float);
  PackPanels<kFloatPanel>({weight, stride * kBytes, shape.num_outputs, 1, shape.k * kBytes}, 0, 0,
                          shape.num_panels(), target);
}

}  // namespace tessera::kernels
