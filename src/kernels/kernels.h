// THE FACE of kernels/: the arithmetic of one forward pass on plain memory, by the canonical numerics
// `tessera-2` (docs/numerics.md). No tensors, no weights, no ranks, no threads of its own.
//
// One table of functions per instruction set; all tables give the same bits. `scalar` is the plain reference
// (reference.cc): the meaning of every kernel. The table is chosen once, at start. Every thread that calls a
// kernel has called SetFlushToZero() (base/threads.h).
//
// Shapes are [rows][columns], row-major; strides count elements. Rows never influence each other. Where a
// result is NaN every table gives NaN, but not always the same payload: such rows are refused, never used.
// Pointers need natural alignment only, packed weights 64 bytes.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/error.h"

namespace tessera::kernels {

// The name of the arithmetic: any change of a rule that can move a bit is a new name.
inline constexpr std::string_view kNumerics = "tessera-2";

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };
std::string_view IsaName(Isa isa);  // "scalar", "avx2", "avx512", "avx512bf16"

struct Bf16 {
  uint16_t bits = 0;
};
inline float ToFloat(Bf16 x) {
  return __builtin_bit_cast(float, uint32_t{x.bits} << 16);
}
Bf16 ToBf16(float x);  // round to nearest even; NaN stays NaN. Denormals flush to signed zero.

// ---- Packed weights: views, they own nothing. A weight is [num_outputs][K]; K is cut into num_leaves leaves
// of leaf_k columns, each padded with zeros to the kernel's step, so that pairs and quads never cross a leaf.

inline constexpr int kNumLeaves = 16;   // of every row-parallel linear (numerics.md, "Fixed point")
inline constexpr int kInt8Panel = 32;   // outputs per panel of an int8 weight
inline constexpr int kFloatPanel = 16;  // outputs per panel of a bf16 or fp32 weight

// [panel][leaf][leaf_quads()][kInt8Panel][4], value + 128 as unsigned; padding holds 128 (zero).
struct PackedInt8 {
  const uint8_t* panels = nullptr;
  int num_outputs = 0;
  int num_leaves = 1;
  int leaf_k = 0;
  int num_panels() const { return (num_outputs + kInt8Panel - 1) / kInt8Panel; }
  int leaf_quads() const { return (leaf_k + 3) / 4; }
  int leaf_pad() const { return leaf_quads() * 4; }  // int8 values per leaf of an activation row
  int64_t leaf_bytes() const { return int64_t{leaf_quads()} * kInt8Panel * 4; }
  int64_t panel_bytes() const { return leaf_bytes() * num_leaves; }
  int64_t size_bytes() const { return panel_bytes() * num_panels(); }
};

// [panel][leaf][leaf_pairs()][kFloatPanel][2]; padding holds zero.
struct PackedBf16 {
  const Bf16* panels = nullptr;
  int num_outputs = 0;
  int num_leaves = 1;
  int leaf_k = 0;
  int num_panels() const { return (num_outputs + kFloatPanel - 1) / kFloatPanel; }
  int leaf_pairs() const { return (leaf_k + 1) / 2; }
  int leaf_pad() const { return leaf_pairs() * 2; }
  int64_t leaf_elements() const { return int64_t{leaf_pairs()} * kFloatPanel * 2; }
  int64_t panel_elements() const { return leaf_elements() * num_leaves; }
  int64_t size_bytes() const { return panel_elements() * num_panels() * 2; }
};

// [panel][k][kFloatPanel], fp32: the router gate.
struct PackedFloat {
  const float* panels = nullptr;
  int num_outputs = 0;
  int k = 0;
  int num_panels() const { return (num_outputs + kFloatPanel - 1) / kFloatPanel; }
  int64_t size_bytes() const { return int64_t{num_panels()} * k * kFloatPanel * 4; }
};

// Packs row-major weights [num_outputs][num_leaves * leaf_k] (row stride `stride`) into `shape`'s layout at
// `target` (shape.size_bytes() bytes). Only panels [panel_begin, panel_end) are written: threads share the
// work.
void PackInt8(const int8_t* weight, int64_t stride, const PackedInt8& shape, int panel_begin, int panel_end,
              uint8_t* target);
void PackBf16(const Bf16* weight, int64_t stride, const PackedBf16& shape, int panel_begin, int panel_end,
              Bf16* target);
// The same from the transposed weight [leaf_k][num_outputs] (row stride `stride`): all panels, one leaf.
void PackBf16Transposed(const Bf16* weight, int64_t stride, const PackedBf16& shape, Bf16* target);
void PackFloat(const float* weight, int64_t stride, const PackedFloat& shape, float* target);

// ---- Activations

// Quantised rows. Row m starts at data + m * stride and holds num_leaves pieces of leaf_pad() values (zero
// padded), the layout of the weight it is made for.
struct Int8Rows {
  const int8_t* data = nullptr;
  int64_t stride = 0;
  const float* scales = nullptr;  // [m][num_leaves]; dynamic only
  const int32_t* sums = nullptr;  // [m][num_leaves]: sum of a piece's values
};

// bf16 rows; the same leaf layout where num_leaves > 1, K (padded to even with zero) values otherwise.
struct Bf16Rows {
  const Bf16* data = nullptr;
  int64_t stride = 0;
};

// Which rows a matrix product reads and writes. Output i = 0 .. count-1 reads input row in_rows[i] (i where
// null) and writes or adds to output row out_rows[i] (i where null). One call never names an output row
// twice.
struct RowMap {
  int count = 0;
  const int32_t* in_rows = nullptr;
  const int32_t* out_rows = nullptr;
};

// Where row-parallel products go: canonical fixed point, int64 units of 2^-28.
struct FixedRows {
  int64_t* sums = nullptr;  // [row][stride]; terms are added, those with |c| >= 2^27 or NaN add nothing
  int64_t stride = 0;
  // [row], of the calling thread: set to 1 where a term added nothing, never cleared here.
  uint8_t* out_of_range = nullptr;
};
inline constexpr uint32_t kMaxTermBits = 0x4d000000;   // 2^27: |c| must be below (bits must be less)
inline constexpr uint32_t kInfinityBits = 0x7f800000;  // absolute bits at or above: not finite

// A static int8 linear's epilogue: float(acc + quant_bias) * deq_scale.
struct StaticScales {
  const int32_t* quant_bias = nullptr;  // [num_outputs]
  const float* deq_scale = nullptr;     // [num_outputs]
};

// Keys and values of one sequence: a row of bf16 for every position. Position t lies at
// base + block_ids[t / block_size] * block_stride + (t % block_size) * row_stride; row_stride is a multiple
// of 32.
struct CachePages {
  const Bf16* base = nullptr;
  const int32_t* block_ids = nullptr;
  int block_size = 0;
  int64_t block_stride = 0;
  int64_t row_stride = 0;
};

inline constexpr int kAttentionBlock = 512;  // positions per canonical attention block, aligned to position 0
inline constexpr int kAttentionRows = 64;    // query rows per tile, at most

// One tile of query rows of one sequence. A row is one head of one token. A row of the cache holds the value
// in columns [0, value_width) and the key in [key_begin, key_begin + key_width). In the absorbed form they
// overlap: the key is [latent R | rope p], the value is the latent. Columns up to a multiple of 16 behind
// either are readable and finite, and 0 behind a key of odd width.
struct AttentionTile {
  Bf16Rows queries;                      // num_rows rows of key_width values
  int num_rows = 0;                      // 1 .. kAttentionRows
  const int32_t* num_visible = nullptr;  // [num_rows]: positions 0 .. num_visible-1 are visible; at least 1
  CachePages pages;
  int key_begin = 0;  // a multiple of 2
  int key_width = 0;
  int value_width = 0;
  float softmax_scale = 0;
  int num_blocks() const {  // that any row sees
    int positions = 0;
    for (int row = 0; row < num_rows; ++row) {
      positions = positions > num_visible[row] ? positions : num_visible[row];
    }
    return (positions + kAttentionBlock - 1) / kAttentionBlock;
  }
};
// Bytes of scratch that attention of a tile needs, and of the part that one block of it gives; both 64-byte
// aligned.
int64_t AttentionScratchBytes(int key_width, int value_width);
int64_t AttentionPartBytes(int value_width);

inline constexpr float kNearExpSum = 0.005f;  // relative error of near_exp_sum, at most
inline constexpr int kMaxBlock = 256;         // values per block of `max`
inline int NumMaxBlocks(int n) {
  return (n + kMaxBlock - 1) / kMaxBlock;
}
// The least and the greatest value of a row, NaN excluded; a zero is +0.
struct RowRange {
  float min = 0;        // +inf where there is nothing
  float max = 0;        // -inf where there is nothing
  bool finite = false;  // no NaN and no +inf; -inf may occur
};

struct Kernels {
  Isa isa;

  // -- Rows. Every function handles one row of n values.

  // out[i] = (x[i] * r) * weight[i], r = 1 / sqrt(sum64(x*x) / n + eps). Returns false, and still writes,
  // when the sum is not finite.
  bool (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  // q = clamp(rint((x + beta) * inverse_scale) + zero_point, -128, 127), in fp32; beta may be null.
  // inverse_scale has one value, or n where per_channel. Writes num_leaves pieces (n = num_leaves * leaf_k;
  // each padded to a multiple of 4 with zeros) and their sums [num_leaves]. NaN becomes -128.
  void (*quantize_static)(const float* x, const float* beta, const float* inverse_scale, bool per_channel,
                          float zero_point, int n, int num_leaves, int8_t* out, int32_t* sums);
  // Per leaf: a = max(absmax, 1e-10), scale = a / 127, q = clamp(rint(x * (127 / a)), -127, 127). The maximum
  // is taken on the bits of the absolute values: NaN wins and makes the scale NaN. A NaN product becomes
  // -127.
  void (*quantize_dynamic)(const float* x, int n, int num_leaves, int8_t* out, float* scales, int32_t* sums);
  void (*to_bf16)(const float* x, int n, Bf16* out);
  void (*to_float)(const Bf16* x, int n, float* out);
  // out = gate / (1 + exp(-gate)) * up, fp32.
  void (*silu_mul)(const Bf16* gate, const Bf16* up, int n, float* out);
  // Interleaved pairs, n even; cos and sin have n/2 values. out = bf16((a*c - b*s), (a*s + b*c)), products
  // and sums rounded separately. out may be x.
  void (*rope)(const Bf16* x, const float* cos, const float* sin, int n, Bf16* out);
  // residual[i] += float(bf16(float(sums[i]) * 2^-28)); one rounding from int64 to fp32.
  void (*add_fixed)(const int64_t* sums, int n, float* residual);
  // out = 1 / (1 + exp(-x)).
  void (*sigmoid)(const float* x, int n, float* out);
  // Also the greatest value of every kMaxBlock of them, by the same rules: block_maxima [NumMaxBlocks(n)].
  RowRange (*range)(const float* x, int n, float* block_maxima);
  // The ids first_id + i of all low <= x[i] < high, ascending, to `ids`, which has room for n + 16. How many.
  int (*select)(const float* x, int n, float low, float high, int32_t first_id, int32_t* ids);
  // out[i] = exp(x[i] / divisor - shift); REQUIRES no x[i] / divisor > shift (-inf may occur). Gives the
  // 64-lane sum of the results (lane = i mod 64). out may be null.
  float (*exp_sum)(const float* x, int n, float divisor, float shift, float* out);
  // A value near exp_sum(x, n, divisor, shift, null): that is within kNearExpSum * near + 2^-100 of it. Not
  // canonical, so only for what comes out the same for every sum that near. REQUIRES besides: n <= 2^20,
  // |shift| <= 1024, divisor >= 2^-10.
  float (*near_exp_sum)(const float* x, int n, float divisor, float shift);
  // log(x) for x >= 1, by the canonical polynomial.
  float (*log)(float x);

  // -- Matrix products on panels [panel_begin, panel_end) of the weight; output column = panel * width +
  // lane. Columns at or beyond num_outputs are never written.

  // out[row][column] = bf16(float(acc + quant_bias) * deq_scale)
  void (*gemm_int8_static)(const Int8Rows& in, const PackedInt8& weight, const StaticScales& scales,
                           const RowMap& rows, int panel_begin, int panel_end, Bf16* out, int64_t out_stride);
  // out[row][column] = bf16(float(acc) * (s_x * s_w[column])); one leaf.
  void (*gemm_int8_dynamic)(const Int8Rows& in, const PackedInt8& weight, const float* weight_scale,
                            const RowMap& rows, int panel_begin, int panel_end, Bf16* out,
                            int64_t out_stride);
  // Row-parallel. Per leaf c = ((row_weight * s_leaf) * s_w[column]) * float(acc); sums += rint(c * 2^28).
  // row_weight [rows.count] may be null: 1.
  void (*gemm_int8_dynamic_fixed)(const Int8Rows& in, const PackedInt8& weight, const float* weight_scale,
                                  const float* row_weight, const RowMap& rows, int panel_begin, int panel_end,
                                  const FixedRows& out);
  // Row-parallel, static: quant_bias belongs to leaf 0's acc; c = (row_weight * deq_scale[column]) *
  // float(acc).
  void (*gemm_int8_static_fixed)(const Int8Rows& in, const PackedInt8& weight, const StaticScales& scales,
                                 const float* row_weight, const RowMap& rows, int panel_begin, int panel_end,
                                 const FixedRows& out);
  // Pair chain over K; one leaf.
  void (*gemm_bf16)(const Bf16Rows& in, const PackedBf16& weight, const RowMap& rows, int panel_begin,
                    int panel_end, Bf16* out, int64_t out_stride);
  void (*gemm_bf16_float)(const Bf16Rows& in, const PackedBf16& weight, const RowMap& rows, int panel_begin,
                          int panel_end, float* out, int64_t out_stride);
  // Row-parallel: per leaf c = row_weight * (pair chain over the leaf).
  void (*gemm_bf16_fixed)(const Bf16Rows& in, const PackedBf16& weight, const float* row_weight,
                          const RowMap& rows, int panel_begin, int panel_end, const FixedRows& out);
  // Plain chain over k: the router gate. in is [rows][in_stride].
  void (*gemm_float)(const float* in, int64_t in_stride, const PackedFloat& weight, int num_rows,
                     int panel_begin, int panel_end, float* out, int64_t out_stride);

  // -- Attention of one tile over all its blocks: out[row][0..value_width) = bf16(o / l), by the rules
  // "attention block" and "blocks". Returns false, and still writes, when a visible score is not finite in
  // any row (bad_rows, a bit per row, says which; it may be null). Rows beside it stay exact. l sums the bf16
  // probabilities. No position is read that no row sees.
  bool (*attention)(const AttentionTile& tile, void* scratch, Bf16* out, int64_t out_stride,
                    uint64_t* bad_rows);
  // The same in steps, so that threads share a tile with many blocks: each of its num_blocks() blocks gives
  // a part; the later ones are merged onto the first, upwards; the merged part gives the answer. The last two
  // do rows [row_begin, row_end). Where a block gives false (a visible score is not finite), `attention` has
  // to answer for the tile.
  bool (*attention_block)(const AttentionTile& tile, int block, void* scratch, void* part);
  void (*attention_merge)(const AttentionTile& tile, int block, const void* part, int row_begin, int row_end,
                          void* merged);
  void (*attention_finish)(const AttentionTile& tile, const void* merged, int row_begin, int row_end,
                           Bf16* out, int64_t out_stride);
};

// The table of one instruction set. kInvalid, naming both, when the CPU lacks it. AVX2 and the scalar
// reference need FMA too.
Result<const Kernels*> ForIsa(Isa isa);
// The best table of this CPU; `forced` (the value of TESSERA_ISA, or empty) must be a name of IsaName.
Result<const Kernels*> Choose(std::string_view forced);

}  // namespace tessera::kernels
