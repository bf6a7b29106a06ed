// Attention of one tile, a canonical block of 512 positions at a time. One source for every vector set:
// included after gemm-inl.h, inside its namespace and target region. The meaning is Attention in
// reference.cc.
//
// Scores: query rows lie in vector lanes, a pair of the cache is broadcast, so one pass over a latent row
// serves every head and token of the tile. Output: latent columns lie in lanes, the value pairs of 64
// positions are interleaved once for all rows, a pair of probabilities is broadcast. Both are pair chains in
// canonical order.

struct AttentionPass {
  const AttentionTile& tile;
  const AttentionScratch parts;
  std::byte* scratch;
  int row_vectors;  // of query rows
  int row_stride;   // row_vectors * kLanes
  int block_begin = 0;
  int block_count = 0;  // positions of the block that any row sees

  // Per query row, padded to whole vectors: positions visible in all, running maximum and sum, the block's,
  // and the factors of a merge.
  alignas(64) int32_t num_visible[kAttentionRows] = {};
  alignas(64) float m[kAttentionRows] = {};
  alignas(64) float l[kAttentionRows] = {};
  alignas(64) float block_m[kAttentionRows] = {};
  alignas(64) float block_l[kAttentionRows] = {};
  alignas(64) float keep_factor[kAttentionRows] = {};
  alignas(64) float block_factor[kAttentionRows] = {};
  // The cache rows of the block; beyond block_count the last one again, so that position groups are whole.
  const Bf16* cache_rows[kAttentionBlock + kScorePositions * 2];

  AttentionPass(const AttentionTile& the_tile, void* the_scratch)
      : tile(the_tile),
        parts(the_tile.latent, the_tile.rope),
        scratch(static_cast<std::byte*>(the_scratch)),
        row_vectors((the_tile.num_rows + kLanes - 1) / kLanes),
        row_stride(row_vectors * kLanes) {}

  int32_t* queries() const { return reinterpret_cast<int32_t*>(scratch + parts.queries()); }
  float* scores() const { return reinterpret_cast<float*>(scratch + parts.scores()); }
  int32_t* probabilities() const { return reinterpret_cast<int32_t*>(scratch + parts.probabilities()); }
  int32_t* values() const { return reinterpret_cast<int32_t*>(scratch + parts.values()); }
  float* block_output() const { return reinterpret_cast<float*>(scratch + parts.block_output()); }
  float* output() const { return reinterpret_cast<float*>(scratch + parts.output()); }
};

// Pairs as one 32-bit word each, [pair][row]; missing rows are zero.
inline void PackQueries(AttentionPass& pass) {
  const AttentionTile& tile = pass.tile;
  for (int row = 0; row < pass.row_stride; ++row) {
    int32_t* to = pass.queries() + row;
    const Bf16* from = tile.queries.data + row * tile.queries.stride;
    for (int pair = 0; pair < pass.parts.query_pairs; ++pair) {
      int32_t word = 0;
      if (row < tile.num_rows) __builtin_memcpy(&word, from + pair * 2, 4);
      to[int64_t{pair} * pass.row_stride] = word;
    }
    pass.num_visible[row] = row < tile.num_rows ? tile.num_visible[row] : 0;
  }
}

inline void FindCacheRows(AttentionPass& pass) {
  const LatentPages& pages = pass.tile.pages;
  for (int t = 0; t < pass.block_count;) {
    const int position = pass.block_begin + t;
    const int offset = position % pages.block_size;
    const Bf16* at = pages.base + pages.block_ids[position / pages.block_size] * pages.block_stride +
                     offset * pages.row_stride;
    const int in_page = pages.block_size - offset;
    const int end = pass.block_count - t < in_page ? pass.block_count : t + in_page;
    for (; t < end; ++t, at += pages.row_stride) pass.cache_rows[t] = at;
  }
  for (int t = 0; t < kScorePositions * 2; ++t) {
    pass.cache_rows[pass.block_count + t] = pass.cache_rows[pass.block_count - 1];
  }
}

// Scaled scores of positions [t, t + kPositions) for kVectors vectors of rows from vector v on.
template <int kPositions, int kVectors>
inline void ScorePositions(const AttentionPass& pass, int t, int v) {
  F sum[kPositions][kVectors];
  const Bf16* keys[kPositions];
  TESSERA_UNROLL
  for (int i = 0; i < kPositions; ++i) {
    keys[i] = pass.cache_rows[t + i];
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[i][j] = SetF(0.0f);
  }
  const Bf16* queries = reinterpret_cast<const Bf16*>(pass.queries() + v * kLanes);
  for (int pair = 0; pair < pass.parts.query_pairs; ++pair, queries += pass.row_stride * 2) {
    PairOp::Weights rows[kVectors];
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) rows[j] = PairOp::Load(queries + j * kLanes * 2);
    TESSERA_UNROLL
    for (int i = 0; i < kPositions; ++i) {
      const PairOp::Input key = PairOp::Broadcast(keys[i] + pair * 2);
      TESSERA_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[i][j] = PairOp::Step(sum[i][j], rows[j], key);
    }
  }
  TESSERA_UNROLL
  for (int i = 0; i < kPositions; ++i) {
    if (t + i >= kAttentionBlock) break;
    float* to = pass.scores() + int64_t{t + i} * pass.row_stride + v * kLanes;
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) StoreF(to + j * kLanes, Mul(sum[i][j], SetF(pass.tile.softmax_scale)));
  }
}

inline void ScoreBlock(const AttentionPass& pass) {
  int v = 0;
  if (pass.row_vectors >= kScoreVectors) {
    for (int t = 0; t < pass.block_count; t += kScorePositions) {
      for (v = 0; v + kScoreVectors <= pass.row_vectors; v += kScoreVectors) {
        ScorePositions<kScorePositions, kScoreVectors>(pass, t, v);
      }
    }
  }
  for (; v < pass.row_vectors; ++v) {
    for (int t = 0; t < pass.block_count; t += kScorePositions * 2)
      ScorePositions<kScorePositions * 2, 1>(pass, t, v);
  }
}

// Maximum over the visible positions of one vector of rows. Returns the rows with a score that is not finite.
inline uint32_t BlockMaximum(AttentionPass& pass, int v, I visible) {
  const float* scores = pass.scores() + v * kLanes;
  const F lowest = AsF(SetI(static_cast<int32_t>(0xff800000)));
  F m = lowest;
  I magnitude = SetI(0);
  for (int t = 0; t < pass.block_count; ++t, scores += pass.row_stride) {
    const M seen = GreaterI(visible, SetI(t));
    const F score = LoadF(scores);
    m = Max(SelectF(seen, score, lowest), m);
    magnitude = MaxI(magnitude, SelectI(seen, AndI(AsI(score), SetI(0x7fffffff)), SetI(0)));
  }
  StoreF(pass.block_m + v * kLanes, m);
  return LaneBits(GreaterI(magnitude, SetI(kInfinityBits - 1)));
}

// p of one vector of rows at position t, masked where the row does not see it, as bf16 in the low half.
TESSERA_INLINE I Probability(const AttentionPass& pass, int v, int t, F m, I visible) {
  const F score = LoadF(pass.scores() + int64_t{t} * pass.row_stride + v * kLanes);
  return SelectI(GreaterI(visible, SetI(t)), RoundBf16(Exp(Sub(score, m))), SetI(0));
}

// Probabilities of one vector of rows, and their 64-lane sum: lane = position mod 64, upwards.
inline void BlockProbabilities(AttentionPass& pass, int v, I visible) {
  const F m = LoadF(pass.block_m + v * kLanes);
  F lanes[64];
  for (int lane = 0; lane < 64; lane += 2) {
    F even = SetF(0.0f);
    F odd = SetF(0.0f);
    for (int t = lane; t < pass.block_count; t += 64) {
      const I first = Probability(pass, v, t, m, visible);
      const I second = ShiftLeft<16>(Probability(pass, v, t + 1, m, visible));
      even = Add(even, AsF(ShiftLeft<16>(first)));
      odd = Add(odd, AsF(second));
      StoreI(pass.probabilities() + int64_t{t / 2} * pass.row_stride + v * kLanes, OrI(first, second));
    }
    lanes[lane] = even;
    lanes[lane + 1] = odd;
  }
  for (int apart = 32; apart > 0; apart /= 2) {
    for (int lane = 0; lane < apart; ++lane) lanes[lane] = Add(lanes[lane], lanes[lane + apart]);
  }
  StoreF(pass.block_l + v * kLanes, lanes[0]);
}

// Value pairs of positions [begin, begin + count) as words [pair][padded latent]. A last position without
// partner is its own: the partner's probability is zero.
inline void InterleaveValues(const AttentionPass& pass, int begin, int count) {
  for (int t = 0; t < count; t += 2) {
    const Bf16* even = pass.cache_rows[begin + t];
    const Bf16* odd = t + 1 < count ? pass.cache_rows[begin + t + 1] : even;
    int32_t* to = pass.values() + int64_t{t / 2} * pass.parts.padded_latent;
    for (int d = 0; d < pass.parts.padded_latent; d += kLanes) {
      const int left = LanesLeft(pass.tile.latent, d);
      const I low = ShiftRight<16>(AsI(LoadBf16(even + d, left)));
      StoreI(to + d, OrI(low, AsI(LoadBf16(odd + d, left))));
    }
  }
}

// Goes on with the output chains of kValueRows rows and kVectors vectors of the latent over one tile of
// values.
template <int kVectors>
inline void ValueBlock(const AttentionPass& pass, int begin, int count, int row, int d) {
  F sum[kValueRows][kVectors];
  float* output = pass.block_output() + int64_t{row} * pass.parts.padded_latent + d;
  TESSERA_UNROLL
  for (int r = 0; r < kValueRows; ++r) {
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      sum[r][j] = begin == 0 ? SetF(0.0f) : LoadF(output + r * pass.parts.padded_latent + j * kLanes);
    }
  }
  const Bf16* values = reinterpret_cast<const Bf16*>(pass.values() + d);
  const Bf16* p =
      reinterpret_cast<const Bf16*>(pass.probabilities() + int64_t{begin / 2} * pass.row_stride + row);
  for (int t = 0; t < count; t += 2) {
    PairOp::Weights columns[kVectors];
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) columns[j] = PairOp::Load(values + j * kLanes * 2);
    TESSERA_UNROLL
    for (int r = 0; r < kValueRows; ++r) {
      const PairOp::Input input = PairOp::Broadcast(p + r * 2);
      TESSERA_UNROLL
      for (int j = 0; j < kVectors; ++j) sum[r][j] = PairOp::Step(sum[r][j], columns[j], input);
    }
    values += pass.parts.padded_latent * 2;
    p += pass.row_stride * 2;
  }
  TESSERA_UNROLL
  for (int r = 0; r < kValueRows; ++r) {
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) StoreF(output + r * pass.parts.padded_latent + j * kLanes, sum[r][j]);
  }
}

inline void OutputBlock(const AttentionPass& pass) {
  constexpr int kTile = AttentionScratch::kValuePositions;
  for (int begin = 0; begin < pass.block_count; begin += kTile) {
    const int count = pass.block_count - begin < kTile ? pass.block_count - begin : kTile;
    InterleaveValues(pass, begin, count);
    for (int row = 0; row < pass.tile.num_rows; row += kValueRows) {
      int d = 0;
      for (; d + kValueVectors * kLanes <= pass.parts.padded_latent; d += kValueVectors * kLanes) {
        ValueBlock<kValueVectors>(pass, begin, count, row, d);
      }
      for (; d < pass.parts.padded_latent; d += kLanes) ValueBlock<1>(pass, begin, count, row, d);
    }
  }
}

// Merges the block's maximum and sum of one vector of rows; gives the factors of the outputs.
inline void MergeSums(AttentionPass& pass, int v, I visible) {
  const int at = v * kLanes;
  const F block_m = LoadF(pass.block_m + at);
  const F block_l = LoadF(pass.block_l + at);
  if (pass.block_begin == 0) {
    StoreF(pass.m + at, block_m);
    StoreF(pass.l + at, block_l);
    return;
  }
  const M active = GreaterI(visible, SetI(0));
  const F old_m = LoadF(pass.m + at);
  const F old_l = LoadF(pass.l + at);
  const F m = Max(old_m, block_m);
  const F a = Exp(Sub(old_m, m));
  const F b = Exp(Sub(block_m, m));
  StoreF(pass.keep_factor + at, a);
  StoreF(pass.block_factor + at, b);
  StoreF(pass.m + at, SelectF(active, m, old_m));
  StoreF(pass.l + at, SelectF(active, Fma(block_l, b, Mul(old_l, a)), old_l));
}

inline void MergeOutputs(AttentionPass& pass) {
  for (int row = 0; row < pass.tile.num_rows; ++row) {
    if (pass.num_visible[row] <= pass.block_begin) continue;
    const float* from = pass.block_output() + int64_t{row} * pass.parts.padded_latent;
    float* to = pass.output() + int64_t{row} * pass.parts.padded_latent;
    const F a = SetF(pass.keep_factor[row]);
    const F b = SetF(pass.block_factor[row]);
    for (int d = 0; d < pass.parts.padded_latent; d += kLanes) {
      const F o = Add(LoadF(from + d), SetF(0.0f));
      StoreF(to + d, pass.block_begin == 0 ? o : Fma(o, b, Mul(LoadF(to + d), a)));
    }
  }
}

// One canonical block for all rows. Returns the rows with a visible score that is not finite.
inline uint64_t AttendBlock(AttentionPass& pass) {
  uint64_t bad = 0;
  FindCacheRows(pass);
  ScoreBlock(pass);
  for (int v = 0; v < pass.row_vectors; ++v) {
    const I visible = SubI(LoadI(pass.num_visible + v * kLanes), SetI(pass.block_begin));
    bad |= uint64_t{BlockMaximum(pass, v, visible)} << (v * kLanes);
    BlockProbabilities(pass, v, visible);
    MergeSums(pass, v, visible);
  }
  OutputBlock(pass);
  MergeOutputs(pass);
  return bad;
}

inline bool Attention(const AttentionTile& tile, void* scratch, Bf16* out, int64_t out_stride,
                      uint64_t* bad_rows) {
  AttentionPass pass(tile, scratch);
  PackQueries(pass);
  int positions = 0;
  for (int row = 0; row < tile.num_rows; ++row) {
    if (tile.num_visible[row] > positions) positions = tile.num_visible[row];
  }
  for (int begin = 0; begin < positions; begin += kAttentionBlock) {
    pass.block_begin = begin;
    pass.block_count = positions - begin < kAttentionBlock ? positions - begin : kAttentionBlock;
    // A value that is not finite reaches, as 0 * infinity, rows of the tile that do not see it. Rare, and an
    // error of the requests that do see it: the reference keeps the rows apart.
    if (AttendBlock(pass) != 0) return kScalarTable.attention(tile, scratch, out, out_stride, bad_rows);
  }
  for (int row = 0; row < tile.num_rows; ++row) {
    const float* from = pass.output() + int64_t{row} * pass.parts.padded_latent;
    const F l = SetF(pass.l[row]);
    for (int d = 0; d < tile.latent; d += kLanes) {
      StoreBf16(out + row * out_stride + d, Div(LoadF(from + d), l), LanesLeft(tile.latent, d));
    }
  }
  if (bad_rows != nullptr) *bad_rows = 0;
  return true;
}
