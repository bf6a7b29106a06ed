// The cases of `tessera bench kernels`: every kernel at the shapes that a layer of DeepSeek-R1 gives it.
// Weights come from one stretch of memory larger than the caches, and each call takes the next piece of it.
#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>

#include "base/check.h"
#include "base/format.h"
#include "base/memory.h"
#include "base/random.h"
#include "kernels/bench.h"

namespace tessera::kernels {
namespace {

constexpr int kHidden = 7168;
constexpr int kMoeWidth = 2048;
constexpr int kMaxRows = 256;
constexpr int kMaxOutputs = 16160;  // an eighth of the vocabulary
constexpr int kLatent = 512;
constexpr int kRope = 64;
constexpr int kMaxPositions = 4096;
constexpr int kBlock = 128;  // positions per cache page
constexpr int kCacheStride = RoundUp(kLatent + kRope, 32);
constexpr int kMaxParts = 64;  // with outputs of their own
constexpr size_t kStreamBytes = size_t{256} << 20;
constexpr double kReferenceOperations = 2e7;  // what the scalar reference does in some 10 ms

int PartBegin(int count, int part, int parts) {
  return static_cast<int>(int64_t{count} * part / parts);
}

int ReferenceParts(double operations, int most) {
  return std::clamp(static_cast<int>(operations / kReferenceOperations), 1, most);
}

}  // namespace

struct KernelCases::Content {
  Content() {
    CHECK(memory.size_bytes() > 0);
    FillStream();
    RandomStream random(1);
    FillRows(random);
    FillAttention(random);
    for (const int rows : {1, 2, 4, 6, 8, 12, 16, 24, 64, 256}) AddInt8(rows);
    for (const int rows : {1, 2, 4, 6, 8, 12, 16, 24, 64, 256}) AddInt8Fixed(rows);
    AddInt8Cached();
    for (const int rows : {1, 4, 8, 64}) AddHeads(rows, kLatent, 128);
    for (const int rows : {1, 4, 8, 64}) AddHeads(rows, 128, kLatent);
    for (const int rows : {1, 8, 64}) AddHead(rows);
    for (const int rows : {1, 8, 64}) AddRouter(rows);
    for (const int positions : {512, kMaxPositions}) AddAttention(positions);
    AddPacking();
    AddRows();
  }

  template <typename T>
  T* Take(int64_t count) {
    return memory.TakeArray<T>(count).data();
  }

  // Words that are small as bf16, and any bytes as int8.
  void FillStream() {
    stream = Take<std::byte>(kStreamBytes);
    RandomStream random(2);
    constexpr size_t kPattern = 1 << 18;
    auto* words = reinterpret_cast<Bf16*>(stream);
    for (size_t i = 0; i < kPattern / 2; ++i) words[i] = ToBf16((random.Unit() - 0.5f) * 0.1f);
    for (size_t at = kPattern; at < kStreamBytes; at += kPattern) std::memcpy(stream + at, stream, kPattern);
  }
  // Call `call`'s piece of the stream.
  const std::byte* Piece(int64_t bytes, int call) const {
    const int64_t pieces = static_cast<int64_t>(kStreamBytes) / RoundUp(bytes, 64);
    return stream + call % pieces * RoundUp(bytes, 64);
  }

  void FillRows(RandomStream& random) {
    const int64_t size = int64_t{kMaxRows} * kHidden;
    x = Take<float>(size);
    x_bf16 = Take<Bf16>(size);
    x_int8 = Take<int8_t>(size);
    for (int64_t i = 0; i < size; ++i) {
      x[i] = random.Unit() - 0.5f;
      x_bf16[i] = ToBf16(x[i]);
      x_int8[i] = static_cast<int8_t>(static_cast<int>(random.Below(255)) - 127);
    }
    scales = Take<float>(std::max(kMaxRows * kNumLeaves, kMaxOutputs));
    for (int i = 0; i < std::max(kMaxRows * kNumLeaves, kMaxOutputs); ++i) scales[i] = 0.001f;
    integers = Take<int32_t>(std::max(kMaxRows * kNumLeaves, kMaxOutputs));
    constexpr int kLeaf = kMoeWidth / kNumLeaves;
    leaf_sums = Take<int32_t>(kMaxRows * kNumLeaves);
    for (int i = 0; i < kMaxRows * kNumLeaves; ++i)
      leaf_sums[i] = std::accumulate(x_int8 + i * kLeaf, x_int8 + (i + 1) * kLeaf, 0);
    out = Take<float>(int64_t{64} * kMaxOutputs);
    out_bf16 = Take<Bf16>(std::max<int64_t>(size, kMaxParts * kAttentionRows * kLatent));
    out_int8 = Take<int8_t>(kHidden);
    fixed = Take<int64_t>(size);
    out_of_range = Take<uint8_t>(kMaxRows * kMaxParts);
  }

  void FillAttention(RandomStream& random) {
    Bf16* queries = Take<Bf16>(kAttentionRows * (kLatent + kRope));
    for (int i = 0; i < kAttentionRows * (kLatent + kRope); ++i) queries[i] = ToBf16(random.Unit() - 0.5f);
    Bf16* cache = Take<Bf16>(kMaxPositions * kCacheStride);
    for (int i = 0; i < kMaxPositions * kCacheStride; ++i) cache[i] = ToBf16(random.Unit() - 0.5f);
    int32_t* block_ids = Take<int32_t>(kMaxPositions / kBlock);
    for (int i = 0; i < kMaxPositions / kBlock; ++i) block_ids[i] = i;
    tile = {.queries = {queries, kLatent + kRope},
            .num_rows = kAttentionRows,
            .pages = {cache, block_ids, kBlock, int64_t{kBlock} * kCacheStride, kCacheStride},
            .key_width = kLatent + kRope,
            .value_width = kLatent,
            .softmax_scale = 0.1f};
  }

  // A product whose weights are streamed; parts take panels.
  struct Product {
    std::string name;
    int rows, outputs, k;
    Bound bound;
    int64_t weight_bytes;
    int num_panels;
  };
  using RunPanels =
      std::function<void(const Kernels&, const std::byte* weights, int part, int panel_begin, int panel_end)>;
  void AddProduct(const Product& p, RunPanels run) {
    const double operations = 2.0 * p.rows * p.outputs * p.k;
    cases.push_back(
        {.name = p.name,
         .operations = operations,
         .bytes = static_cast<double>(p.weight_bytes),
         .from_memory = true,
         .bound = p.bound,
         .run =
             [run = std::move(run), p, this](const Kernels& kernels, int part, int parts, int call) {
               run(kernels, Piece(p.weight_bytes, call), part, PartBegin(p.num_panels, part, parts),
                   PartBegin(p.num_panels, part + 1, parts));
             },
         .reference_parts = ReferenceParts(operations, p.num_panels)});
  }

  // Each part is a whole call on data of its own, which stays in its core's caches.
  void AddCached(std::string name, double operations, double bytes, Bound bound,
                 std::function<void(const Kernels&, int part)> run) {
    cases.push_back(
        {.name = std::move(name),
         .operations = operations,
         .bytes = bytes,
         .bound = bound,
         .run = [run = std::move(run)](const Kernels& kernels, int part, int, int) { run(kernels, part); },
         .is_per_thread = true});
  }

  void AddInt8(int rows) {
    const PackedInt8 gate = {.num_outputs = 4096, .num_leaves = 1, .leaf_k = kHidden};
    AddProduct({Format("int8 m{} n4096 k7168", rows), rows, 4096, kHidden, Bound::kInt8, gate.size_bytes(),
                gate.num_panels()},
               [=, this](const Kernels& kernels, const std::byte* weights, int, int begin, int end) {
                 PackedInt8 weight = gate;
                 weight.panels = reinterpret_cast<const uint8_t*>(weights);
                 kernels.gemm_int8_dynamic({x_int8, kHidden, scales, integers}, weight, scales,
                                           {.count = rows}, begin, end, out_bf16, 4096);
               });
  }

  void AddInt8Fixed(int rows) {
    const PackedInt8 down = {
        .num_outputs = kHidden, .num_leaves = kNumLeaves, .leaf_k = kMoeWidth / kNumLeaves};
    AddProduct({Format("int8 fixed m{} n7168 k2048", rows), rows, kHidden, kMoeWidth, Bound::kInt8,
                down.size_bytes(), down.num_panels()},
               [=, this](const Kernels& kernels, const std::byte* weights, int part, int begin, int end) {
                 PackedInt8 weight = down;
                 weight.panels = reinterpret_cast<const uint8_t*>(weights);
                 const FixedRows sums = {fixed, kHidden, out_of_range + part % kMaxParts * kMaxRows};
                 kernels.gemm_int8_dynamic_fixed({x_int8, kMoeWidth, scales, leaf_sums}, weight, scales,
                                                 nullptr, {.count = rows}, begin, end, sums);
               });
    cases.back().bytes += 2.0 * rows * kHidden * sizeof(int64_t);  // the sums, read and written
  }

  void AddInt8Cached() {
    const PackedInt8 panel = {.num_outputs = kInt8Panel, .num_leaves = 1, .leaf_k = kHidden};
    AddCached("int8 cached m64 n32 k7168", 2.0 * 64 * kInt8Panel * kHidden, 0, Bound::kInt8,
              [=, this](const Kernels& kernels, int part) {
                PackedInt8 weight = panel;
                weight.panels = reinterpret_cast<const uint8_t*>(Piece(panel.size_bytes(), part));
                kernels.gemm_int8_dynamic({x_int8, kHidden, scales, integers}, weight, scales, {.count = 64},
                                          0, 1, out_bf16 + part % kMaxParts * 64 * kInt8Panel, kInt8Panel);
              });
  }

  // The absorbed forms of kv_b, all heads: queries (128 to 512 columns) and outputs (512 to 128).
  void AddHeads(int rows, int outputs, int k) {
    constexpr int kHeads = 128;
    const PackedBf16 head = {.num_outputs = outputs, .num_leaves = 1, .leaf_k = k};
    AddProduct({Format("bf16 m{} n{} k{} x128", rows, outputs, k), rows, kHeads * outputs, k, Bound::kBf16,
                kHeads * head.size_bytes(), kHeads},
               [=, this](const Kernels& kernels, const std::byte* weights, int part, int begin, int end) {
                 PackedBf16 weight = head;
                 for (int i = begin; i < end; ++i) {
                   weight.panels = reinterpret_cast<const Bf16*>(weights + i * head.size_bytes());
                   kernels.gemm_bf16({x_bf16, kHidden}, weight, {.count = rows}, 0, head.num_panels(),
                                     out_bf16 + part % kMaxParts * 64 * kLatent, kLatent);
                 }
               });
  }

  void AddHead(int rows) {
    const PackedBf16 head = {.num_outputs = kMaxOutputs, .num_leaves = 1, .leaf_k = kHidden};
    AddProduct({Format("bf16 lm_head m{} n{} k7168", rows, kMaxOutputs), rows, kMaxOutputs, kHidden,
                Bound::kBf16, head.size_bytes(), head.num_panels()},
               [=, this](const Kernels& kernels, const std::byte* weights, int, int begin, int end) {
                 PackedBf16 weight = head;
                 weight.panels = reinterpret_cast<const Bf16*>(weights);
                 kernels.gemm_bf16_float({x_bf16, kHidden}, weight, {.count = rows}, begin, end, out,
                                         kMaxOutputs);
               });
  }

  void AddRouter(int rows) {
    const PackedFloat gate = {.num_outputs = 256, .k = kHidden};
    AddProduct({Format("fp32 router m{} n256 k7168", rows), rows, 256, kHidden, Bound::kFp32,
                gate.size_bytes(), gate.num_panels()},
               [=, this](const Kernels& kernels, const std::byte* weights, int, int begin, int end) {
                 PackedFloat weight = gate;
                 weight.panels = reinterpret_cast<const float*>(weights);
                 kernels.gemm_float(x, kHidden, weight, rows, begin, end, out, 256);
               });
  }

  void AddAttention(int positions) {
    int32_t* visible = Take<int32_t>(kAttentionRows);
    std::fill_n(visible, kAttentionRows, positions);
    tile.num_visible = visible;
    const int64_t scratch_bytes = AttentionScratchBytes(kLatent + kRope, kLatent);
    if (scratch == nullptr) scratch = memory.Take(scratch_bytes * kMaxParts);
    const double operations = 2.0 * (2 * kLatent + kRope) * kAttentionRows * positions;
    AddCached(Format("attention r64 p{}", positions), operations, 0, Bound::kBf16,
              [=, tile = tile, this](const Kernels& kernels, int part) {
                kernels.attention(tile, scratch + part % kMaxParts * scratch_bytes,
                                  out_bf16 + part % kMaxParts * kAttentionRows * kLatent, kLatent, nullptr);
              });
    if (positions > 512) cases.back().reference_parts = 0;
  }

  // The pieces behind the one that is read are written.
  void AddPacking() {
    const PackedInt8 shape = {.num_outputs = 4096, .num_leaves = 1, .leaf_k = kHidden};
    const double bytes = 2.0 * static_cast<double>(shape.size_bytes());
    auto* target = reinterpret_cast<uint8_t*>(stream);
    cases.push_back({.name = "pack int8 n4096 k7168",
                     .bytes = bytes,
                     .from_memory = true,
                     .run =
                         [=, this](const Kernels&, int part, int parts, int call) {
                           const auto* weight =
                               reinterpret_cast<const int8_t*>(Piece(shape.size_bytes(), call));
                           const auto next = Piece(shape.size_bytes(), call + 1) - stream;
                           PackInt8(weight, kHidden, shape, PartBegin(shape.num_panels(), part, parts),
                                    PartBegin(shape.num_panels(), part + 1, parts), target + next);
                         },
                     .reference_parts = 0});
  }

  void AddRow(const char* name, double bytes_per_value, std::function<void(const Kernels&)> run) {
    AddCached(Format("row {} {}", name, kHidden), 0, bytes_per_value * kHidden, Bound::kCache,
              [run = std::move(run)](const Kernels& kernels, int) { run(kernels); });
    cases.back().only_one_thread = true;
  }

  // One row of the hidden size, one thread at a time: threads would write the same row.
  void AddRows() {
    constexpr int n = kHidden;
    float* y = x + n;
    AddRow("rms_norm", 12, [=, this](const Kernels& k) { k.rms_norm(x, y, n, 1e-6f, out); });
    AddRow("quantize_static", 5, [=, this](const Kernels& k) {
      k.quantize_static(x, nullptr, scales, false, 0, n, 1, out_int8, integers);
    });
    AddRow("quantize_dynamic", 5,
           [=, this](const Kernels& k) { k.quantize_dynamic(x, n, kNumLeaves, out_int8, out, integers); });
    AddRow("to_bf16", 6, [=, this](const Kernels& k) { k.to_bf16(x, n, out_bf16); });
    AddRow("to_float", 6, [=, this](const Kernels& k) { k.to_float(x_bf16, n, out); });
    AddRow("silu_mul", 8, [=, this](const Kernels& k) { k.silu_mul(x_bf16, x_bf16 + n, n, out); });
    AddRow("rope", 8, [=, this](const Kernels& k) { k.rope(x_bf16, x, y, n, out_bf16); });
    AddRow("add_fixed", 16, [=, this](const Kernels& k) { k.add_fixed(fixed, n, out); });
    AddRow("sigmoid", 8, [=, this](const Kernels& k) { k.sigmoid(x, n, out); });
    AddRow("range", 4, [=, this](const Kernels& k) { k.range(x, n, out); });
    AddRow("exp_sum", 4, [=, this](const Kernels& k) { k.exp_sum(x, n, 0.6f, 2, nullptr); });
    AddRow("near_exp_sum", 4, [=, this](const Kernels& k) { k.near_exp_sum(x, n, 0.6f, 2); });
  }

  Arena memory = Arena::AllocateOrDie(kStreamBytes + (size_t{96} << 20));
  std::byte* stream = nullptr;
  std::vector<BenchCase> cases;
  AttentionTile tile;
  std::byte* scratch = nullptr;
  float* x = nullptr;
  Bf16* x_bf16 = nullptr;
  int8_t* x_int8 = nullptr;
  float* scales = nullptr;
  int32_t* integers = nullptr;
  int32_t* leaf_sums = nullptr;  // of rows of kMoeWidth
  float* out = nullptr;
  Bf16* out_bf16 = nullptr;
  int8_t* out_int8 = nullptr;
  int64_t* fixed = nullptr;
  uint8_t* out_of_range = nullptr;
};

KernelCases::KernelCases() : content_(std::make_unique<Content>()) {}
KernelCases::~KernelCases() = default;

const std::vector<BenchCase>& KernelCases::cases() const {
  return content_->cases;
}

std::span<const std::byte> KernelCases::stream() const {
  return {content_->stream, kStreamBytes};
}

}  // namespace tessera::kernels
