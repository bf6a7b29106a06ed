// Rows: norms, quantisation, activations, rope, sums and maxima. One source for every vector set: included
// after its simd_*.h, inside its namespace and target region. The meaning of each function is in
// reference.cc.

TESSERA_INLINE int LanesLeft(int n, int i) {
  return n - i < kLanes ? n - i : kLanes;
}

// The part that both exponentials share: exp(x) = p * 2^n.
TESSERA_INLINE F ExpPolynomial(F x, I* exponent) {
  const F n = Rint(Mul(x, SetF(0x1.715476p+0f)));
  F r = Fma(n, SetF(-0x1.62e4p-1f), x);
  r = Fma(n, SetF(-0x1.7f7d1cp-20f), r);
  F p = SetF(0x1.6a23dcp-10f);
  p = Fma(p, r, SetF(0x1.123a24p-7f));
  p = Fma(p, r, SetF(0x1.5558f2p-5f));
  p = Fma(p, r, SetF(0x1.55549p-3f));
  p = Fma(p, r, SetF(0x1.fffffcp-2f));
  p = Fma(p, r, SetF(1.0f));
  *exponent = ToInt(n);
  return Fma(p, r, SetF(1.0f));
}

TESSERA_INLINE F Exp(F x) {
  I exponent;
  const F p = ExpPolynomial(x, &exponent);
  const I half = ShiftRightSigned<1>(exponent);
  const I bias = SetI(127);
  F result = Mul(p, AsF(ShiftLeft<23>(AddI(half, bias))));
  result = Mul(result, AsF(ShiftLeft<23>(AddI(SubI(exponent, half), bias))));
  result = SelectF(LessF(x, SetF(-87.33f)), SetF(0.0f), result);
  return SelectF(LessF(SetF(88.72f), x), AsF(SetI(kInfinityBits)), result);
}

// Exp(x) for x <= 0, -inf too. From -87.33 on p * 2^n is a normal number: n is added to the exponent of p.
TESSERA_INLINE F ExpOfNegative(F x) {
  I n;
  const F p = ExpPolynomial(x, &n);
  const F result = AsF(AddI(AsI(p), ShiftLeft<23>(n)));
  return SelectF(LessF(x, SetF(-87.33f)), SetF(0.0f), result);
}

TESSERA_INLINE F Negate(F x) {
  return AsF(AddI(AsI(x), SetI(static_cast<int32_t>(0x80000000))));
}

// The 64 lanes of a sum that stays on one rank.
struct SumLanes {
  static constexpr int kVectors = 64 / kLanes;
  F lanes[kVectors];

  TESSERA_INLINE SumLanes() {
    TESSERA_UNROLL
    for (int v = 0; v < kVectors; ++v) lanes[v] = SetF(0.0f);
  }
  // Adds lanes pairwise, 32, 16, 8, 4, 2, 1 apart.
  TESSERA_INLINE float Fold() {
    TESSERA_UNROLL
    for (int apart = kVectors / 2; apart > 0; apart /= 2) {
      TESSERA_UNROLL
      for (int v = 0; v < apart; ++v) lanes[v] = Add(lanes[v], lanes[v + apart]);
    }
    float rest[kLanes];
    StoreF(rest, lanes[0]);
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      for (int j = 0; j < apart; ++j) rest[j] += rest[j + apart];
    }
    return rest[0];
  }
};

TESSERA_INLINE bool IsFinite(float x) {
  return (__builtin_bit_cast(uint32_t, x) & 0x7fffffff) < kInfinityBits;
}

inline bool RmsNorm(const float* x, const float* weight, int n, float eps, float* out) {
  SumLanes sum;
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    TESSERA_UNROLL
    for (int v = 0; v < SumLanes::kVectors; ++v) {
      const F value = LoadF(x + i + v * kLanes);
      sum.lanes[v] = Fma(value, value, sum.lanes[v]);
    }
  }
  for (int v = 0; i < n; i += kLanes, ++v) {
    const F value = LoadF(x + i, LanesLeft(n, i));
    sum.lanes[v] = Fma(value, value, sum.lanes[v]);
  }
  const float total = sum.Fold();
  const float r = 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + eps);
  for (i = 0; i < n; i += kLanes) {
    const int count = LanesLeft(n, i);
    StoreF(out + i, Mul(Mul(LoadF(x + i, count), SetF(r)), LoadF(weight + i, count)), count);
  }
  return IsFinite(total);
}

TESSERA_INLINE void ZeroPadding(int8_t* piece, int leaf_k, int leaf_pad) {
  for (int k = leaf_k; k < leaf_pad; ++k) piece[k] = 0;
}

// Clamps (NaN gives `low`), stores and returns the integers; lanes from `count` on are zero.
TESSERA_INLINE I StoreClamped(int8_t* at, F rounded, float low, int count) {
  I q = ToInt(Min(Max(rounded, SetF(low)), SetF(127.0f)));
  if (count < kLanes) q = SelectI(FirstLanes(count), q, SetI(0));
  StoreInt8(at, q, count);
  return q;
}

inline void QuantizeStatic(const float* x, const float* beta, const float* inverse_scale, bool per_channel,
                           float zero_point, int n, int num_leaves, int8_t* out, int32_t* sums) {
  const int leaf_k = n / num_leaves;
  const int leaf_pad = (leaf_k + 3) / 4 * 4;
  for (int leaf = 0; leaf < num_leaves; ++leaf) {
    const int begin = leaf * leaf_k;
    int8_t* piece = out + leaf * leaf_pad;
    I sum = SetI(0);
    for (int k = 0; k < leaf_k; k += kLanes) {
      const int count = LanesLeft(leaf_k, k);
      F value = LoadF(x + begin + k, count);
      if (beta != nullptr) value = Add(value, LoadF(beta + begin + k, count));
      const F scale = per_channel ? LoadF(inverse_scale + begin + k, count) : SetF(inverse_scale[0]);
      const F rounded = Add(Rint(Mul(value, scale)), SetF(zero_point));
      sum = AddI(sum, StoreClamped(piece + k, rounded, -128.0f, count));
    }
    ZeroPadding(piece, leaf_k, leaf_pad);
    sums[leaf] = SumI(sum);
  }
}

inline void QuantizeDynamic(const float* x, int n, int num_leaves, int8_t* out, float* scales,
                            int32_t* sums) {
  const int leaf_k = n / num_leaves;
  const int leaf_pad = (leaf_k + 3) / 4 * 4;
  for (int leaf = 0; leaf < num_leaves; ++leaf) {
    const float* values = x + leaf * leaf_k;
    int8_t* piece = out + leaf * leaf_pad;
    I largest = AsI(SetF(1e-10f));
    for (int k = 0; k < leaf_k; k += kLanes) {
      const F value = LoadF(values + k, LanesLeft(leaf_k, k));
      largest = MaxI(largest, AndI(AsI(value), SetI(0x7fffffff)));
    }
    const float a = __builtin_bit_cast(float, LargestI(largest));
    scales[leaf] = a / 127.0f;
    const F inverse = SetF(127.0f / a);
    I sum = SetI(0);
    for (int k = 0; k < leaf_k; k += kLanes) {
      const int count = LanesLeft(leaf_k, k);
      const F rounded = Rint(Mul(LoadF(values + k, count), inverse));
      sum = AddI(sum, StoreClamped(piece + k, rounded, -127.0f, count));
    }
    ZeroPadding(piece, leaf_k, leaf_pad);
    sums[leaf] = SumI(sum);
  }
}

inline void ToBf16Row(const float* x, int n, Bf16* out) {
  for (int i = 0; i < n; i += kLanes) {
    const int count = LanesLeft(n, i);
    StoreBf16(out + i, LoadF(x + i, count), count);
  }
}

inline void ToFloatRow(const Bf16* x, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) {
    const int count = LanesLeft(n, i);
    StoreF(out + i, LoadBf16(x + i, count), count);
  }
}

inline void SiluMul(const Bf16* gate, const Bf16* up, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) {
    const int count = LanesLeft(n, i);
    const F g = LoadBf16(gate + i, count);
    const F activated = Div(g, Add(SetF(1.0f), Exp(Negate(g))));
    StoreF(out + i, Mul(activated, LoadBf16(up + i, count)), count);
  }
}

inline void Rope(const Bf16* x, const float* cos, const float* sin, int n, Bf16* out) {
  const int num_pairs = n / 2;
  for (int i = 0; i < num_pairs; i += kLanes) {
    const int count = LanesLeft(num_pairs, i);
    const I both = LoadI(reinterpret_cast<const int32_t*>(x + 2 * i), count);
    const F a = AsF(ShiftLeft<16>(both));
    const F b = AsF(AndI(both, SetI(static_cast<int32_t>(0xffff0000))));
    const F c = LoadF(cos + i, count);
    const F s = LoadF(sin + i, count);
    const I real = RoundBf16(Sub(Mul(a, c), Mul(b, s)));
    const I imaginary = RoundBf16(Add(Mul(a, s), Mul(b, c)));
    StoreF(reinterpret_cast<float*>(out + 2 * i), AsF(OrI(real, ShiftLeft<16>(imaginary))), count);
  }
}

inline void AddFixed(const int64_t* sums, int n, float* residual) {
  for (int i = 0; i < n; i += kLanes) {
    const int count = LanesLeft(n, i);
    const I rounded = RoundBf16(Mul(FromFixed(sums + i, count), SetF(0x1p-28f)));
    StoreF(residual + i, Add(LoadF(residual + i, count), AsF(ShiftLeft<16>(rounded))), count);
  }
}

inline void SigmoidRow(const float* x, int n, float* out) {
  const F one = SetF(1.0f);
  for (int i = 0; i < n; i += kLanes) {
    const int count = LanesLeft(n, i);
    StoreF(out + i, Div(one, Add(one, Exp(Negate(LoadF(x + i, count))))), count);
  }
}

inline float LargestOf(F x) {
  float lanes[kLanes];
  StoreF(lanes, x);
  for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}

inline RowRange Range(const float* x, int n, float* block_maxima) {
  const F infinity = AsF(SetI(kInfinityBits));
  F smallest = infinity;
  float max = -__builtin_inff();
  uint32_t wrong = 0;
  for (int begin = 0; begin < n; begin += kMaxBlock) {
    const int size = n - begin < kMaxBlock ? n - begin : kMaxBlock;
    F largest = Negate(infinity);
    int i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      const F value = LoadF(x + begin + i);
      smallest = Min(value, smallest);
      largest = Max(value, largest);
      wrong |= ~LaneBits(LessF(value, infinity));
    }
    if (i < size) {
      const M there = FirstLanes(size - i);
      const F value = LoadF(x + begin + i, size - i);
      smallest = SelectF(there, Min(value, smallest), smallest);
      largest = SelectF(there, Max(value, largest), largest);
      wrong |= ~LaneBits(LessF(value, infinity));
    }
    const float block_max = LargestOf(largest) + 0.0f;
    block_maxima[begin / kMaxBlock] = block_max;
    if (block_max > max) max = block_max;
  }
  const float min = -LargestOf(Negate(smallest)) + 0.0f;
  return {.min = min, .max = max, .finite = (wrong & ((uint32_t{1} << kLanes) - 1)) == 0};
}

inline int Select(const float* x, int n, float low, float high, int32_t first_id, int32_t* ids) {
  int count = 0;
  for (int i = 0; i < n; i += kLanes) {
    const F value = LoadF(x + i, LanesLeft(n, i));
    uint32_t lanes = LaneBits(LessF(value, SetF(high))) & ~LaneBits(LessF(value, SetF(low)));
    if (n - i < kLanes) lanes &= (uint32_t{1} << (n - i)) - 1;
    // Four at a time whether or not they are there: how many there are is hard to predict.
    const int found = __builtin_popcount(lanes);
    for (int done = 0; done < found; done += 4) {
      TESSERA_UNROLL
      for (int j = 0; j < 4; ++j) {
        ids[count + done + j] = first_id + i + __builtin_ctz(lanes | uint32_t{1} << 31);
        lanes &= lanes - 1;
      }
    }
    count += found;
  }
  return count;
}

// 64 values from lane 0 on, or fewer, which end the row. `divided`: by other than 1.
template <bool divided, bool whole>
TESSERA_INLINE void AddExp(const float* x, int n, F divisor, F shift, float* out, SumLanes& sum) {
  TESSERA_UNROLL
  for (int v = 0; v < SumLanes::kVectors; ++v) {
    const int at = v * kLanes;
    const int count = whole ? kLanes : LanesLeft(n, at);
    if (count <= 0) return;
    F value = whole ? LoadF(x + at) : LoadF(x + at, count);
    if (divided) value = Div(value, divisor);
    F e = ExpOfNegative(Sub(value, shift));
    if (!whole) e = SelectF(FirstLanes(count), e, SetF(0.0f));
    sum.lanes[v] = Add(sum.lanes[v], e);
    if (out != nullptr) StoreF(out + at, e, count);
  }
}

template <bool divided>
inline float ExpSumBy(const float* x, int n, F divisor, F shift, float* out) {
  SumLanes sum;
  int i = 0;
  if (out == nullptr) {
    for (; i + 64 <= n; i += 64) AddExp<divided, true>(x + i, 64, divisor, shift, nullptr, sum);
  } else {
    for (; i + 64 <= n; i += 64) AddExp<divided, true>(x + i, 64, divisor, shift, out + i, sum);
  }
  if (i < n) AddExp<divided, false>(x + i, n - i, divisor, shift, out == nullptr ? out : out + i, sum);
  return sum.Fold();
}

inline float ExpSum(const float* x, int n, float divisor, float shift, float* out) {
  return divisor == 1 ? ExpSumBy<false>(x, n, SetF(divisor), SetF(shift), out)
                      : ExpSumBy<true>(x, n, SetF(divisor), SetF(shift), out);
}

// sum + 2^(t - 127), the power within 0.35 %; `scaled` is 2^23 t. As the bits of a float that integer says
// (1 + f) 2^n, where 2^f 2^n is wanted; a parabola in 1 + f is close to 2^f / (1 + f).
TESSERA_INLINE F AddNearExp(F scaled, F sum) {
  const I bits = ToInt(Max(scaled, SetF(0x1p+23f)));
  const F mantissa = AsF(OrI(AndI(bits, SetI(0x007fffff)), SetI(0x3f800000)));
  const F quotient =
      Fma(Fma(mantissa, SetF(0x1.de9e1ap-3f), SetF(-0x1.636fb6p-1f)), mantissa, SetF(0x1.75026p+0f));
  return Fma(AsF(bits), quotient, sum);
}

inline float NearExpSum(const float* x, int n, float divisor, float shift) {
  constexpr float kLog2E = 0x1.715476p+0f;
  const F factor = SetF(kLog2E / divisor * 0x1p+23f);
  const F zero = SetF((127.0f - shift * kLog2E) * 0x1p+23f);
  SumLanes sum;
  int i = 0;
  for (; i + 64 <= n; i += 64) {
    TESSERA_UNROLL
    for (int v = 0; v < SumLanes::kVectors; ++v)
      sum.lanes[v] = AddNearExp(Fma(LoadF(x + i + v * kLanes), factor, zero), sum.lanes[v]);
  }
  for (int v = 0; i < n; i += kLanes, ++v) {
    const int count = LanesLeft(n, i);
    const F more = AddNearExp(Fma(LoadF(x + i, count), factor, zero), sum.lanes[v]);
    sum.lanes[v] = SelectF(FirstLanes(count), more, sum.lanes[v]);
  }
  return sum.Fold();
}
