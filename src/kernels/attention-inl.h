// Attention of one tile, a canonical block of 512 positions at a time. One source for every vector set:
// included after gemm-inl.h, inside its namespace and target region. The meaning is Attention in
// reference.cc.
//
// Scores: query rows lie in vector lanes, a pair of the cache is broadcast, so one pass over a latent row
// serves every head and token of the tile. Output: latent columns lie in lanes, a pair of probabilities is
// broadcast. Both are pair chains in canonical order. Cache rows are laid out as LanePairOp wants them a few
// positions at a time, which stay in L1 or L2 while all query rows pass.

struct AttentionPass {
  const AttentionTile& tile;
  const AttentionScratch parts;
  std::byte* scratch;
  int row_vectors;  // of query rows
  int row_stride;   // row_vectors * kLanes
  int block_begin = 0;
  int block_count = 0;  // positions of the block that any row sees
  int all_visible = 0;  // positions of the block that every row sees: as many or more, or fewer than none

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

  using Element = LanePairOp::Element;
  Element* queries() const { return reinterpret_cast<Element*>(scratch + parts.queries()); }
  // Of one vector of rows.
  float* scores(int v) const {
    return reinterpret_cast<float*>(scratch + parts.scores()) + v * kAttentionBlock * kLanes;
  }
  Element* probabilities(int v) const {
    return reinterpret_cast<Element*>(scratch + parts.probabilities()) + v * kAttentionBlock * kLanes;
  }
  Element* rows() const { return reinterpret_cast<Element*>(scratch + parts.rows()); }
  float* block_output() const { return reinterpret_cast<float*>(scratch + parts.block_output()); }
  float* output() const { return reinterpret_cast<float*>(scratch + parts.output()); }
};

// [pair][row] pairs. Missing rows are the last one again.
inline void PackQueries(AttentionPass& pass) {
  const AttentionTile& tile = pass.tile;
  for (int first = 0; first < pass.row_stride; first += kLanes) {
    int32_t offsets[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int row = first + lane < tile.num_rows ? first + lane : tile.num_rows - 1;
      offsets[lane] = static_cast<int32_t>(row * tile.queries.stride);
      pass.num_visible[first + lane] = tile.num_visible[row];
    }
    const I rows = LoadI(offsets);
    LanePairOp::Element* to = LanePairOp::At(pass.queries(), first);
    for (int pair = 0; pair < pass.parts.query_pairs; ++pair, to += pass.row_stride * 2) {
      LanePairOp::StoreWords(to, pass.row_stride, GatherWords(tile.queries.data + pair * 2, rows));
    }
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

// Scaled scores of positions [t, t + kPositions), whose keys are given, for kVectors vectors of rows from
// vector v on.
template <int kPositions, int kVectors>
TESSERA_NOINLINE void ScorePositions(const AttentionPass& pass, const LanePairOp::Element* const* keys, int t,
                                     int v) {
  F sum[kPositions][kVectors];
  TESSERA_UNROLL
  for (int i = 0; i < kPositions; ++i) {
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) sum[i][j] = SetF(0.0f);
  }
  const int64_t n = pass.row_stride;
  const LanePairOp::Element* queries = LanePairOp::At(pass.queries(), v * kLanes);
  for (int pair = 0; pair < pass.parts.query_pairs; ++pair, queries += n * 2) {
    TESSERA_UNROLL
    for (int phase = 0; phase < LanePairOp::kPhases; ++phase) {
      LanePairOp::Operand rows[kVectors];
      TESSERA_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        rows[j] = LanePairOp::Load(queries, n, j * kLanes, phase);
      }
      TESSERA_UNROLL
      for (int i = 0; i < kPositions; ++i) {
        const LanePairOp::Operand key = LanePairOp::Broadcast(keys[i] + pair * 2, 1, 0, phase);
        TESSERA_UNROLL
        for (int j = 0; j < kVectors; ++j) sum[i][j] = LanePairOp::Step(sum[i][j], rows[j], key);
      }
    }
  }
  TESSERA_UNROLL
  for (int i = 0; i < kPositions; ++i) {
    if (t + i >= kAttentionBlock) break;
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      StoreF(pass.scores(v + j) + (t + i) * kLanes, Mul(sum[i][j], SetF(pass.tile.softmax_scale)));
    }
  }
}

// Scores of positions [begin, begin + count), rounded up to whole groups.
inline void ScoreTile(const AttentionPass& pass, int begin, int count) {
  constexpr int kGroup = kScorePositions * 2;
  count = (count + kGroup - 1) / kGroup * kGroup;
  const LanePairOp::Element* keys[AttentionScratch::kTilePositions];
  for (int t = 0; t < count; ++t) {
    keys[t] = LanePairOp::Key(pass.cache_rows[begin + t], pass.tile.width(),
                              pass.rows() + int64_t{t} * pass.parts.padded_width);
  }
  int v = 0;
  for (; v + kScoreVectors <= pass.row_vectors; v += kScoreVectors) {
    for (int t = 0; t < count; t += kScorePositions) {
      ScorePositions<kScorePositions, kScoreVectors>(pass, keys + t, begin + t, v);
    }
  }
  for (; v < pass.row_vectors; ++v) {
    for (int t = 0; t < count; t += kGroup) ScorePositions<kGroup, 1>(pass, keys + t, begin + t, v);
  }
}

// Maximum over the visible positions of one vector of rows; scores that a row does not see become -inf.
// Returns the rows with a visible score that is not finite.
inline uint32_t BlockMaximum(AttentionPass& pass, int v, I visible) {
  const F lowest = AsF(SetI(static_cast<int32_t>(0xff800000)));
  F m = lowest;
  I magnitude = SetI(0);
  for (int t = 0; t < (pass.block_count + 1) / 2 * 2; ++t) {
    float* at = pass.scores(v) + t * kLanes;
    F score = LoadF(at);
    I size = AndI(AsI(score), SetI(0x7fffffff));
    if (t >= pass.all_visible) {
      const M seen = GreaterI(visible, SetI(t));
      score = SelectF(seen, score, lowest);
      size = SelectI(seen, size, SetI(0));
      StoreF(at, score);
    }
    m = Max(score, m);
    magnitude = MaxI(magnitude, size);
  }
  StoreF(pass.block_m + v * kLanes, m);
  return LaneBits(GreaterI(magnitude, SetI(kInfinityBits - 1)));
}

// p of one vector of rows at position t as bf16 in the high half, rounded without the cases that cannot
// occur: exp gives no NaN and no denormal here. (A row that sees nothing of the block may give anything.)
TESSERA_INLINE I Probability(const AttentionPass& pass, int v, int t, F m) {
  const F score = LoadF(pass.scores(v) + t * kLanes);
  const I bits = AsI(ExpOfNegative(Sub(score, m)));
  const I half = AddI(SetI(0x7fff), AndI(ShiftRight<16>(bits), SetI(1)));
  return AndI(AddI(bits, half), SetI(static_cast<int32_t>(0xffff0000)));
}

// Probabilities of one vector of rows, and their 64-lane sum: lane = position mod 64, upwards.
inline void BlockProbabilities(AttentionPass& pass, int v) {
  const F m = LoadF(pass.block_m + v * kLanes);
  F lanes[64];
  for (int lane = 0; lane < 64; lane += 2) {
    F even = SetF(0.0f);
    F odd = SetF(0.0f);
    for (int t = lane; t < pass.block_count; t += 64) {
      const I first = Probability(pass, v, t, m);
      const I second = Probability(pass, v, t + 1, m);
      even = Add(even, AsF(first));
      odd = Add(odd, AsF(second));
      LanePairOp::Store(pass.probabilities(v) + t * kLanes, kLanes, first, second);
    }
    lanes[lane] = even;
    lanes[lane + 1] = odd;
  }
  for (int apart = 32; apart > 0; apart /= 2) {
    for (int lane = 0; lane < apart; ++lane) lanes[lane] = Add(lanes[lane], lanes[lane + apart]);
  }
  StoreF(pass.block_l + v * kLanes, lanes[0]);
}

// Goes on with the output chains of kValueRows rows and kVectors vectors of the latent over positions
// [begin, begin + count), whose values are laid out.
template <int kVectors>
TESSERA_NOINLINE void ValueBlock(const AttentionPass& pass, int begin, int count, int row, int d) {
  F sum[kValueRows][kVectors];
  float* output = pass.block_output() + int64_t{row} * pass.parts.padded_latent + d;
  TESSERA_UNROLL
  for (int r = 0; r < kValueRows; ++r) {
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      sum[r][j] = begin == 0 ? SetF(0.0f) : LoadF(output + r * pass.parts.padded_latent + j * kLanes);
    }
  }
  const int64_t num_columns = pass.parts.padded_width;
  const LanePairOp::Element* values = LanePairOp::At(pass.rows(), d);
  static_assert(kLanes % kValueRows == 0);
  const LanePairOp::Element* p =
      LanePairOp::At(pass.probabilities(row / kLanes) + begin * kLanes, row % kLanes);
  for (int t = 0; t < count; t += 2) {
    TESSERA_UNROLL
    for (int phase = 0; phase < LanePairOp::kPhases; ++phase) {
      LanePairOp::Operand columns[kVectors];
      TESSERA_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        columns[j] = LanePairOp::Load(values, num_columns, j * kLanes, phase);
      }
      TESSERA_UNROLL
      for (int r = 0; r < kValueRows; ++r) {
        const LanePairOp::Operand input = LanePairOp::Broadcast(p, kLanes, r, phase);
        TESSERA_UNROLL
        for (int j = 0; j < kVectors; ++j) sum[r][j] = LanePairOp::Step(sum[r][j], columns[j], input);
      }
    }
    values += num_columns * 2;
    p += kLanes * 2;
  }
  TESSERA_UNROLL
  for (int r = 0; r < kValueRows; ++r) {
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) StoreF(output + r * pass.parts.padded_latent + j * kLanes, sum[r][j]);
  }
}

// A last position without partner is its own: the partner's probability is zero.
inline void ValueTile(const AttentionPass& pass, int begin, int count) {
  for (int t = 0; t < count; t += 2) {
    LanePairOp::LayOut(pass.cache_rows[begin + t], pass.cache_rows[begin + t + 1], pass.tile.latent,
                       pass.parts.padded_width, pass.rows() + int64_t{t} * pass.parts.padded_width);
  }
  int d = 0;
  for (; d + kValueVectors * kLanes <= pass.parts.padded_latent; d += kValueVectors * kLanes) {
    for (int row = 0; row < pass.tile.num_rows; row += kValueRows) {
      ValueBlock<kValueVectors>(pass, begin, count, row, d);
    }
  }
  for (; d < pass.parts.padded_latent; d += kLanes) {
    for (int row = 0; row < pass.tile.num_rows; row += kValueRows) ValueBlock<1>(pass, begin, count, row, d);
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
  constexpr int kTile = AttentionScratch::kTilePositions;
  const auto positions_from = [&](int begin) {
    return pass.block_count - begin < kTile ? pass.block_count - begin : kTile;
  };
  FindCacheRows(pass);
  for (int begin = 0; begin < pass.block_count; begin += kTile) ScoreTile(pass, begin, positions_from(begin));
  for (int v = 0; v < pass.row_vectors; ++v) {
    const I visible = SubI(LoadI(pass.num_visible + v * kLanes), SetI(pass.block_begin));
    bad |= uint64_t{BlockMaximum(pass, v, visible)} << (v * kLanes);
    BlockProbabilities(pass, v);
    MergeSums(pass, v, visible);
  }
  for (int begin = 0; begin < pass.block_count; begin += kTile) ValueTile(pass, begin, positions_from(begin));
  MergeOutputs(pass);
  return bad;
}

inline bool Attention(const AttentionTile& tile, void* scratch, Bf16* out, int64_t out_stride,
                      uint64_t* bad_rows) {
  AttentionPass pass(tile, scratch);
  int positions = 0;
  int least = tile.num_visible[0];
  for (int row = 0; row < tile.num_rows; ++row) {
    if (tile.num_visible[row] > positions) positions = tile.num_visible[row];
    if (tile.num_visible[row] < least) least = tile.num_visible[row];
  }
  PackQueries(pass);
  for (int begin = 0; begin < positions; begin += kAttentionBlock) {
    pass.block_begin = begin;
    pass.all_visible = least - begin;
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
