// The vector words of the *-inl.h files in AVX-512 (F, BW, DQ, VL, VNNI): 16 lanes of 32 bits. Included once
// per file, by avx512.cc and avx512bf16.cc, inside their namespace and target region; each adds its own pair
// chain (simd_pairs_widened.h, simd_pairs_dot.h). The words are those of simd_avx2.h.

constexpr int kLanes = 16;
using F = __m512;
using I = __m512i;
using M = __mmask16;

constexpr int kInt8Rows = 8;        // rows of an int8 register block, x 32 outputs
constexpr int kChainRows = 8;       // rows of a bf16 or fp32 register block, x 16 outputs per panel
constexpr int kChainPanels = 2;     // panels of that block
constexpr int kLonePanels = 2;      // of a block of one row: more would be more streams from memory
constexpr int kScorePositions = 6;  // attention scores: positions x kScoreVectors of query rows
constexpr int kScoreVectors = 4;
constexpr int kValueRows = 8;  // attention output: rows x kValueVectors of the latent
constexpr int kValueVectors = 2;

// ---- Integers

TESSERA_INLINE I SetI(int32_t x) {
  return _mm512_set1_epi32(x);
}
TESSERA_INLINE I AddI(I a, I b) {
  return _mm512_add_epi32(a, b);
}
TESSERA_INLINE I SubI(I a, I b) {
  return _mm512_sub_epi32(a, b);
}
TESSERA_INLINE I AndI(I a, I b) {
  return _mm512_and_si512(a, b);
}
TESSERA_INLINE I OrI(I a, I b) {
  return _mm512_or_si512(a, b);
}
TESSERA_INLINE I MaxI(I a, I b) {
  return _mm512_max_epi32(a, b);
}
template <int kBits>
TESSERA_INLINE I ShiftLeft(I x) {
  return _mm512_slli_epi32(x, kBits);
}
template <int kBits>
TESSERA_INLINE I ShiftRight(I x) {
  return _mm512_srli_epi32(x, kBits);
}
template <int kBits>
TESSERA_INLINE I ShiftRightSigned(I x) {
  return _mm512_srai_epi32(x, kBits);
}
TESSERA_INLINE M GreaterI(I a, I b) {
  return _mm512_cmpgt_epi32_mask(a, b);
}
TESSERA_INLINE I SelectI(M choose, I yes, I no) {
  return _mm512_mask_blend_epi32(choose, no, yes);
}

// The first `count` lanes, count <= kLanes.
TESSERA_INLINE M FirstLanes(int count) {
  return static_cast<M>((uint32_t{1} << count) - 1);
}
TESSERA_INLINE uint32_t LaneBits(M m) {
  return m;
}

TESSERA_INLINE I LoadI(const int32_t* at) {
  return _mm512_loadu_si512(at);
}
TESSERA_INLINE I LoadI(const int32_t* at, int count) {
  return count >= kLanes ? LoadI(at) : _mm512_maskz_loadu_epi32(FirstLanes(count), at);
}
TESSERA_INLINE void StoreI(int32_t* at, I x) {
  _mm512_storeu_si512(at, x);
}
TESSERA_INLINE int32_t SumI(I x) {
  return _mm512_reduce_add_epi32(x);
}
TESSERA_INLINE int32_t LargestI(I x) {
  return _mm512_reduce_max_epi32(x);
}
// Values within [-128, 127].
TESSERA_INLINE void StoreInt8(int8_t* at, I x, int count) {
  const __m128i bytes = _mm512_cvtepi32_epi8(x);
  if (count >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bytes);
  } else {
    _mm_mask_storeu_epi8(at, FirstLanes(count), bytes);
  }
}

// ---- Floats

TESSERA_INLINE F SetF(float x) {
  return _mm512_set1_ps(x);
}
TESSERA_INLINE F Add(F a, F b) {
  return _mm512_add_ps(a, b);
}
TESSERA_INLINE F Sub(F a, F b) {
  return _mm512_sub_ps(a, b);
}
TESSERA_INLINE F Mul(F a, F b) {
  return _mm512_mul_ps(a, b);
}
TESSERA_INLINE F Div(F a, F b) {
  return _mm512_div_ps(a, b);
}
TESSERA_INLINE F Fma(F a, F b, F c) {
  return _mm512_fmadd_ps(a, b, c);
}
// Where either is NaN, both give b.
TESSERA_INLINE F Max(F a, F b) {
  return _mm512_max_ps(a, b);
}
TESSERA_INLINE F Min(F a, F b) {
  return _mm512_min_ps(a, b);
}
TESSERA_INLINE F Rint(F x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_CUR_DIRECTION);
}
TESSERA_INLINE I ToInt(F x) {
  return _mm512_cvtps_epi32(x);
}
TESSERA_INLINE F FromInt(I x) {
  return _mm512_cvtepi32_ps(x);
}
TESSERA_INLINE I AsI(F x) {
  return _mm512_castps_si512(x);
}
TESSERA_INLINE F AsF(I x) {
  return _mm512_castsi512_ps(x);
}
TESSERA_INLINE M LessF(F a, F b) {
  return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ);
}
TESSERA_INLINE F SelectF(M choose, F yes, F no) {
  return _mm512_mask_blend_ps(choose, no, yes);
}

TESSERA_INLINE F LoadF(const float* at) {
  return _mm512_loadu_ps(at);
}
TESSERA_INLINE F LoadF(const float* at, int count) {
  return count >= kLanes ? LoadF(at) : _mm512_maskz_loadu_ps(FirstLanes(count), at);
}
TESSERA_INLINE void StoreF(float* at, F x) {
  _mm512_storeu_ps(at, x);
}
TESSERA_INLINE void StoreF(float* at, F x, int count) {
  if (count >= kLanes) {
    StoreF(at, x);
  } else {
    _mm512_mask_storeu_ps(at, FirstLanes(count), x);
  }
}

// ---- bf16

TESSERA_INLINE F LoadBf16(const Bf16* at) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  return AsF(ShiftLeft<16>(_mm512_cvtepu16_epi32(words)));
}
TESSERA_INLINE F LoadBf16(const Bf16* at, int count) {
  if (count >= kLanes) return LoadBf16(at);
  return AsF(ShiftLeft<16>(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(FirstLanes(count), at))));
}
// Four words (two values each) of every row from value `offset` on: columns[i] holds word i of rows[lane].
TESSERA_INLINE void LoadColumns(const Bf16* const* rows, int64_t offset, I* columns) {
  I quads[4];
  TESSERA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const auto quad = [&](int row) {
      return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + offset));
    };
    quads[i] = _mm512_castsi128_si512(quad(i));
    quads[i] = _mm512_inserti32x4(quads[i], quad(4 + i), 1);
    quads[i] = _mm512_inserti32x4(quads[i], quad(8 + i), 2);
    quads[i] = _mm512_inserti32x4(quads[i], quad(12 + i), 3);
  }
  const I low01 = _mm512_unpacklo_epi32(quads[0], quads[1]);
  const I low23 = _mm512_unpacklo_epi32(quads[2], quads[3]);
  const I high01 = _mm512_unpackhi_epi32(quads[0], quads[1]);
  const I high23 = _mm512_unpackhi_epi32(quads[2], quads[3]);
  columns[0] = _mm512_unpacklo_epi64(low01, low23);
  columns[1] = _mm512_unpackhi_epi64(low01, low23);
  columns[2] = _mm512_unpacklo_epi64(high01, high23);
  columns[3] = _mm512_unpackhi_epi64(high01, high23);
}
// bf16 in the low half of each lane, the high half zero. NaN stays NaN, denormals become zeros.
TESSERA_INLINE I RoundBf16(F x) {
  const I bits = AsI(x);
  const I magnitude = AndI(bits, SetI(0x7fffffff));
  const I high = ShiftRight<16>(bits);
  const I rounded = ShiftRight<16>(AddI(AddI(bits, SetI(0x7fff)), AndI(high, SetI(1))));
  const I flushed = SelectI(GreaterI(SetI(0x00800000), magnitude), AndI(high, SetI(0x8000)), rounded);
  return SelectI(GreaterI(magnitude, SetI(0x7f800000)), OrI(high, SetI(0x40)), flushed);
}
TESSERA_INLINE void StoreBf16(Bf16* at, F x, int count) {
  const __m256i packed = _mm512_cvtepi32_epi16(RoundBf16(x));
  if (count >= kLanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), packed);
  } else {
    _mm256_mask_storeu_epi16(at, FirstLanes(count), packed);
  }
}

// ---- Fixed point

// sums[lane] += rint(c * 2^28) for the first `count` lanes; a lane with |c| >= 2^27 or NaN adds nothing.
TESSERA_INLINE void AddTerms(int64_t* sums, F c, int count) {
  const I magnitude = AndI(AsI(c), SetI(0x7fffffff));
  const M in_range = GreaterI(SetI(static_cast<int32_t>(kMaxTermBits)), magnitude);
  const F terms = _mm512_maskz_mul_ps(in_range, c, SetF(0x1p28f));
  const __m512i low = _mm512_cvtps_epi64(_mm512_castps512_ps256(terms));
  const __m512i high = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(terms, 1));
  if (count >= kLanes) {
    _mm512_storeu_si512(sums, _mm512_add_epi64(_mm512_loadu_si512(sums), low));
    _mm512_storeu_si512(sums + 8, _mm512_add_epi64(_mm512_loadu_si512(sums + 8), high));
    return;
  }
  const M lanes = FirstLanes(count);
  const __mmask8 low_lanes = static_cast<__mmask8>(lanes);
  const __mmask8 high_lanes = static_cast<__mmask8>(lanes >> 8);
  const __m512i old_low = _mm512_maskz_loadu_epi64(low_lanes, sums);
  const __m512i old_high = _mm512_maskz_loadu_epi64(high_lanes, sums + 8);
  _mm512_mask_storeu_epi64(sums, low_lanes, _mm512_add_epi64(old_low, low));
  _mm512_mask_storeu_epi64(sums + 8, high_lanes, _mm512_add_epi64(old_high, high));
}
// sums[lane] += high * 2^22 + low.
TESSERA_INLINE void AddSplit(int64_t* sums, I high, I low) {
  TESSERA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const __m256i steps = half == 0 ? _mm512_castsi512_si256(high) : _mm512_extracti64x4_epi64(high, 1);
    const __m256i rest = half == 0 ? _mm512_castsi512_si256(low) : _mm512_extracti64x4_epi64(low, 1);
    const __m512i terms =
        _mm512_add_epi64(_mm512_slli_epi64(_mm512_cvtepi32_epi64(steps), 22), _mm512_cvtepi32_epi64(rest));
    _mm512_storeu_si512(sums + half * 8, _mm512_add_epi64(_mm512_loadu_si512(sums + half * 8), terms));
  }
}
// One rounding each.
TESSERA_INLINE F FromFixed(const int64_t* sums, int count) {
  const M lanes = count >= kLanes ? static_cast<M>(0xffff) : FirstLanes(count);
  const __m512i low = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes), sums);
  const __m512i high = _mm512_maskz_loadu_epi64(static_cast<__mmask8>(lanes >> 8), sums + 8);
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtepi64_ps(low)), _mm512_cvtepi64_ps(high), 1);
}

// ---- int8

constexpr int kInt8Vectors = kInt8Panel / kLanes;
// As far ahead of the weights, for the full block: its products fill the window that would look ahead.
constexpr int kPrefetchBytes = 8192;

// The weights are the unsigned operand, so that four activations can come as a broadcast memory operand
// (performance: a block of 4 rows and more reaches the peak rate; one row is bound by loads, and takes two
// quads at a time for latency).
template <int kRows>
struct Int8Inputs {
  static constexpr int kChains = kRows <= 2 ? 2 : 1;
  const int8_t* x[kRows];
  static constexpr int64_t RoomBytes(int quads) { return 0; }
  TESSERA_INLINE void Prepare(int quads, void* room) {}

  // acc[row][vector]: sums of x * (w + 128) over quads [first, first + quads) against a panel's weights. Its
  // own function: between the sums of leaves the compiler would keep these in memory.
  TESSERA_NOINLINE void Multiply(int first, const uint8_t* w, int quads, I (*acc)[kInt8Vectors]) const {
    I sum[kRows][kInt8Vectors][kChains];
    TESSERA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) {
        TESSERA_UNROLL
        for (int chain = 0; chain < kChains; ++chain) sum[row][v][chain] = _mm512_setzero_si512();
      }
    }
    int quad = 0;
    for (; quad + kChains <= quads; quad += kChains) {
      TESSERA_UNROLL
      for (int chain = 0; chain < kChains; ++chain) AddQuad(first, w, quad + chain, chain, sum);
      if constexpr (kRows == kInt8Rows) {
        TESSERA_UNROLL
        for (int v = 0; v < kInt8Vectors; ++v) {
          _mm_prefetch(w + kPrefetchBytes + (int64_t{quad} * kInt8Vectors + v) * 64, _MM_HINT_T1);
        }
      }
    }
    if constexpr (kChains > 1) {
      if (quad < quads) AddQuad(first, w, quad, 0, sum);
    }
    TESSERA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) {
        acc[row][v] = kChains > 1 ? AddI(sum[row][v][0], sum[row][v][kChains - 1]) : sum[row][v][0];
      }
    }
  }

 private:
  TESSERA_INLINE void AddQuad(int first, const uint8_t* w, int quad, int chain,
                              I (*sum)[kInt8Vectors][kChains]) const {
    TESSERA_UNROLL
    for (int v = 0; v < kInt8Vectors; ++v) {
      const I weights = _mm512_load_si512(w + (int64_t{quad} * kInt8Vectors + v) * 64);
      TESSERA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        int32_t values;
        __builtin_memcpy(&values, x[row] + (first + quad) * 4, 4);
        sum[row][v][chain] = _mm512_dpbusd_epi32(sum[row][v][chain], weights, SetI(values));
      }
    }
  }
};
