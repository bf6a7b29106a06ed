// Attention of one tile, a canonical block of 512 positions at a time. One source for every vector set:
// included after gemm-inl.h, inside its namespace and target region. The meaning is Attention in
// reference.cc.
//
// Scores: query rows lie in vector lanes, a pair of the cache is broadcast, so one pass over a row of it
// serves every head and token of the tile. Output: columns of the value lie in lanes, a pair of probabilities
// is broadcast. Both are pair chains in canonical order, blocked like a matrix product: the panel of the
// operand that lies in lanes stays in L1 while all rows of the other one pass it, out of L2.

struct AttentionPass {
  const AttentionTile& tile;
  const AttentionScratch places;
  std::byte* scratch;
  const int row_vectors;  // of query rows
  int block_begin = 0;
  int block_count = 0;  // positions of the block that any row sees
  int all_visible = 0;  // positions of the block that every row sees: as many or more, or fewer than none
  AttentionPart part;   // where the block's result goes

  // Per query row, padded to whole vectors: positions visible in all.
  alignas(64) int32_t num_visible[kAttentionRows] = {};
  // The cache rows of the block; beyond block_count the last one again, so that position groups are whole.
  const Bf16* cache_rows[AttentionScratch::kPaddedBlock];

  AttentionPass(const AttentionTile& the_tile, void* the_scratch)
      : tile(the_tile),
        places(the_tile.key_width, the_tile.value_width),
        scratch(static_cast<std::byte*>(the_scratch)),
        row_vectors((the_tile.num_rows + kLanes - 1) / kLanes),
        part(scratch + places.block(), the_tile.value_width) {}

  using Element = LanePairOp::Element;
  // The panel of queries that begins with vector v: [pair][row of the panel] pairs.
  Element* queries(int v) const {
    return reinterpret_cast<Element*>(scratch + places.queries()) +
           int64_t{v} * kLanes * 2 * places.query_pairs;
  }
  // Vectors in that panel.
  int panel_vectors(int v) const { return v + kScoreVectors <= row_vectors ? kScoreVectors : 1; }
  // Of one vector of rows: [position][lane] fp32.
  float* scores(int v) const {
    return reinterpret_cast<float*>(scratch + places.scores()) +
           int64_t{v} * AttentionScratch::kPaddedBlock * kLanes;
  }
  // The same memory once scores have become probabilities: a pair of positions begins where the scores of its
  // first one did.
  Element* probabilities(int v, int t) const { return reinterpret_cast<Element*>(scores(v) + t * kLanes); }
  // Elements from one pair of positions to the next.
  static constexpr int kProbabilityStep = 2 * kLanes * 4 / static_cast<int>(sizeof(Element));
  // What is laid out at a time: keys of a few positions, or the values of some columns.
  Element* rows() const { return reinterpret_cast<Element*>(scratch + places.rows()); }
};

inline void PackQueries(AttentionPass& pass) {
  const AttentionTile& tile = pass.tile;
  const int pairs = pass.places.query_pairs;
  for (int v = 0; v < pass.row_vectors;) {
    const int vectors = pass.panel_vectors(v);
    const int64_t n = int64_t{vectors} * kLanes;
    for (int j = 0; j < vectors; ++j) {
      const Bf16* rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {  // missing rows are the last one again
        const int row = (v + j) * kLanes + lane < tile.num_rows ? (v + j) * kLanes + lane : tile.num_rows - 1;
        rows[lane] = tile.queries.data + row * tile.queries.stride;
        pass.num_visible[(v + j) * kLanes + lane] = tile.num_visible[row];
      }
      LanePairOp::Element* to = LanePairOp::At(pass.queries(v), j * kLanes);
      Bf16 rest[kLanes][8] = {};
      for (int pair = 0; pair < pairs; pair += 4) {
        const int words = pairs - pair < 4 ? pairs - pair : 4;
        const int left = tile.key_width - pair * 2;
        for (int lane = 0; lane < kLanes; ++lane) {
          if (left >= 8) break;
          for (int i = 0; i < left; ++i) rest[lane][i] = rows[lane][pair * 2 + i];
          rows[lane] = rest[lane];
        }
        I columns[4];
        LoadColumns(rows, left >= 8 ? pair * 2 : 0, columns);
        for (int i = 0; i < words; ++i, to += n * 2) LanePairOp::StoreWords(to, n, columns[i]);
      }
    }
    v += vectors;
  }
}

inline void FindCacheRows(AttentionPass& pass) {
  const CachePages& pages = pass.tile.pages;
  for (int t = 0; t < pass.block_count;) {
    const int position = pass.block_begin + t;
    const int offset = position % pages.block_size;
    const Bf16* at = pages.base + pages.block_ids[position / pages.block_size] * pages.block_stride +
                     offset * pages.row_stride;
    const int in_page = pages.block_size - offset;
    const int end = pass.block_count - t < in_page ? pass.block_count : t + in_page;
    for (; t < end; ++t, at += pages.row_stride) pass.cache_rows[t] = at;
  }
  for (int t = pass.block_count; t < AttentionScratch::kPaddedBlock; ++t) {
    pass.cache_rows[t] = pass.cache_rows[pass.block_count - 1];
  }
}

// A register block of pair chains, kRows x kVectors vectors: lanes come from a panel, row i's pairs lie at
// inputs[i], kStep elements apart, and are broadcast. Goes on with `sums` unless `first`; what is stored is
// scaled, and a zero is positive.
struct PairBlock {
  const LanePairOp::Element* panel;  // [pair][lane] pairs
  const LanePairOp::Element* const* inputs;
  int num_pairs;
  float* sums;  // of vector j of row i at i * row_stride + j * vector_stride
  int64_t row_stride;
  int64_t vector_stride;
  bool first;
  float scale;
};

template <int kRows, int kVectors, int kStep, int kInputLanes>
TESSERA_NOINLINE void RunPairs(const PairBlock& block) {
  F sum[kRows][kVectors];
  const LanePairOp::Element* inputs[kRows];
  float* const sums = block.sums;
  const int64_t row_stride = block.row_stride;
  const int64_t vector_stride = block.vector_stride;
  TESSERA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    inputs[i] = block.inputs[i];
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      sum[i][j] = block.first ? SetF(0.0f) : LoadF(sums + i * row_stride + j * vector_stride);
    }
  }
  constexpr int kColumns = kVectors * kLanes;
  const LanePairOp::Element* panel = block.panel;
  const int64_t end = int64_t{block.num_pairs} * kStep;
  for (int64_t at = 0; at < end; at += kStep, panel += kColumns * 2) {
    TESSERA_UNROLL
    for (int phase = 0; phase < LanePairOp::kPhases; ++phase) {
      LanePairOp::Operand columns[kVectors];
      TESSERA_UNROLL
      for (int j = 0; j < kVectors; ++j) columns[j] = LanePairOp::Load(panel, kColumns, j * kLanes, phase);
      TESSERA_UNROLL
      for (int i = 0; i < kRows; ++i) {
        const LanePairOp::Operand input = LanePairOp::Broadcast(inputs[i] + at, kInputLanes, 0, phase);
        TESSERA_UNROLL
        for (int j = 0; j < kVectors; ++j) sum[i][j] = LanePairOp::Step(sum[i][j], columns[j], input);
      }
    }
  }
  const F scale = SetF(block.scale);
  TESSERA_UNROLL
  for (int i = 0; i < kRows; ++i) {
    TESSERA_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      StoreF(sums + i * row_stride + j * vector_stride, Fma(sum[i][j], scale, SetF(0.0f)));
    }
  }
}

// Pairs [from, to) of the keys of kPositions positions from t on, so that they come from L2 later. A few
// lines at a time: more would keep those in hand waiting.
template <int kPositions>
TESSERA_INLINE void FetchKeys(const AttentionPass& pass, int t, int from, int to) {
  if (t + kPositions > pass.block_count) return;
  TESSERA_UNROLL
  for (int i = 0; i < kPositions; ++i) {
    const Bf16* key = pass.cache_rows[t + i] + pass.tile.key_begin;
    for (int pair = from; pair < to; pair += 16) __builtin_prefetch(key + pair * 2, 0, 2);
  }
}

// Goes on with the score chains of positions [begin, begin + count), whose keys are given, rounded up to
// whole groups, and the panel of kVectors vectors of query rows from v on, over pairs [from, to). Keys of as
// many positions behind them are fetched meanwhile.
template <int kPositions, int kVectors>
inline void ScorePanel(const AttentionPass& pass, const LanePairOp::Element* const* keys, int begin,
                       int count, int v, int from, int to) {
  const LanePairOp::Element* inputs[AttentionScratch::kTilePositions];
  for (int t = 0; t < count; ++t) inputs[t] = keys[t] + from * 2;
  PairBlock block = {.panel = pass.queries(v) + int64_t{from} * kVectors * kLanes * 2,
                     .num_pairs = to - from,
                     .row_stride = kLanes,
                     .vector_stride = AttentionScratch::kPaddedBlock * kLanes,
                     .first = from == 0,
                     .scale = to == pass.places.query_pairs ? pass.tile.softmax_scale : 1.0f};
  for (int t = 0; t < count; t += kPositions) {
    if (v == 0) FetchKeys<kPositions>(pass, begin + count + t, from, to);
    block.inputs = inputs + t;
    block.sums = pass.scores(v) + (begin + t) * kLanes;
    RunPairs<kPositions, kVectors, 2, 1>(block);
  }
}

// Scores of positions [begin, begin + count), rounded up to whole groups.
inline void ScoreTile(const AttentionPass& pass, int begin, int count) {
  constexpr int kGroup = kScorePositions * 2;  // of one vector of rows
  constexpr int kChunk = AttentionScratch::kPanelBytes / (kScoreVectors * kLanes * LanePairOp::kPairBytes);
  count = (count + kGroup - 1) / kGroup * kGroup;
  const LanePairOp::Element* keys[AttentionScratch::kTilePositions];
  for (int t = 0; t < count; ++t) {
    keys[t] = LanePairOp::Key(pass.cache_rows[begin + t] + pass.tile.key_begin, pass.tile.key_width,
                              pass.rows() + int64_t{t} * pass.places.padded_key);
  }
  const int pairs = pass.places.query_pairs;
  for (int from = 0; from < pairs; from += kChunk) {
    const int to = pairs - from < kChunk ? pairs : from + kChunk;
    for (int v = 0; v < pass.row_vectors; v += pass.panel_vectors(v)) {
      if (pass.panel_vectors(v) == 1) {
        ScorePanel<kGroup, 1>(pass, keys, begin, count, v, from, to);
      } else {
        ScorePanel<kScorePositions, kScoreVectors>(pass, keys, begin, count, v, from, to);
      }
    }
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
  StoreF(pass.part.m + v * kLanes, m);
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
  const F m = LoadF(pass.part.m + v * kLanes);
  F lanes[64];
  for (int lane = 0; lane < 64; lane += 2) {
    F even = SetF(0.0f);
    F odd = SetF(0.0f);
    for (int t = lane; t < pass.block_count; t += 64) {
      const I first = Probability(pass, v, t, m);
      const I second = Probability(pass, v, t + 1, m);
      even = Add(even, AsF(first));
      odd = Add(odd, AsF(second));
      LanePairOp::Store(pass.probabilities(v, t), kLanes, first, second);
    }
    lanes[lane] = even;
    lanes[lane + 1] = odd;
  }
  for (int apart = 32; apart > 0; apart /= 2) {
    for (int lane = 0; lane < apart; ++lane) lanes[lane] = Add(lanes[lane], lanes[lane + apart]);
  }
  StoreF(pass.part.l + v * kLanes, lanes[0]);
}

// Goes on with the output chains of all rows in the kVectors vectors of the value from column d on, over
// positions [begin, begin + count), whose values are laid out.
template <int kVectors>
inline void ValuePanel(const AttentionPass& pass, const LanePairOp::Element* values, int begin, int count,
                       int d) {
  const LanePairOp::Element* inputs[kAttentionRows];
  for (int row = 0; row < pass.row_vectors * kLanes; ++row) {
    inputs[row] = LanePairOp::At(pass.probabilities(row / kLanes, begin), row % kLanes);
  }
  constexpr int kStep = AttentionPass::kProbabilityStep;
  PairBlock block = {.panel = values,
                     .num_pairs = (count + 1) / 2,
                     .row_stride = pass.places.padded_value,
                     .vector_stride = kLanes,
                     .first = begin == 0,
                     .scale = 1.0f};
  for (int row = 0; row < pass.tile.num_rows;) {
    const int left = pass.tile.num_rows - row;
    block.inputs = inputs + row;
    block.sums = pass.part.output + int64_t{row} * block.row_stride + d;
    if (left >= kValueRows) {
      RunPairs<kValueRows, kVectors, kStep, kLanes>(block);
      row += kValueRows;
    } else if (left > 2) {
      RunPairs<4, kVectors, kStep, kLanes>(block);
      row += 4;
    } else {
      RunPairs<2, kVectors, kStep, kLanes>(block);
      row += 2;
    }
  }
}

// Lays out the values of positions [begin, begin + count) in columns [d, end), panel by panel of kColumns:
// each row is read in one run. A last position without partner is its own: the partner's probability is zero.
template <int kColumns>
inline void LayOutValues(const AttentionPass& pass, int begin, int count, int d, int end) {
  constexpr int kAhead = 8;
  const int64_t panel = int64_t{count + 1} / 2 * 2 * kColumns;
  LanePairOp::Element* to = pass.rows();
  for (int t = begin; t < begin + count; t += 2, to += kColumns * 2) {
    const Bf16* even = pass.cache_rows[t];
    const Bf16* odd = pass.cache_rows[t + 1];
    for (int c = d; c < end; c += 32) {
      __builtin_prefetch(pass.cache_rows[t + kAhead] + c);
      __builtin_prefetch(pass.cache_rows[t + kAhead + 1] + c);
    }
    for (int c = d, i = 0; c < end; c += kColumns, ++i) {
      LanePairOp::LayOut(even + c, odd + c, kColumns, kColumns, to + i * panel);
    }
  }
}

// The output of all rows in columns [d, end), in whole panels of kVectors vectors.
template <int kVectors>
inline void ValueColumns(const AttentionPass& pass, int d, int end) {
  constexpr int kColumns = kVectors * kLanes;
  constexpr int kTile = AttentionScratch::kPanelBytes / (kColumns * LanePairOp::kPairBytes) * 2;
  constexpr int kSlab =
      AttentionScratch::kSlabBytes / (kTile / 2 * LanePairOp::kPairBytes) / kColumns * kColumns;
  for (; d < end; d += kSlab) {
    const int slab_end = end - d < kSlab ? end : d + kSlab;
    for (int begin = 0; begin < pass.block_count; begin += kTile) {
      const int count = pass.block_count - begin < kTile ? pass.block_count - begin : kTile;
      LayOutValues<kColumns>(pass, begin, count, d, slab_end);
      const LanePairOp::Element* values = pass.rows();
      for (int c = d; c < slab_end; c += kColumns) {
        ValuePanel<kVectors>(pass, values, begin, count, c);
        values += int64_t{count + 1} / 2 * 2 * kColumns;
      }
    }
  }
}

// One canonical block for all rows, into pass.part. Returns whether every visible score is finite.
inline bool AttendBlock(AttentionPass& pass, int block) {
  int positions = 0;
  int least = pass.tile.num_visible[0];
  for (int row = 0; row < pass.tile.num_rows; ++row) {
    if (pass.tile.num_visible[row] > positions) positions = pass.tile.num_visible[row];
    if (pass.tile.num_visible[row] < least) least = pass.tile.num_visible[row];
  }
  const int begin = block * kAttentionBlock;
  pass.block_begin = begin;
  pass.all_visible = least - begin;
  pass.block_count = positions - begin < kAttentionBlock ? positions - begin : kAttentionBlock;
  FindCacheRows(pass);
  constexpr int kTile = AttentionScratch::kTilePositions;
  for (int t = 0; t < pass.block_count; t += kTile) {
    ScoreTile(pass, t, pass.block_count - t < kTile ? pass.block_count - t : kTile);
  }
  uint32_t bad = 0;
  for (int v = 0; v < pass.row_vectors; ++v) {
    bad |= BlockMaximum(pass, v, SubI(LoadI(pass.num_visible + v * kLanes), SetI(begin)));
    BlockProbabilities(pass, v);
  }
  constexpr int kPanel = kValueVectors * kLanes;
  const int whole = pass.places.padded_value / kPanel * kPanel;
  ValueColumns<kValueVectors>(pass, 0, whole);
  ValueColumns<1>(pass, whole, pass.places.padded_value);
  return bad == 0;
}

// Merges a later block of one row onto `onto`, what is merged below it.
inline void MergeRow(const AttentionPart& onto, const AttentionPart& block, int row, int padded_value) {
  const float m = onto.m[row] > block.m[row] ? onto.m[row] : block.m[row];
  const float a = ScalarExp(onto.m[row] - m);
  const float b = ScalarExp(block.m[row] - m);
  onto.m[row] = m;
  onto.l[row] = __builtin_fmaf(block.l[row], b, onto.l[row] * a);
  const float* from = block.output + int64_t{row} * padded_value;
  float* to = onto.output + int64_t{row} * padded_value;
  for (int d = 0; d < padded_value; d += kLanes) {
    StoreF(to + d, Fma(LoadF(from + d), SetF(b), Mul(LoadF(to + d), SetF(a))));
  }
}

inline void FinishRow(const AttentionPart& merged, int row, int width, int padded_value, Bf16* out) {
  const float* from = merged.output + int64_t{row} * padded_value;
  const F l = SetF(merged.l[row]);
  for (int d = 0; d < width; d += kLanes) StoreBf16(out + d, Div(LoadF(from + d), l), LanesLeft(width, d));
}

inline void MergeAttention(const AttentionTile& tile, int block, const void* part, int row_begin, int row_end,
                           void* merged) {
  const AttentionPart onto(merged, tile.value_width);
  const AttentionPart next(part, tile.value_width);
  for (int row = row_begin; row < row_end; ++row) {
    if (tile.num_visible[row] > block * kAttentionBlock) {
      MergeRow(onto, next, row, AttentionPart::Pad(tile.value_width));
    }
  }
}

inline void FinishAttention(const AttentionTile& tile, const void* merged, int row_begin, int row_end,
                            Bf16* out, int64_t out_stride) {
  const AttentionPart part(merged, tile.value_width);
  for (int row = row_begin; row < row_end; ++row) {
    FinishRow(part, row, tile.value_width, AttentionPart::Pad(tile.value_width), out + row * out_stride);
  }
}

inline bool Attention(const AttentionTile& tile, void* scratch, Bf16* out, int64_t out_stride,
                      uint64_t* bad_rows) {
  AttentionPass pass(tile, scratch);
  PackQueries(pass);
  const AttentionPart merged(pass.scratch + pass.places.merged(), tile.value_width);
  const AttentionPart next = pass.part;
  for (int block = 0; block < tile.num_blocks(); ++block) {
    pass.part = block == 0 ? merged : next;
    // A value that is not finite reaches, as 0 * infinity, rows of the tile that do not see it. Rare, and an
    // error of the requests that do see it: the reference keeps the rows apart.
    if (!AttendBlock(pass, block)) {
      return kScalarTable.attention(tile, scratch, out, out_stride, bad_rows);
    }
    if (block > 0) MergeAttention(tile, block, next.output, 0, tile.num_rows, merged.output);
  }
  FinishAttention(tile, merged.output, 0, tile.num_rows, out, out_stride);
  if (bad_rows != nullptr) *bad_rows = 0;
  return true;
}

inline bool AttentionBlock(const AttentionTile& tile, int block, void* scratch, void* part) {
  AttentionPass pass(tile, scratch);
  PackQueries(pass);
  pass.part = AttentionPart(part, tile.value_width);
  return AttendBlock(pass, block);
}
