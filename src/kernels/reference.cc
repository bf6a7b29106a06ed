// The meaning of every kernel: plain loops over the definitions of docs/numerics.md. The table `scalar`, and
// what every other table must equal bit for bit. No vector code, no blocking; chains of bf16 go on side by
// side, since one alone waits for itself. It needs FMA so that a fused multiply-add is one instruction,
// correctly rounded and flushing like the vector units do.
#include "kernels/kernels.h"
#include "kernels/tables.h"
#include "kernels/target.h"

TESSERA_TARGET_PUSH("fma")

namespace tessera::kernels {
namespace reference {
namespace {

constexpr int kLanes = 64;  // of sums that stay on one rank

float Fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
uint32_t Bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}
float FromBits(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
uint32_t MagnitudeBits(float x) {
  return Bits(x) & 0x7fffffff;
}
bool IsFinite(float x) {
  return MagnitudeBits(x) < kInfinityBits;
}
// NaN gives `low`.
float Clamp(float x, float low, float high) {
  const float raised = x > low ? x : low;
  return raised < high ? raised : high;
}

// Adds lanes pairwise, 32, 16, 8, 4, 2, 1 apart.
float FoldLanes(float* lanes) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    for (int j = 0; j < apart; ++j) lanes[j] += lanes[j + apart];
  }
  return lanes[0];
}

float PowerOfTwo(int exponent) {
  return FromBits(static_cast<uint32_t>(exponent + 127) << 23);
}

float Exp(float x) {
  if (x > 88.72f) return FromBits(kInfinityBits);
  if (x < -87.33f) return 0.0f;
  if (!IsFinite(x)) return x;  // NaN
  const float n = __builtin_rintf(x * 0x1.715476p+0f);
  float r = Fma(n, -0x1.62e4p-1f, x);
  r = Fma(n, -0x1.7f7d1cp-20f, r);
  float p = 0x1.6a23dcp-10f;
  p = Fma(p, r, 0x1.123a24p-7f);
  p = Fma(p, r, 0x1.5558f2p-5f);
  p = Fma(p, r, 0x1.55549p-3f);
  p = Fma(p, r, 0x1.fffffcp-2f);
  p = Fma(p, r, 1.0f);
  p = Fma(p, r, 1.0f);
  const int exponent = static_cast<int>(n);
  const int half = exponent >> 1;
  return (p * PowerOfTwo(half)) * PowerOfTwo(exponent - half);
}

float Sigmoid(float x) {
  return 1.0f / (1.0f + Exp(-x));
}

// ---- Rows

bool RmsNorm(const float* x, const float* weight, int n, float eps, float* out) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) lanes[i % kLanes] = Fma(x[i], x[i], lanes[i % kLanes]);
  const float sum = FoldLanes(lanes);
  const float r = 1.0f / __builtin_sqrtf(sum / static_cast<float>(n) + eps);
  for (int i = 0; i < n; ++i) out[i] = (x[i] * r) * weight[i];
  return IsFinite(sum);
}

void QuantizeStatic(const float* x, const float* beta, const float* inverse_scale, bool per_channel,
                    float zero_point, int n, int num_leaves, int8_t* out, int32_t* sums) {
  const int leaf_k = n / num_leaves;
  const int leaf_pad = (leaf_k + 3) / 4 * 4;
  for (int leaf = 0; leaf < num_leaves; ++leaf) {
    sums[leaf] = 0;
    for (int k = 0; k < leaf_pad; ++k) {
      const int i = leaf * leaf_k + k;
      int8_t& q = out[leaf * leaf_pad + k];
      q = 0;
      if (k >= leaf_k) continue;
      const float value = beta != nullptr ? x[i] + beta[i] : x[i];
      const float rounded = __builtin_rintf(value * inverse_scale[per_channel ? i : 0]);
      q = static_cast<int8_t>(Clamp(rounded + zero_point, -128.0f, 127.0f));
      sums[leaf] += q;
    }
  }
}

void QuantizeDynamic(const float* x, int n, int num_leaves, int8_t* out, float* scales, int32_t* sums) {
  const int leaf_k = n / num_leaves;
  const int leaf_pad = (leaf_k + 3) / 4 * 4;
  for (int leaf = 0; leaf < num_leaves; ++leaf) {
    const float* piece = x + leaf * leaf_k;
    uint32_t largest = Bits(1e-10f);
    for (int k = 0; k < leaf_k; ++k) {
      if (MagnitudeBits(piece[k]) > largest) largest = MagnitudeBits(piece[k]);
    }
    const float a = FromBits(largest);
    scales[leaf] = a / 127.0f;
    const float inverse = 127.0f / a;
    sums[leaf] = 0;
    for (int k = 0; k < leaf_pad; ++k) {
      int8_t& q = out[leaf * leaf_pad + k];
      q = 0;
      if (k >= leaf_k) continue;
      q = static_cast<int8_t>(Clamp(__builtin_rintf(piece[k] * inverse), -127.0f, 127.0f));
      sums[leaf] += q;
    }
  }
}

void ToBf16Row(const float* x, int n, Bf16* out) {
  for (int i = 0; i < n; ++i) out[i] = ToBf16(x[i]);
}

void ToFloatRow(const Bf16* x, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = ToFloat(x[i]);
}

void SiluMul(const Bf16* gate, const Bf16* up, int n, float* out) {
  for (int i = 0; i < n; ++i) {
    const float g = ToFloat(gate[i]);
    out[i] = g / (1.0f + Exp(-g)) * ToFloat(up[i]);
  }
}

void Rope(const Bf16* x, const float* cos, const float* sin, int n, Bf16* out) {
  for (int pair = 0; pair < n / 2; ++pair) {
    const float a = ToFloat(x[2 * pair]);
    const float b = ToFloat(x[2 * pair + 1]);
    const float real = a * cos[pair] - b * sin[pair];
    const float imaginary = a * sin[pair] + b * cos[pair];
    out[2 * pair] = ToBf16(real);
    out[2 * pair + 1] = ToBf16(imaginary);
  }
}

void AddFixed(const int64_t* sums, int n, float* residual) {
  for (int i = 0; i < n; ++i) residual[i] += ToFloat(ToBf16(static_cast<float>(sums[i]) * 0x1p-28f));
}

void SigmoidRow(const float* x, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = Sigmoid(x[i]);
}

RowRange Range(const float* x, int n, float* block_maxima) {
  const float infinity = FromBits(kInfinityBits);
  RowRange range = {.min = infinity, .max = -infinity, .finite = true};
  for (int block = 0; block < NumMaxBlocks(n); ++block) block_maxima[block] = -infinity;
  for (int i = 0; i < n; ++i) {
    float& block_max = block_maxima[i / kMaxBlock];
    if (x[i] < range.min) range.min = x[i] + 0.0f;
    if (x[i] > range.max) range.max = x[i] + 0.0f;
    if (x[i] > block_max) block_max = x[i] + 0.0f;
    if (!(x[i] < infinity)) range.finite = false;
  }
  return range;
}

int Select(const float* x, int n, float low, float high, int32_t first_id, int32_t* ids) {
  int count = 0;
  for (int i = 0; i < n; ++i) {
    if (x[i] >= low && x[i] < high) ids[count++] = first_id + i;
  }
  return count;
}

float ExpSum(const float* x, int n, float divisor, float shift, float* out) {
  float lanes[kLanes] = {};
  for (int i = 0; i < n; ++i) {
    const float e = Exp(x[i] / divisor - shift);
    lanes[i % kLanes] += e;
    if (out != nullptr) out[i] = e;
  }
  return FoldLanes(lanes);
}

float NearExpSum(const float* x, int n, float divisor, float shift) {
  return ExpSum(x, n, divisor, shift, nullptr);
}

// ---- Matrix products

int InRow(const RowMap& rows, int i) {
  return rows.in_rows != nullptr ? rows.in_rows[i] : i;
}
int OutRow(const RowMap& rows, int i) {
  return rows.out_rows != nullptr ? rows.out_rows[i] : i;
}
int Least(int a, int b) {
  return a < b ? a : b;
}

// Sum of activation x weight over one leaf.
int32_t DotInt8(const Int8Rows& in, int row, const PackedInt8& weight, int column, int leaf) {
  const int8_t* x = in.data + row * in.stride + int64_t{leaf} * weight.leaf_pad();
  const uint8_t* w = weight.panels + column / kInt8Panel * weight.panel_bytes() + leaf * weight.leaf_bytes() +
                     column % kInt8Panel * 4;
  int32_t acc = 0;
  for (int quad = 0; quad < weight.leaf_quads(); ++quad, x += 4, w += kInt8Panel * 4) {
    for (int i = 0; i < 4; ++i) acc += x[i] * (w[i] - 128);
  }
  return acc;
}

// The pair chains of one leaf for the outputs of a panel, of which the last panel may hold fewer.
struct PairChains {
  float acc[kFloatPanel] = {};
  int count = 0;

  PairChains(const Bf16Rows& in, int row, const PackedBf16& weight, int panel, int leaf) {
    const Bf16* x = in.data + row * in.stride + int64_t{leaf} * weight.leaf_pad();
    const Bf16* w = weight.panels + panel * weight.panel_elements() + leaf * weight.leaf_elements();
    count = Least(weight.num_outputs - panel * kFloatPanel, kFloatPanel);
    for (int pair = 0; pair < weight.leaf_pairs(); ++pair, x += 2, w += kFloatPanel * 2) {
      uint32_t words[kFloatPanel];  // an even element below an odd one
      __builtin_memcpy(words, w, sizeof words);
      for (int n = 0; n < kFloatPanel; ++n) {
        const float odd = FromBits(words[n] & 0xffff0000);
        const float even = FromBits(words[n] << 16);
        acc[n] = Fma(ToFloat(x[0]), even, Fma(ToFloat(x[1]), odd, acc[n]));
      }
    }
  }
};

// Adds one leaf value to an output, unless it is out of range.
void AddTerm(float c, const FixedRows& out, int row, int column) {
  if (MagnitudeBits(c) >= kMaxTermBits) {
    out.out_of_range[row] = 1;
    return;
  }
  out.sums[row * out.stride + column] += _mm_cvtss_si64(_mm_set_ss(c * 0x1p28f));  // rounds to nearest even
}

void GemmInt8Static(const Int8Rows& in, const PackedInt8& weight, const StaticScales& scales,
                    const RowMap& rows, int panel_begin, int panel_end, Bf16* out, int64_t out_stride) {
  for (int i = 0; i < rows.count; ++i) {
    for (int n = panel_begin * kInt8Panel; n < Least(panel_end * kInt8Panel, weight.num_outputs); ++n) {
      const int32_t acc = DotInt8(in, InRow(rows, i), weight, n, 0);
      const float value = static_cast<float>(acc + scales.quant_bias[n]) * scales.deq_scale[n];
      out[OutRow(rows, i) * out_stride + n] = ToBf16(value);
    }
  }
}

void GemmInt8Dynamic(const Int8Rows& in, const PackedInt8& weight, const float* weight_scale,
                     const RowMap& rows, int panel_begin, int panel_end, Bf16* out, int64_t out_stride) {
  for (int i = 0; i < rows.count; ++i) {
    const float scale = in.scales[InRow(rows, i)];
    for (int n = panel_begin * kInt8Panel; n < Least(panel_end * kInt8Panel, weight.num_outputs); ++n) {
      const int32_t acc = DotInt8(in, InRow(rows, i), weight, n, 0);
      out[OutRow(rows, i) * out_stride + n] = ToBf16(static_cast<float>(acc) * (scale * weight_scale[n]));
    }
  }
}

void GemmInt8DynamicFixed(const Int8Rows& in, const PackedInt8& weight, const float* weight_scale,
                          const float* row_weight, const RowMap& rows, int panel_begin, int panel_end,
                          const FixedRows& out) {
  for (int i = 0; i < rows.count; ++i) {
    const int row = InRow(rows, i);
    const float factor = row_weight != nullptr ? row_weight[i] : 1.0f;
    for (int n = panel_begin * kInt8Panel; n < Least(panel_end * kInt8Panel, weight.num_outputs); ++n) {
      for (int leaf = 0; leaf < weight.num_leaves; ++leaf) {
        const float acc = static_cast<float>(DotInt8(in, row, weight, n, leaf));
        const float scale = in.scales[int64_t{row} * weight.num_leaves + leaf];
        AddTerm(((factor * scale) * weight_scale[n]) * acc, out, OutRow(rows, i), n);
      }
    }
  }
}

void GemmInt8StaticFixed(const Int8Rows& in, const PackedInt8& weight, const StaticScales& scales,
                         const float* row_weight, const RowMap& rows, int panel_begin, int panel_end,
                         const FixedRows& out) {
  for (int i = 0; i < rows.count; ++i) {
    const float factor = row_weight != nullptr ? row_weight[i] : 1.0f;
    for (int n = panel_begin * kInt8Panel; n < Least(panel_end * kInt8Panel, weight.num_outputs); ++n) {
      for (int leaf = 0; leaf < weight.num_leaves; ++leaf) {
        const int32_t acc =
            DotInt8(in, InRow(rows, i), weight, n, leaf) + (leaf == 0 ? scales.quant_bias[n] : 0);
        AddTerm((factor * scales.deq_scale[n]) * static_cast<float>(acc), out, OutRow(rows, i), n);
      }
    }
  }
}

void GemmBf16(const Bf16Rows& in, const PackedBf16& weight, const RowMap& rows, int panel_begin,
              int panel_end, Bf16* out, int64_t out_stride) {
  for (int i = 0; i < rows.count; ++i) {
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      const PairChains chains(in, InRow(rows, i), weight, panel, 0);
      Bf16* at = out + OutRow(rows, i) * out_stride + panel * kFloatPanel;
      for (int j = 0; j < chains.count; ++j) at[j] = ToBf16(chains.acc[j]);
    }
  }
}

void GemmBf16Float(const Bf16Rows& in, const PackedBf16& weight, const RowMap& rows, int panel_begin,
                   int panel_end, float* out, int64_t out_stride) {
  for (int i = 0; i < rows.count; ++i) {
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      const PairChains chains(in, InRow(rows, i), weight, panel, 0);
      float* at = out + OutRow(rows, i) * out_stride + panel * kFloatPanel;
      for (int j = 0; j < chains.count; ++j) at[j] = chains.acc[j];
    }
  }
}

void GemmBf16Fixed(const Bf16Rows& in, const PackedBf16& weight, const float* row_weight, const RowMap& rows,
                   int panel_begin, int panel_end, const FixedRows& out) {
  for (int i = 0; i < rows.count; ++i) {
    const float factor = row_weight != nullptr ? row_weight[i] : 1.0f;
    for (int panel = panel_begin; panel < panel_end; ++panel) {
      for (int leaf = 0; leaf < weight.num_leaves; ++leaf) {
        const PairChains chains(in, InRow(rows, i), weight, panel, leaf);
        for (int j = 0; j < chains.count; ++j) {
          AddTerm(factor * chains.acc[j], out, OutRow(rows, i), panel * kFloatPanel + j);
        }
      }
    }
  }
}

void GemmFloat(const float* in, int64_t in_stride, const PackedFloat& weight, int num_rows, int panel_begin,
               int panel_end, float* out, int64_t out_stride) {
  for (int row = 0; row < num_rows; ++row) {
    for (int n = panel_begin * kFloatPanel; n < Least(panel_end * kFloatPanel, weight.num_outputs); ++n) {
      const float* w = weight.panels + int64_t{n / kFloatPanel} * weight.k * kFloatPanel + n % kFloatPanel;
      float acc = 0;
      for (int k = 0; k < weight.k; ++k) acc = Fma(in[row * in_stride + k], w[int64_t{k} * kFloatPanel], acc);
      out[row * out_stride + n] = acc;
    }
  }
}

// ---- Attention

const Bf16* CacheRow(const CachePages& pages, int position) {
  return pages.base + pages.block_ids[position / pages.block_size] * pages.block_stride +
         position % pages.block_size * pages.row_stride;
}

// The scores and probabilities of one canonical block for one row: positions [begin, begin + count).
struct BlockScores {
  float m = 0;
  float l = 0;
  Bf16 p[kAttentionBlock] = {};
  bool finite = true;
};

void ScoreBlock(const AttentionTile& tile, int row, int begin, int count, BlockScores* block) {
  const Bf16* query = tile.queries.data + row * tile.queries.stride;
  float scores[kAttentionBlock];
  block->m = FromBits(0xff800000);
  for (int t = 0; t < count; ++t) {
    const Bf16* key = CacheRow(tile.pages, begin + t) + tile.key_begin;
    float acc = 0;
    for (int k = 0; k < tile.key_width; k += 2) {
      const bool both = k + 1 < tile.key_width;
      acc = Fma(both ? ToFloat(query[k + 1]) : 0.0f, both ? ToFloat(key[k + 1]) : 0.0f, acc);
      acc = Fma(ToFloat(query[k]), ToFloat(key[k]), acc);
    }
    scores[t] = acc * tile.softmax_scale;
    if (!IsFinite(scores[t])) block->finite = false;
    if (scores[t] > block->m) block->m = scores[t];
  }
  float lanes[kLanes] = {};
  for (int t = 0; t < count; ++t) {
    block->p[t] = ToBf16(Exp(scores[t] - block->m));
    lanes[t % kLanes] += ToFloat(block->p[t]);
  }
  block->l = FoldLanes(lanes);
}

// o of the block. A pair's second position beyond the visible ones counts as zero.
void BlockOutput(const AttentionTile& tile, const BlockScores& block, int begin, int count, float* output) {
  for (int d = 0; d < tile.value_width; ++d) output[d] = 0;
  for (int t = 0; t < count; t += 2) {
    const bool both = t + 1 < count;
    const Bf16* even = CacheRow(tile.pages, begin + t);
    const Bf16* odd = both ? CacheRow(tile.pages, begin + t + 1) : nullptr;
    const float p_even = ToFloat(block.p[t]);
    const float p_odd = both ? ToFloat(block.p[t + 1]) : 0.0f;
    for (int d = 0; d < tile.value_width; ++d) {
      output[d] = Fma(p_odd, both ? ToFloat(odd[d]) : 0.0f, output[d]);
      output[d] = Fma(p_even, ToFloat(even[d]), output[d]);
    }
  }
  for (int d = 0; d < tile.value_width; ++d) output[d] += 0.0f;
}

// One block of one row into its place in `part`.
bool AttendRow(const AttentionTile& tile, int row, int begin, const AttentionPart& part) {
  const int count = Least(tile.num_visible[row] - begin, kAttentionBlock);
  BlockScores block;
  ScoreBlock(tile, row, begin, count, &block);
  part.m[row] = block.m;
  part.l[row] = block.l;
  float* output = part.output + int64_t{row} * AttentionPart::Pad(tile.value_width);
  BlockOutput(tile, block, begin, count, output);
  return block.finite;
}

// Merges a later block of one row onto `onto`, what is merged below it.
void MergeRow(const AttentionTile& tile, int row, const AttentionPart& onto, const AttentionPart& block) {
  const float m = onto.m[row] > block.m[row] ? onto.m[row] : block.m[row];
  const float a = Exp(onto.m[row] - m);
  const float b = Exp(block.m[row] - m);
  const int64_t at = int64_t{row} * AttentionPart::Pad(tile.value_width);
  for (int d = 0; d < tile.value_width; ++d) {
    onto.output[at + d] = Fma(block.output[at + d], b, onto.output[at + d] * a);
  }
  onto.l[row] = Fma(block.l[row], b, onto.l[row] * a);
  onto.m[row] = m;
}

void FinishRow(const AttentionTile& tile, int row, const AttentionPart& merged, Bf16* out) {
  const float* output = merged.output + int64_t{row} * AttentionPart::Pad(tile.value_width);
  for (int d = 0; d < tile.value_width; ++d) out[d] = ToBf16(output[d] / merged.l[row]);
}

bool Attention(const AttentionTile& tile, void* scratch, Bf16* out, int64_t out_stride, uint64_t* bad_rows) {
  const AttentionPart merged(scratch, tile.value_width);
  const AttentionPart next(static_cast<std::byte*>(scratch) + AttentionPart::SizeBytes(tile.value_width),
                           tile.value_width);
  uint64_t bad = 0;
  for (int row = 0; row < tile.num_rows; ++row) {
    for (int begin = 0; begin < tile.num_visible[row]; begin += kAttentionBlock) {
      if (!AttendRow(tile, row, begin, begin == 0 ? merged : next)) bad |= uint64_t{1} << row;
      if (begin > 0) MergeRow(tile, row, merged, next);
    }
    FinishRow(tile, row, merged, out + row * out_stride);
  }
  if (bad_rows != nullptr) *bad_rows = bad;
  return bad == 0;
}

bool AttentionBlock(const AttentionTile& tile, int block, void* scratch, void* part) {
  bool finite = true;
  for (int row = 0; row < tile.num_rows; ++row) {
    if (tile.num_visible[row] <= block * kAttentionBlock) continue;
    if (!AttendRow(tile, row, block * kAttentionBlock, AttentionPart(part, tile.value_width))) finite = false;
  }
  return finite;
}

void MergeAttention(const AttentionTile& tile, int block, const void* part, int row_begin, int row_end,
                    void* merged) {
  for (int row = row_begin; row < row_end; ++row) {
    if (tile.num_visible[row] <= block * kAttentionBlock) continue;
    MergeRow(tile, row, AttentionPart(merged, tile.value_width), AttentionPart(part, tile.value_width));
  }
}

void FinishAttention(const AttentionTile& tile, const void* merged, int row_begin, int row_end, Bf16* out,
                     int64_t out_stride) {
  for (int row = row_begin; row < row_end; ++row) {
    FinishRow(tile, row, AttentionPart(merged, tile.value_width), out + row * out_stride);
  }
}

}  // namespace
}  // namespace reference

float ScalarExp(float x) {
  return reference::Exp(x);
}

float ScalarLog(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (bits >= kInfinityBits) return x;                  // infinity, NaN; x >= 1 otherwise
  const uint32_t exponent = (bits - 0x3f3504f3) >> 23;  // of m in [0x1.6a09e6p-1, 2 * 0x1.6a09e6p-1)
  const float m = __builtin_bit_cast(float, bits - (exponent << 23));
  const float e = static_cast<float>(static_cast<int>(exponent));
  const float f = m - 1.0f;
  const float s = f / (f + 2.0f);
  const float z = s * s;
  float p = 0x1.c71c72p-4f;
  p = __builtin_fmaf(p, z, 0x1.24924ap-3f);
  p = __builtin_fmaf(p, z, 0x1.99999ap-3f);
  p = __builtin_fmaf(p, z, 0x1.555556p-2f);
  float t = __builtin_fmaf(s * z, p, s);
  t = t + t;
  return __builtin_fmaf(e, 0x1.62e4p-1f, __builtin_fmaf(e, 0x1.7f7d1cp-20f, t));
}

const Kernels kScalarTable = {
    .isa = Isa::kScalar,
    .rms_norm = reference::RmsNorm,
    .quantize_static = reference::QuantizeStatic,
    .quantize_dynamic = reference::QuantizeDynamic,
    .to_bf16 = reference::ToBf16Row,
    .to_float = reference::ToFloatRow,
    .silu_mul = reference::SiluMul,
    .rope = reference::Rope,
    .add_fixed = reference::AddFixed,
    .sigmoid = reference::SigmoidRow,
    .range = reference::Range,
    .select = reference::Select,
    .exp_sum = reference::ExpSum,
    .near_exp_sum = reference::NearExpSum,
    .log = ScalarLog,
    .gemm_int8_static = reference::GemmInt8Static,
    .gemm_int8_dynamic = reference::GemmInt8Dynamic,
    .gemm_int8_dynamic_fixed = reference::GemmInt8DynamicFixed,
    .gemm_int8_static_fixed = reference::GemmInt8StaticFixed,
    .gemm_bf16 = reference::GemmBf16,
    .gemm_bf16_float = reference::GemmBf16Float,
    .gemm_bf16_fixed = reference::GemmBf16Fixed,
    .gemm_float = reference::GemmFloat,
    .attention = reference::Attention,
    .attention_block = reference::AttentionBlock,
    .attention_merge = reference::MergeAttention,
    .attention_finish = reference::FinishAttention,
};

}  // namespace tessera::kernels

TESSERA_TARGET_POP
