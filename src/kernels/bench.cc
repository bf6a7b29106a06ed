// Timing loops of `tessera bench kernels`: the median of a few runs of each kernel, per instruction set.
#include "kernels/bench.h"

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/clock.h"
#include "base/memory.h"
#include "base/random.h"
#include "base/threads.h"
#include "kernels/kernels.h"

namespace tessera::kernels {
namespace {

// One kernel at one size. `run` calls it once; `work` counts operations, or bytes where `is_bytes`.
struct Case {
  std::string name;
  double work = 0;
  bool is_bytes = false;
  std::function<void(const Kernels&)> run;
};

// Median time of one call, in nanoseconds: five runs of at least 10 ms, or one run of one call where that is
// longer.
double TimeOfCall(const Case& test, const Kernels& kernels) {
  const SteadyClock clock;
  constexpr TimeNs kLeast = 10'000'000;
  int calls = 1;
  std::vector<double> times;
  while (times.size() < 5) {
    const TimeNs start = clock.Now();
    for (int i = 0; i < calls; ++i) test.run(kernels);
    const TimeNs spent = clock.Now() - start;
    if (spent >= kLeast) {
      times.push_back(static_cast<double>(spent) / calls);
      if (spent > 10 * kLeast) break;
    } else {
      calls = static_cast<int>(
          std::min<TimeNs>(calls * 10, 1 + calls * (kLeast + kLeast / 4) / std::max<TimeNs>(spent, 1)));
    }
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

// Inputs of every case: seeded, sized like one DeepSeek-R1 expert and one attention tile.
class Inputs {
 public:
  static constexpr int kK = 2048;
  static constexpr int kOutputs = 2048;
  static constexpr int kRows = 64;
  static constexpr int kPositions = 1024;
  static constexpr int kLatent = 512;
  static constexpr int kRope = 64;

  Inputs() : memory_(TakeMemory()) {
    RandomStream random(1);
    Fill(random);
    FillAttention(random);
  }
  Inputs(const Inputs&) = delete;
  Inputs& operator=(const Inputs&) = delete;

  std::vector<Case> Cases() {
    std::vector<Case> cases;
    AddRowCases(&cases);
    for (const int rows : {1, 4, kRows}) AddProducts(rows, &cases);
    AddAttention(&cases);
    return cases;
  }

 private:
  static Arena TakeMemory() {
    Result<Arena> arena = Arena::Allocate(size_t{64} << 20);
    CHECK(arena.has_value());
    return std::move(*arena);
  }
  template <typename T>
  T* Take(size_t count) {
    return memory_.TakeArray<T>(count).data();
  }

  void Fill(RandomStream& random) {
    int8_ = {.num_outputs = kOutputs, .num_leaves = 1, .leaf_k = kK};
    leaves_ = {.num_outputs = kOutputs, .num_leaves = kNumLeaves, .leaf_k = kK / kNumLeaves};
    bf16_ = {.num_outputs = kOutputs, .num_leaves = 1, .leaf_k = kK};
    float_ = {.num_outputs = 256, .k = kK};
    // K is a multiple of every step here: both int8 shapes have the same size, and one buffer serves both.
    uint8_t* bytes = Take<uint8_t>(int8_.size_bytes());
    for (int64_t i = 0; i < int8_.size_bytes(); ++i) bytes[i] = static_cast<uint8_t>(random.Next32());
    int8_.panels = leaves_.panels = bytes;
    Bf16* halves = Take<Bf16>(bf16_.size_bytes() / 2);
    for (int64_t i = 0; i < bf16_.size_bytes() / 2; ++i) halves[i] = ToBf16(random.Unit() - 0.5f);
    bf16_.panels = halves;
    float* floats = Take<float>(float_.size_bytes() / 4);
    for (int64_t i = 0; i < float_.size_bytes() / 4; ++i) floats[i] = random.Unit() - 0.5f;
    float_.panels = floats;
    x_ = Take<float>(kRows * kK);
    x_bf16_ = Take<Bf16>(kRows * kK);
    x_int8_ = Take<int8_t>(kRows * kK);
    for (int i = 0; i < kRows * kK; ++i) {
      x_[i] = random.Unit() - 0.5f;
      x_bf16_[i] = ToBf16(x_[i]);
      x_int8_[i] = static_cast<int8_t>(static_cast<int>(random.Below(255)) - 127);
    }
    scales_ = Take<float>(std::max(kRows * kNumLeaves, kOutputs));
    for (int i = 0; i < kOutputs; ++i) scales_[i] = 0.01f;
    integers_ = Take<int32_t>(std::max(kRows * kNumLeaves, kOutputs));
    out_ = Take<float>(kRows * kOutputs);
    out_bf16_ = Take<Bf16>(kRows * kOutputs);
    out_int8_ = Take<int8_t>(kK);
    fixed_ = Take<int64_t>(kRows * kOutputs);
    max_bits_ = Take<uint32_t>(kRows);
  }

  void FillAttention(RandomStream& random) {
    constexpr int kBlock = 128;
    constexpr int kStride = (kLatent + kRope + 31) / 32 * 32;
    Bf16* queries = Take<Bf16>(kRows * (kLatent + kRope));
    for (int i = 0; i < kRows * (kLatent + kRope); ++i) queries[i] = ToBf16(random.Unit() - 0.5f);
    Bf16* cache = Take<Bf16>(kPositions * kStride);
    for (int i = 0; i < kPositions * kStride; ++i) cache[i] = ToBf16(random.Unit() - 0.5f);
    int32_t* block_ids = Take<int32_t>(kPositions / kBlock);
    for (int i = 0; i < kPositions / kBlock; ++i) block_ids[i] = i;
    int32_t* visible = Take<int32_t>(kRows);
    for (int i = 0; i < kRows; ++i) visible[i] = kPositions;
    tile_ = {.queries = {queries, kLatent + kRope},
             .num_visible = visible,
             .pages = {cache, block_ids, kBlock, int64_t{kBlock} * kStride, kStride},
             .latent = kLatent,
             .rope = kRope,
             .softmax_scale = 0.1f};
    scratch_ = memory_.Take(AttentionScratchBytes(kLatent, kRope));
  }

  void AddRowCases(std::vector<Case>* cases) {
    const double row = kK;
    const auto add = [&](const char* name, double bytes, std::function<void(const Kernels&)> run) {
      cases->push_back({Format("{} {}", name, kK), bytes, true, std::move(run)});
    };
    add("rms_norm", row * 12, [this](const Kernels& k) { k.rms_norm(x_, x_ + kK, kK, 1e-6f, out_); });
    add("quantize_static", row * 5, [this](const Kernels& k) {
      k.quantize_static(x_, nullptr, scales_, false, 0, kK, 1, out_int8_, integers_);
    });
    add("quantize_dynamic", row * 5,
        [this](const Kernels& k) { k.quantize_dynamic(x_, kK, kNumLeaves, out_int8_, out_, integers_); });
    add("to_bf16", row * 6, [this](const Kernels& k) { k.to_bf16(x_, kK, out_bf16_); });
    add("to_float", row * 6, [this](const Kernels& k) { k.to_float(x_bf16_, kK, out_); });
    add("silu_mul", row * 8, [this](const Kernels& k) { k.silu_mul(x_bf16_, x_bf16_ + kK, kK, out_); });
    add("rope", row * 8, [this](const Kernels& k) { k.rope(x_bf16_, x_, x_ + kK, kK, out_bf16_); });
    add("add_fixed", row * 16, [this](const Kernels& k) { k.add_fixed(fixed_, kK, out_); });
    add("sigmoid", row * 8, [this](const Kernels& k) { k.sigmoid(x_, kK, out_); });
    add("max", row * 4, [this](const Kernels& k) { out_[0] = k.range(x_, kK, out_ + 8).max; });
    add("exp_sum", row * 8, [this](const Kernels& k) { k.exp_sum(x_, kK, 1.0f, 1.0f, out_); });
  }

  void AddProducts(int rows, std::vector<Case>* cases) {
    const auto add = [&](const char* name, double outputs, std::function<void(const Kernels&)> run) {
      cases->push_back(
          {Format("{} {}x{}x{}", name, rows, outputs, kK), 2.0 * rows * outputs * kK, false, std::move(run)});
    };
    const RowMap map = {.count = rows};
    const Int8Rows in = {x_int8_, kK, scales_, integers_};
    const Bf16Rows in_bf16 = {x_bf16_, kK};
    const StaticScales scales = {integers_, scales_};
    const FixedRows fixed = {fixed_, kOutputs, max_bits_};
    const int int8_panels = int8_.num_panels();
    const int bf16_panels = bf16_.num_panels();
    add("gemm_int8_static", kOutputs, [=, this](const Kernels& k) {
      k.gemm_int8_static(in, int8_, scales, map, 0, int8_panels, out_bf16_, kOutputs);
    });
    add("gemm_int8_dynamic", kOutputs, [=, this](const Kernels& k) {
      k.gemm_int8_dynamic(in, int8_, scales_, map, 0, int8_panels, out_bf16_, kOutputs);
    });
    add("gemm_int8_static_fixed", kOutputs, [=, this](const Kernels& k) {
      k.gemm_int8_static_fixed(in, leaves_, scales, nullptr, map, 0, int8_panels, fixed);
    });
    add("gemm_int8_dynamic_fixed", kOutputs, [=, this](const Kernels& k) {
      k.gemm_int8_dynamic_fixed(in, leaves_, scales_, nullptr, map, 0, int8_panels, fixed);
    });
    add("gemm_bf16", kOutputs, [=, this](const Kernels& k) {
      k.gemm_bf16(in_bf16, bf16_, map, 0, bf16_panels, out_bf16_, kOutputs);
    });
    add("gemm_bf16_float", kOutputs, [=, this](const Kernels& k) {
      k.gemm_bf16_float(in_bf16, bf16_, map, 0, bf16_panels, out_, kOutputs);
    });
    add("gemm_float", float_.num_outputs, [=, this](const Kernels& k) {
      k.gemm_float(x_, kK, float_, rows, 0, float_.num_panels(), out_, kOutputs);
    });
  }

  void AddAttention(std::vector<Case>* cases) {
    for (const int rows : {16, kRows}) {
      const double per_pair = 2.0 * (2 * kLatent + kRope);
      cases->push_back({Format("attention {}x{}", rows, kPositions), per_pair * rows * kPositions, false,
                        [rows, this](const Kernels& k) {
                          AttentionTile tile = tile_;
                          tile.num_rows = rows;
                          k.attention(tile, scratch_, out_bf16_, kLatent, nullptr);
                        }});
    }
  }

  Arena memory_;
  PackedInt8 int8_;
  PackedInt8 leaves_;
  PackedBf16 bf16_;
  PackedFloat float_;
  AttentionTile tile_;
  float* x_ = nullptr;
  Bf16* x_bf16_ = nullptr;
  int8_t* x_int8_ = nullptr;
  float* scales_ = nullptr;
  int32_t* integers_ = nullptr;
  float* out_ = nullptr;
  Bf16* out_bf16_ = nullptr;
  int8_t* out_int8_ = nullptr;
  int64_t* fixed_ = nullptr;
  uint32_t* max_bits_ = nullptr;
  void* scratch_ = nullptr;
};

}  // namespace

void BenchKernels(std::ostream& out) {
  SetFlushToZero();
  Inputs inputs;
  for (const Case& test : inputs.Cases()) {
    double reference = 0;
    for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
      const Result<const Kernels*> kernels = ForIsa(isa);
      if (!kernels) continue;
      const double ns = TimeOfCall(test, **kernels);
      if (isa == Isa::kScalar) reference = ns;
      out << Format("{:<40} {:<11} {:>13.0f} ns {:>8.2f} {} {:>8.1f}x\n", test.name, IsaName(isa), ns,
                    test.work / ns, test.is_bytes ? "GB/s " : "Gop/s", reference / ns)
          << std::flush;
    }
  }
}

}  // namespace tessera::kernels
