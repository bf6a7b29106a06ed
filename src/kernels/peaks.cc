// Loops that do nothing but what is measured. Operands pass through an empty asm statement in each round, so
// that no compiler takes them out of the loop.
#include "kernels/peaks.h"

#include <algorithm>
#include <atomic>
#include <functional>

#include "base/check.h"
#include "base/clock.h"
#include "kernels/target.h"

namespace tessera::kernels {
namespace {

// Runs `rounds` rounds. Returns what keeps the results alive.
using Loop = int (*)(int64_t rounds);

}  // namespace

TESSERA_TARGET_PUSH("avx2,fma")
namespace avx2 {
namespace {

// Two vpmaddwd and two vpaddd make 64 operations.
constexpr int kInt8Chains = 8;
constexpr double kInt8Operations = 64.0 * kInt8Chains;
int Int8Loop(int64_t rounds) {
  __m256i sums[kInt8Chains] = {};
  for (__m256i& sum : sums) asm volatile("" : "+x"(sum));
  __m256i even = _mm256_set1_epi16(3), odd = even, x = even, y = even;
  for (int64_t round = 0; round < rounds; ++round) {
    asm volatile("" : "+x"(even), "+x"(odd), "+x"(x), "+x"(y));
    TESSERA_UNROLL
    for (int i = 0; i < kInt8Chains; ++i) {
      __m256i product = _mm256_madd_epi16(even, x);
      asm volatile("" : "+x"(product));
      sums[i] = _mm256_add_epi32(sums[i], product);
      product = _mm256_madd_epi16(odd, y);
      asm volatile("" : "+x"(product));
      sums[i] = _mm256_add_epi32(sums[i], product);
    }
  }
  for (int i = 1; i < kInt8Chains; ++i) sums[0] = _mm256_add_epi32(sums[0], sums[i]);
  return _mm256_extract_epi32(sums[0], 0);
}

constexpr int kFloatChains = 12;
constexpr double kFloatOperations = 16.0 * kFloatChains;
int FloatLoop(int64_t rounds) {
  __m256 sums[kFloatChains] = {};
  for (__m256& sum : sums) asm volatile("" : "+x"(sum));  // or equal chains would become one
  const __m256 x = _mm256_set1_ps(0.5f);
  for (int64_t round = 0; round < rounds; ++round) {
    TESSERA_UNROLL
    for (int i = 0; i < kFloatChains; ++i) sums[i] = _mm256_fmadd_ps(sums[i], x, x);
  }
  for (int i = 1; i < kFloatChains; ++i) sums[0] = _mm256_add_ps(sums[0], sums[i]);
  return _mm256_extract_epi32(_mm256_castps_si256(sums[0]), 0);
}

// All of it in kStreams streams, four vectors of each at a time.
template <int kStreams>
TESSERA_NOINLINE int Read(const std::byte* at, int64_t bytes) {
  const int64_t part = bytes / kStreams / 128 * 128;
  __m256i sums[4] = {};
  for (int64_t i = 0; i < part; i += 128) {
    TESSERA_UNROLL
    for (int stream = 0; stream < kStreams; ++stream) {
      const auto* vectors = reinterpret_cast<const __m256i*>(at + stream * part + i);
      TESSERA_UNROLL
      for (int v = 0; v < 4; ++v) sums[v] = _mm256_or_si256(sums[v], _mm256_loadu_si256(vectors + v));
    }
  }
  asm volatile("" : : : "memory");
  const __m256i all = _mm256_or_si256(_mm256_or_si256(sums[0], sums[1]), _mm256_or_si256(sums[2], sums[3]));
  return _mm256_extract_epi32(all, 0);
}

}  // namespace
}  // namespace avx2
TESSERA_TARGET_POP

TESSERA_TARGET_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
namespace avx512 {
namespace {

// Each product is a statement of assembly, and all loops over sums are unrolled: GCC 12 copies sums
// elsewhere.
constexpr int kChains = 16;
constexpr double kInt8Operations = 128.0 * kChains;
int Int8Loop(int64_t rounds) {
  __m512i sums[kChains] = {};
  const __m512i w = _mm512_set1_epi8(3);
  for (int64_t round = 0; round < rounds; ++round) {
    TESSERA_UNROLL
    for (int i = 0; i < kChains; ++i) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sums[i]) : "v"(w));
  }
  TESSERA_UNROLL
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_epi32(sums[0], sums[i]);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(sums[0]));
}

constexpr double kFloatOperations = 32.0 * kChains;
int FloatLoop(int64_t rounds) {
  __m512 sums[kChains] = {};
  for (__m512& sum : sums) asm volatile("" : "+v"(sum));  // or equal chains would become one
  const __m512 x = _mm512_set1_ps(0.5f);
  for (int64_t round = 0; round < rounds; ++round) {
    TESSERA_UNROLL
    for (int i = 0; i < kChains; ++i) sums[i] = _mm512_fmadd_ps(sums[i], x, x);
  }
  TESSERA_UNROLL
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(_mm512_castps_si512(sums[0])));
}

}  // namespace
}  // namespace avx512
TESSERA_TARGET_POP

TESSERA_TARGET_PUSH("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
namespace avx512bf16 {
namespace {

constexpr int kChains = 16;
constexpr double kPairOperations = 64.0 * kChains;
int PairLoop(int64_t rounds) {
  __m512 sums[kChains] = {};
  const __m512i x = _mm512_set1_epi16(0x3f00);
  for (int64_t round = 0; round < rounds; ++round) {
    TESSERA_UNROLL
    for (int i = 0; i < kChains; ++i) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sums[i]) : "v"(x));
  }
  TESSERA_UNROLL
  for (int i = 1; i < kChains; ++i) sums[0] = _mm512_add_ps(sums[0], sums[i]);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(_mm512_castps_si512(sums[0])));
}

}  // namespace
}  // namespace avx512bf16
TESSERA_TARGET_POP

namespace {

// Calls per nanosecond of `work`, which every thread of the pool does at once `calls` times: the best of some
// passes.
double BestRate(ThreadPool& threads, int passes, double calls, const std::function<int(int thread)>& work) {
  const SteadyClock clock;
  const int count = threads.num_threads();
  std::atomic<int> sink{0};
  double best = 0;
  for (int pass = 0; pass < passes; ++pass) {
    const TimeNs begin = clock.Now();
    threads.ParallelFor(count, [&](int task, int) { sink.fetch_xor(work(task)); });
    best = std::max(best, count * calls / static_cast<double>(std::max<TimeNs>(clock.Now() - begin, 1)));
  }
  return best;
}

double OperationRate(ThreadPool& threads, Loop loop, double operations_per_round) {
  constexpr double kOperations = 1e8;  // per pass and thread: a millisecond, often undisturbed
  const auto rounds = static_cast<int64_t>(kOperations / operations_per_round);
  return BestRate(threads, 24, rounds * operations_per_round, [&](int) { return loop(rounds); });
}

}  // namespace

MultiplyPeaks MeasureMultiply(Isa isa, ThreadPool& threads) {
  MultiplyPeaks peaks;
  switch (isa) {
    case Isa::kScalar:
      return peaks;
    case Isa::kAvx2:
      peaks.int8 = OperationRate(threads, avx2::Int8Loop, avx2::kInt8Operations);
      peaks.fp32 = OperationRate(threads, avx2::FloatLoop, avx2::kFloatOperations);
      peaks.bf16 = peaks.fp32;
      return peaks;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      peaks.int8 = OperationRate(threads, avx512::Int8Loop, avx512::kInt8Operations);
      peaks.fp32 = OperationRate(threads, avx512::FloatLoop, avx512::kFloatOperations);
      peaks.bf16 = peaks.fp32;
      if (isa == Isa::kAvx512Bf16)
        peaks.bf16 = OperationRate(threads, avx512bf16::PairLoop, avx512bf16::kPairOperations);
      return peaks;
  }
  CHECK(false);
}

int ReadPart(std::span<const std::byte> memory, int part, int parts, int num_streams) {
  const auto bytes = static_cast<int64_t>(memory.size()) / parts / 256 * 256;
  const auto read = num_streams == 1 ? avx2::Read<1> : avx2::Read<2>;
  return read(memory.data() + part * bytes, bytes);
}

double MeasureRead(std::span<const std::byte> memory, ThreadPool& threads) {
  if (!ForIsa(Isa::kAvx2)) return 0;
  const int parts = threads.num_threads();
  const auto bytes = static_cast<int64_t>(memory.size()) / parts;
  const auto times = std::max<int64_t>(1, (int64_t{8} << 20) / std::max<int64_t>(bytes, 1));
  double best = 0;
  for (const int num_streams : {1, 2}) {
    const auto work = [&](int part) {
      int sum = 0;
      for (int64_t i = 0; i < times; ++i) sum ^= ReadPart(memory, part, parts, num_streams);
      return sum;
    };
    best = std::max(best, BestRate(threads, 10, static_cast<double>(bytes * times), work));
  }
  return best;
}

}  // namespace tessera::kernels
