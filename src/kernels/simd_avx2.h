// The vector words of the *-inl.h files in AVX2 + FMA: 8 lanes of 32 bits. Included once, by avx2.cc, inside
// its namespace and target region; simd_avx512.h says the same words for 16 lanes. The pair chain is
// simd_pairs_widened.h's.
//
// F holds floats, I 32-bit integers, M a choice per lane. A `count` below kLanes reads zeros beyond it and
// writes nothing there.

constexpr int kLanes = 8;
using F = __m256;
using I = __m256i;
using M = __m256i;

constexpr int kInt8Rows = 4;        // rows of an int8 register block, x 32 outputs
constexpr int kChainRows = 4;       // rows of a bf16 or fp32 register block, x 16 outputs per panel
constexpr int kChainPanels = 1;     // panels of that block
constexpr int kLonePanels = 2;      // of a block of one row: four chains hide the latency
constexpr int kScorePositions = 6;  // attention scores: positions x kScoreVectors of query rows
constexpr int kScoreVectors = 2;
constexpr int kValueRows = 6;  // attention output: rows x kValueVectors of the latent
constexpr int kValueVectors = 2;

// ---- Integers

TESSERA_INLINE I SetI(int32_t x) {
  return _mm256_set1_epi32(x);
}
TESSERA_INLINE I AddI(I a, I b) {
  return _mm256_add_epi32(a, b);
}
TESSERA_INLINE I SubI(I a, I b) {
  return _mm256_sub_epi32(a, b);
}
TESSERA_INLINE I AndI(I a, I b) {
  return _mm256_and_si256(a, b);
}
TESSERA_INLINE I OrI(I a, I b) {
  return _mm256_or_si256(a, b);
}
TESSERA_INLINE I MaxI(I a, I b) {
  return _mm256_max_epi32(a, b);
}
template <int kBits>
TESSERA_INLINE I ShiftLeft(I x) {
  return _mm256_slli_epi32(x, kBits);
}
template <int kBits>
TESSERA_INLINE I ShiftRight(I x) {
  return _mm256_srli_epi32(x, kBits);
}
template <int kBits>
TESSERA_INLINE I ShiftRightSigned(I x) {
  return _mm256_srai_epi32(x, kBits);
}
TESSERA_INLINE M GreaterI(I a, I b) {
  return _mm256_cmpgt_epi32(a, b);
}
TESSERA_INLINE I SelectI(M choose, I yes, I no) {
  return _mm256_blendv_epi8(no, yes, choose);
}

// The first `count` lanes.
TESSERA_INLINE M FirstLanes(int count) {
  return GreaterI(SetI(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TESSERA_INLINE uint32_t LaneBits(M m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(m)));
}

TESSERA_INLINE I LoadI(const int32_t* at) {
  return _mm256_loadu_si256(reinterpret_cast<const I*>(at));
}
TESSERA_INLINE I LoadI(const int32_t* at, int count) {
  return count >= kLanes ? LoadI(at) : _mm256_maskload_epi32(at, FirstLanes(count));
}
TESSERA_INLINE void StoreI(int32_t* at, I x) {
  _mm256_storeu_si256(reinterpret_cast<I*>(at), x);
}

TESSERA_INLINE int32_t SumI(I x) {
  __m128i half = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return _mm_cvtsi128_si32(half);
}
TESSERA_INLINE int32_t LargestI(I x) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return _mm_cvtsi128_si32(half);
}
// Values within [-128, 127].
TESSERA_INLINE void StoreInt8(int8_t* at, I x, int count) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  const int64_t bytes = _mm_cvtsi128_si64(_mm_packs_epi16(words, words));
  if (count >= kLanes) {
    __builtin_memcpy(at, &bytes, 8);
  } else {
    for (int i = 0; i < count; ++i) at[i] = static_cast<int8_t>(bytes >> (8 * i));
  }
}

// ---- Floats

TESSERA_INLINE F SetF(float x) {
  return _mm256_set1_ps(x);
}
TESSERA_INLINE F Add(F a, F b) {
  return _mm256_add_ps(a, b);
}
TESSERA_INLINE F Sub(F a, F b) {
  return _mm256_sub_ps(a, b);
}
TESSERA_INLINE F Mul(F a, F b) {
  return _mm256_mul_ps(a, b);
}
TESSERA_INLINE F Div(F a, F b) {
  return _mm256_div_ps(a, b);
}
TESSERA_INLINE F Fma(F a, F b, F c) {
  return _mm256_fmadd_ps(a, b, c);
}
// Where either is NaN, both give b.
TESSERA_INLINE F Max(F a, F b) {
  return _mm256_max_ps(a, b);
}
TESSERA_INLINE F Min(F a, F b) {
  return _mm256_min_ps(a, b);
}
TESSERA_INLINE F Rint(F x) {
  return _mm256_round_ps(x, _MM_FROUND_CUR_DIRECTION);
}
TESSERA_INLINE I ToInt(F x) {
  return _mm256_cvtps_epi32(x);
}
TESSERA_INLINE F FromInt(I x) {
  return _mm256_cvtepi32_ps(x);
}
TESSERA_INLINE I AsI(F x) {
  return _mm256_castps_si256(x);
}
TESSERA_INLINE F AsF(I x) {
  return _mm256_castsi256_ps(x);
}
TESSERA_INLINE M LessF(F a, F b) {
  return AsI(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
TESSERA_INLINE F SelectF(M choose, F yes, F no) {
  return _mm256_blendv_ps(no, yes, AsF(choose));
}

TESSERA_INLINE F LoadF(const float* at) {
  return _mm256_loadu_ps(at);
}
TESSERA_INLINE F LoadF(const float* at, int count) {
  return count >= kLanes ? LoadF(at) : _mm256_maskload_ps(at, FirstLanes(count));
}
TESSERA_INLINE void StoreF(float* at, F x) {
  _mm256_storeu_ps(at, x);
}
TESSERA_INLINE void StoreF(float* at, F x, int count) {
  if (count >= kLanes) {
    StoreF(at, x);
  } else {
    _mm256_maskstore_ps(at, FirstLanes(count), x);
  }
}

// ---- bf16

TESSERA_INLINE F LoadBf16(const Bf16* at) {
  const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  return AsF(ShiftLeft<16>(_mm256_cvtepu16_epi32(words)));
}
TESSERA_INLINE F LoadBf16(const Bf16* at, int count) {
  if (count >= kLanes) return LoadBf16(at);
  Bf16 part[kLanes] = {};
  for (int i = 0; i < count; ++i) part[i] = at[i];
  return LoadBf16(part);
}
// Four words (two values each) of every row from value `offset` on: columns[i] holds word i of rows[lane].
TESSERA_INLINE void LoadColumns(const Bf16* const* rows, int64_t offset, I* columns) {
  I quads[4];
  TESSERA_UNROLL
  for (int i = 0; i < 4; ++i) {
    quads[i] = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[i] + offset)));
    const auto* upper = reinterpret_cast<const __m128i*>(rows[4 + i] + offset);
    quads[i] = _mm256_inserti128_si256(quads[i], _mm_loadu_si128(upper), 1);
  }
  const I low01 = _mm256_unpacklo_epi32(quads[0], quads[1]);
  const I low23 = _mm256_unpacklo_epi32(quads[2], quads[3]);
  const I high01 = _mm256_unpackhi_epi32(quads[0], quads[1]);
  const I high23 = _mm256_unpackhi_epi32(quads[2], quads[3]);
  columns[0] = _mm256_unpacklo_epi64(low01, low23);
  columns[1] = _mm256_unpackhi_epi64(low01, low23);
  columns[2] = _mm256_unpacklo_epi64(high01, high23);
  columns[3] = _mm256_unpackhi_epi64(high01, high23);
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
  const I words = RoundBf16(x);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  if (count >= kLanes) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(at), packed);
    return;
  }
  Bf16 part[kLanes];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(part), packed);
  for (int i = 0; i < count; ++i) at[i] = part[i];
}

// ---- Fixed point

// sums[lane] += rint(c * 2^28) for the first `count` lanes; a lane with |c| >= 2^27 or NaN adds nothing. AVX2
// has no conversion to int64: adding 1.5 * 2^52 in double leaves the rounded integer in the low bits, exact
// below 2^51; larger terms are split at 2^24 first.
TESSERA_INLINE void AddTerms(int64_t* sums, F c, int count) {
  const I magnitude = AndI(AsI(c), SetI(0x7fffffff));
  const F terms = AsF(AndI(AsI(c), GreaterI(SetI(static_cast<int32_t>(kMaxTermBits)), magnitude)));
  const bool small = LaneBits(GreaterI(magnitude, SetI(0x4a7fffff))) == 0;  // every |c| below 2^22
  const __m256d magic = _mm256_set1_pd(0x1.8p52);
  const __m256i magic_bits = _mm256_castpd_si256(magic);
  TESSERA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const __m256d d =
        _mm256_cvtps_pd(half == 0 ? _mm256_castps256_ps128(terms) : _mm256_extractf128_ps(terms, 1));
    __m256i integers;
    if (small) {
      integers = _mm256_castpd_si256(_mm256_fmadd_pd(d, _mm256_set1_pd(0x1p28), magic));
      integers = _mm256_sub_epi64(integers, magic_bits);
    } else {
      const __m256d shifted = _mm256_fmadd_pd(d, _mm256_set1_pd(0x1p4), magic);
      const __m256i high = _mm256_sub_epi64(_mm256_castpd_si256(shifted), magic_bits);
      const __m256d rest = _mm256_fnmadd_pd(_mm256_sub_pd(shifted, magic), _mm256_set1_pd(0x1p24),
                                            _mm256_mul_pd(d, _mm256_set1_pd(0x1p28)));
      const __m256i low = _mm256_sub_epi64(_mm256_castpd_si256(_mm256_add_pd(rest, magic)), magic_bits);
      integers = _mm256_add_epi64(_mm256_slli_epi64(high, 24), low);
    }
    int64_t* at = sums + half * 4;
    if (count >= kLanes) {
      const __m256i old = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm256_add_epi64(old, integers));
    } else {
      int64_t part[4];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), integers);
      for (int i = 0; i < 4 && half * 4 + i < count; ++i) at[i] += part[i];
    }
  }
}
// sums[lane] += high * 2^22 + low.
TESSERA_INLINE void AddSplit(int64_t* sums, I high, I low) {
  TESSERA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const __m128i steps = half == 0 ? _mm256_castsi256_si128(high) : _mm256_extracti128_si256(high, 1);
    const __m128i rest = half == 0 ? _mm256_castsi256_si128(low) : _mm256_extracti128_si256(low, 1);
    const __m256i terms =
        _mm256_add_epi64(_mm256_slli_epi64(_mm256_cvtepi32_epi64(steps), 22), _mm256_cvtepi32_epi64(rest));
    __m256i* at = reinterpret_cast<__m256i*>(sums + half * 4);
    _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), terms));
  }
}
// One rounding each. AVX2 has no conversion from int64: below 2^51 the double is exact and rounds once to
// fp32; larger sums, never seen in a sane model, are converted one by one.
TESSERA_INLINE F FromFixed(const int64_t* sums, int count) {
  if (count >= kLanes) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + 4));
    const __m256i offset = _mm256_set1_epi64x(int64_t{1} << 51);
    const __m256i outside = _mm256_or_si256(_mm256_add_epi64(low, offset), _mm256_add_epi64(high, offset));
    if (_mm256_testz_si256(outside, _mm256_set1_epi64x(static_cast<int64_t>(0xfff0000000000000)))) {
      const __m256d magic = _mm256_set1_pd(0x1.8p52);
      const __m256i magic_bits = _mm256_castpd_si256(magic);
      const __m256d d0 = _mm256_sub_pd(_mm256_castsi256_pd(_mm256_add_epi64(low, magic_bits)), magic);
      const __m256d d1 = _mm256_sub_pd(_mm256_castsi256_pd(_mm256_add_epi64(high, magic_bits)), magic);
      return _mm256_set_m128(_mm256_cvtpd_ps(d1), _mm256_cvtpd_ps(d0));
    }
  }
  float part[kLanes] = {};
  for (int i = 0; i < kLanes && i < count; ++i) part[i] = static_cast<float>(sums[i]);
  return LoadF(part);
}

// ---- int8

// Even and odd bytes of the weights are widened to 16 bits where they lie (0 .. 255), those of the
// activations with their sign, so that vpmaddwd gives whole outputs per lane, exact for every int8, -128 too.
// (The other way, vpmaddubsw with the sign moved to the activations, is no faster: three of its four
// instructions share two ports.)
constexpr int kInt8Vectors = kInt8Panel / kLanes;

TESSERA_INLINE I EvenBytes(I x) {
  return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8);
}
TESSERA_INLINE I OddBytes(I x) {
  return _mm256_srai_epi16(x, 8);
}

// One or two activation rows, widened on the way: a block of all of a panel's vectors, one pass over the
// weights.
template <int kRows>
struct Int8Inputs {
  const int8_t* x[kRows];
  static constexpr int64_t RoomBytes(int quads) { return 0; }
  TESSERA_INLINE void Prepare(int quads, void* room) {}

  // acc[row][vector]: sums of x * (w + 128) over quads [first, first + quads) against a panel's weights. Its
  // own function: between the sums of leaves the compiler would keep these in memory.
  TESSERA_NOINLINE void Multiply(int first, const uint8_t* w, int quads, I (*acc)[kInt8Vectors]) const {
    I sum[kRows][kInt8Vectors];
    TESSERA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) sum[row][v] = _mm256_setzero_si256();
    }
    const I low_bytes = _mm256_set1_epi16(0x00ff);
    for (int quad = 0; quad < quads; ++quad) {
      I even[kRows], odd[kRows];
      TESSERA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        int32_t values;
        __builtin_memcpy(&values, x[row] + (first + quad) * 4, 4);
        even[row] = EvenBytes(SetI(values));
        odd[row] = OddBytes(SetI(values));
      }
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) {
        const I weights =
            _mm256_load_si256(reinterpret_cast<const I*>(w + (int64_t{quad} * kInt8Vectors + v) * 32));
        const I weights_even = _mm256_and_si256(weights, low_bytes);
        const I weights_odd = _mm256_srli_epi16(weights, 8);
        TESSERA_UNROLL
        for (int row = 0; row < kRows; ++row) {
          sum[row][v] = AddI(sum[row][v], _mm256_madd_epi16(weights_even, even[row]));
          sum[row][v] = AddI(sum[row][v], _mm256_madd_epi16(weights_odd, odd[row]));
        }
      }
    }
    TESSERA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) acc[row][v] = sum[row][v];
    }
  }
};

// As far ahead of the weights: with four rows the multiplications fill the window that would look ahead.
constexpr int kPrefetchBytes = 8192;

// Goes on with the sums of half a panel and four widened rows: sixteen registers hold no more.
TESSERA_NOINLINE void MultiplyHalfPanel(const int32_t* wide, const uint8_t* w, int quads,
                                        I (*acc)[kInt8Vectors], int first_vector) {
  constexpr int kHalf = kInt8Vectors / 2;
  static_assert(kHalf == 2);
  I sum[4][kHalf];
  TESSERA_UNROLL
  for (int row = 0; row < 4; ++row) {
    TESSERA_UNROLL
    for (int v = 0; v < kHalf; ++v) sum[row][v] = acc[row][first_vector + v];
  }
  const I low_bytes = _mm256_set1_epi16(0x00ff);
  for (int quad = 0; quad < quads; ++quad, w += kInt8Panel * 4, wide += 8) {
    _mm_prefetch(reinterpret_cast<const char*>(w) + kPrefetchBytes, _MM_HINT_T0);
    I even[kHalf], odd[kHalf];
    TESSERA_UNROLL
    for (int v = 0; v < kHalf; ++v) {
      const I weights = _mm256_load_si256(reinterpret_cast<const I*>(w + v * 32));
      even[v] = _mm256_and_si256(weights, low_bytes);
      odd[v] = _mm256_srli_epi16(weights, 8);
    }
    TESSERA_UNROLL
    for (int row = 0; row < 4; ++row) {
      const I x_even = SetI(wide[row * 2]);
      const I x_odd = SetI(wide[row * 2 + 1]);
      TESSERA_UNROLL
      for (int v = 0; v < kHalf; ++v) {
        const I quad_sum = AddI(_mm256_madd_epi16(even[v], x_even), _mm256_madd_epi16(odd[v], x_odd));
        sum[row][v] = AddI(sum[row][v], quad_sum);
      }
      // One row after the other: mixed by the scheduler, they need more registers than there are.
      asm volatile("" : "+x"(sum[row][0]), "+x"(sum[row][1]));
    }
  }
  TESSERA_UNROLL
  for (int row = 0; row < 4; ++row) {
    TESSERA_UNROLL
    for (int v = 0; v < kHalf; ++v) acc[row][first_vector + v] = sum[row][v];
  }
}

// Four rows, widened once for all panels: [quad][row][even pair, odd pair].
template <>
struct Int8Inputs<4> {
  const int8_t* x[4];
  const int32_t* wide = nullptr;
  static constexpr int64_t RoomBytes(int quads) { return int64_t{quads} * 32; }

  TESSERA_INLINE void Prepare(int quads, void* room) {
    int32_t* to = static_cast<int32_t*>(room);
    wide = to;
    int quad = 0;
    for (; quad + 8 <= quads; quad += 8, to += 64) WidenEight(quad, to);
    for (; quad < quads; ++quad, to += 8) {
      for (int row = 0; row < 4; ++row) {
        const int8_t* from = x[row] + quad * 4;
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t low = static_cast<uint16_t>(from[odd]);
          to[row * 2 + odd] = static_cast<int32_t>(low | static_cast<uint32_t>(from[2 + odd]) << 16);
        }
      }
    }
  }
  TESSERA_INLINE void Multiply(int first, const uint8_t* w, int quads, I (*acc)[kInt8Vectors]) const {
    constexpr int kChunk = 64;  // quads: both halves of these weights pass while they are in L1
    TESSERA_UNROLL
    for (int row = 0; row < 4; ++row) {
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) acc[row][v] = _mm256_setzero_si256();
    }
    for (int quad = 0; quad < quads; quad += kChunk) {
      const int count = quads - quad < kChunk ? quads - quad : kChunk;
      const int32_t* x_at = wide + int64_t{first + quad} * 8;
      const uint8_t* w_at = w + int64_t{quad} * kInt8Panel * 4;
      MultiplyHalfPanel(x_at, w_at, count, acc, 0);
      MultiplyHalfPanel(x_at, w_at + kInt8Panel * 2, count, acc, kInt8Vectors / 2);
    }
  }

 private:
  // A transposition: quads q and q + 4 of a row lie in the two halves of a vector.
  TESSERA_INLINE void WidenEight(int quad, int32_t* to) const {
    I low[4], high[4];
    TESSERA_UNROLL
    for (int row = 0; row < 4; ++row) {
      const I bytes = LoadI(reinterpret_cast<const int32_t*>(x[row] + quad * 4));
      low[row] = _mm256_unpacklo_epi32(EvenBytes(bytes), OddBytes(bytes));
      high[row] = _mm256_unpackhi_epi32(EvenBytes(bytes), OddBytes(bytes));
    }
    TESSERA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const I* from = i < 2 ? low : high;
      const I first =
          i % 2 == 0 ? _mm256_unpacklo_epi64(from[0], from[1]) : _mm256_unpackhi_epi64(from[0], from[1]);
      const I second =
          i % 2 == 0 ? _mm256_unpacklo_epi64(from[2], from[3]) : _mm256_unpackhi_epi64(from[2], from[3]);
      StoreI(to + i * 8, _mm256_permute2x128_si256(first, second, 0x20));
      StoreI(to + (i + 4) * 8, _mm256_permute2x128_si256(first, second, 0x31));
    }
  }
};
