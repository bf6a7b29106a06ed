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
