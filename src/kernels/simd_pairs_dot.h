// One step of a pair chain by vdpbf16ps: in each lane acc = fma(even, even, fma(odd, odd, acc)), denormals
// flushed. Included after simd_avx512.h, in a target region with avx512bf16.

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

// A pair chain of attention: n pairs lie as [n][2] bf16, and a phase is a whole pair.
struct LanePairOp {
  using Element = Bf16;
  using Operand = I;
  static constexpr int kPhases = 1;
  static constexpr int kPairBytes = 4;  // in one lane
  template <class T>
  static TESSERA_INLINE T* At(T* pairs, int lane) {
    return pairs + lane * 2;
  }
  // Pairs [lane, lane + kLanes) of n.
  static TESSERA_INLINE I Load(const Bf16* pairs, int64_t n, int lane, int phase) {
    return PairOp::Load(pairs + lane * 2);
  }
  // One pair for all lanes.
  static TESSERA_INLINE I Broadcast(const Bf16* pairs, int64_t n, int lane, int phase) {
    return PairOp::Broadcast(pairs + lane * 2);
  }
  static TESSERA_INLINE F Step(F acc, I w, I x) { return PairOp::Step(acc, w, x); }
  // kLanes pairs: as words, or element by element, bf16 in the high half of a lane, the low half zero.
  static TESSERA_INLINE void StoreWords(Bf16* pairs, int64_t n, I words) {
    _mm512_storeu_si512(pairs, words);
  }
  static TESSERA_INLINE void Store(Bf16* pairs, int64_t n, I even, I odd) {
    StoreWords(pairs, n, OrI(ShiftRight<16>(even), odd));
  }
  // Rows of `width` bf16 values, readable up to whole vectors: one as a key, pair by pair, and two as the
  // pairs of their columns.
  static TESSERA_INLINE const Bf16* Key(const Bf16* row, int width, Bf16* room) { return row; }
  static TESSERA_INLINE void LayOut(const Bf16* even, const Bf16* odd, int width, int64_t n, Bf16* pairs) {
    for (int i = 0; i < width; i += kLanes) {
      const I low = ShiftRight<16>(AsI(LoadBf16(even + i)));
      StoreWords(pairs + i * 2, n, OrI(low, AsI(LoadBf16(odd + i))));
    }
  }
};
