// One step of a pair chain by vdpbf16ps: in each lane acc = fma(even, even, fma(odd, odd, acc)), denormals
// flushed. Included after simd_avx512.h, in a target region with avx512bf16.

constexpr int kScorePositions = 6;  // attention scores: positions x kScoreVectors of query rows
constexpr int kScoreVectors = 4;

struct PairOp {
  using Value = Bf16;
  static constexpr int kStep = 2;
  using Weights = I;
  using Input = I;
  // kLanes outputs' weight pairs.
  static TESSERA_INLINE I Load(const Bf16* at) { return _mm512_loadu_si512(at); }
  // One input pair for all lanes.
  static TESSERA_INLINE I Broadcast(const Bf16* at) {
    int32_t pair;
    __builtin_memcpy(&pair, at, 4);
    return SetI(pair);
  }
  static TESSERA_INLINE F Step(F acc, I w, I x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
};
