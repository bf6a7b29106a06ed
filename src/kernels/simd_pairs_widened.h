// One step of a pair chain without a bf16 dot instruction: both elements widened, two fma, the odd element
// first. Included after simd_avx2.h or simd_avx512.h, whose words it uses.

struct PairOp {
  using Value = Bf16;
  static constexpr int kStep = 2;
  struct Weights {
    F even, odd;
  };
  using Input = Weights;
  static TESSERA_INLINE Weights Widen(I pairs) {
    return {AsF(ShiftLeft<16>(pairs)), AsF(AndI(pairs, SetI(static_cast<int32_t>(0xffff0000))))};
  }
  // kLanes outputs' weight pairs.
  static TESSERA_INLINE Weights Load(const Bf16* at) {
    return Widen(LoadI(reinterpret_cast<const int32_t*>(at)));
  }
  // One input pair for all lanes.
  static TESSERA_INLINE Input Broadcast(const Bf16* at) {
    int32_t pair;
    __builtin_memcpy(&pair, at, 4);
    return Widen(SetI(pair));
  }
  static TESSERA_INLINE F Step(F acc, const Weights& w, const Input& x) {
    return Fma(x.even, w.even, Fma(x.odd, w.odd, acc));
  }
};

// A pair chain of attention, whose pairs are widened once and used many times: n pairs lie as [2][n] fp32,
// and one phase is one element, the odd one first.
struct LanePairOp {
  using Element = float;
  using Operand = F;
  static constexpr int kPhases = 2;
  static constexpr int kPairBytes = 8;  // in one lane
  template <class T>
  static TESSERA_INLINE T* At(T* pairs, int lane) {
    return pairs + lane;
  }
  // Pairs [lane, lane + kLanes) of n.
  static TESSERA_INLINE F Load(const float* pairs, int64_t n, int lane, int phase) {
    return LoadF(pairs + (1 - phase) * n + lane);
  }
  // One pair for all lanes.
  static TESSERA_INLINE F Broadcast(const float* pairs, int64_t n, int lane, int phase) {
    return SetF(pairs[(1 - phase) * n + lane]);
  }
  static TESSERA_INLINE F Step(F acc, F w, F x) { return Fma(x, w, acc); }
  // kLanes pairs: as words, or element by element, bf16 in the high half of a lane, the low half zero.
  static TESSERA_INLINE void StoreWords(float* pairs, int64_t n, I words) {
    const PairOp::Weights both = PairOp::Widen(words);
    StoreF(pairs, both.even);
    StoreF(pairs + n, both.odd);
  }
  static TESSERA_INLINE void Store(float* pairs, int64_t n, I even, I odd) {
    StoreF(pairs, AsF(even));
    StoreF(pairs + n, AsF(odd));
  }
  // Rows of `width` bf16 values, readable up to whole vectors: one as a key, pair by pair (`room` holds what
  // it needs), and two as the pairs of their columns.
  static TESSERA_INLINE const float* Key(const Bf16* row, int width, float* room) {
    for (int i = 0; i < width; i += kLanes) {
      __builtin_prefetch(room + i + 96, 1);  // it lies in L2: stores would wait for each line (1.5 %)
      StoreF(room + i, LoadBf16(row + i));
    }
    return room;
  }
  static TESSERA_INLINE void LayOut(const Bf16* even, const Bf16* odd, int width, int64_t n, float* pairs) {
    for (int i = 0; i < width; i += kLanes)
      Store(pairs + i, n, AsI(LoadBf16(even + i)), AsI(LoadBf16(odd + i)));
  }
};
