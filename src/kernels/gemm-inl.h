// Matrix products on packed panels. One source for every vector set: included after its simd_*.h and
// elementwise-inl.h, inside its namespace and target region. The meaning of each function is in reference.cc.
//
// Register blocks: a few rows x one int8 panel (or kChainPanels bf16 panels). The panels of one call are
// taken in groups that stay in L2 while all rows pass, so that weights leave DRAM once; with few rows a group
// is the whole call and the weights are one stream. An epilogue turns a block into outputs while it is in
// registers.

constexpr int64_t kGroupBytes = 256 << 10;
constexpr int64_t kShortPanelBytes = 32 << 10;

TESSERA_INLINE int64_t InRow(const RowMap& rows, int i) {
  return rows.in_rows != nullptr ? rows.in_rows[i] : i;
}
TESSERA_INLINE int64_t OutRow(const RowMap& rows, int i) {
  return rows.out_rows != nullptr ? rows.out_rows[i] : i;
}

// Panels of a group: what fits in L2, at least one block; everything where one block holds all rows.
TESSERA_INLINE int GroupPanels(int64_t panel_bytes, int num_panels, bool one_pass) {
  if (one_pass || panel_bytes <= 0) return num_panels;
  const int64_t fitting = kGroupBytes / panel_bytes / 2 * 2;
  if (fitting < 2) return 2;
  return fitting < num_panels ? static_cast<int>(fitting) : num_panels;
}

// ---- Epilogues. Begin looks up what belongs to output row i of the call; Emit takes kLanes outputs of one
// leaf; End writes what was gathered over the row's panels.

struct FixedSink {
  int64_t* sums;
  uint8_t* out_of_range;
  I largest;

  TESSERA_INLINE void Begin(const FixedRows& out, int64_t row) {
    sums = out.sums + row * out.stride;
    out_of_range = out.out_of_range + row;
    largest = SetI(0);
  }
  TESSERA_INLINE void Add(F c, int column, int count) {
    I magnitude = AndI(AsI(c), SetI(0x7fffffff));
    if (count < kLanes) magnitude = SelectI(FirstLanes(count), magnitude, SetI(0));
    largest = MaxI(largest, magnitude);
    AddTerms(sums + column, c, count);
  }
  TESSERA_INLINE void End() {
    if (static_cast<uint32_t>(LargestI(largest)) >= kMaxTermBits) *out_of_range = 1;
  }
};

struct StaticToBf16 {
  static constexpr bool kFixed = false;
  const Int8Rows& in;
  const StaticScales& scales;
  Bf16* out;
  int64_t out_stride;
  struct Row {
    int32_t correction;
    Bf16* out;
  };
  TESSERA_INLINE void Begin(const RowMap& rows, int i, Row* row) const {
    *row = {in.sums[InRow(rows, i)] * 128, out + OutRow(rows, i) * out_stride};
  }
  TESSERA_INLINE void Emit(Row& row, int leaf, I acc, int column, int count) const {
    acc = AddI(SubI(acc, SetI(row.correction)), LoadI(scales.quant_bias + column, count));
    StoreBf16(row.out + column, Mul(FromInt(acc), LoadF(scales.deq_scale + column, count)), count);
  }
  TESSERA_INLINE void End(Row& row) const {}
};

struct DynamicToBf16 {
  static constexpr bool kFixed = false;
  const Int8Rows& in;
  const float* weight_scale;
  Bf16* out;
  int64_t out_stride;
  struct Row {
    int32_t correction;
    float scale;
    Bf16* out;
  };
  TESSERA_INLINE void Begin(const RowMap& rows, int i, Row* row) const {
    const int64_t from = InRow(rows, i);
    *row = {in.sums[from] * 128, in.scales[from], out + OutRow(rows, i) * out_stride};
  }
  TESSERA_INLINE void Emit(Row& row, int leaf, I acc, int column, int count) const {
    const F factor = Mul(SetF(row.scale), LoadF(weight_scale + column, count));
    StoreBf16(row.out + column, Mul(FromInt(SubI(acc, SetI(row.correction))), factor), count);
  }
  TESSERA_INLINE void End(Row& row) const {}
};

// `acc` is a leaf's sum of x * (w + 128) with the bias, `correction` what the 128 add to it.
TESSERA_INLINE F LeafValue(I acc, int32_t correction, float row_factor, F column_factor) {
  return Mul(Mul(SetF(row_factor), column_factor), FromInt(SubI(acc, SetI(correction))));
}

struct Int8ToFixed {
  static constexpr bool kFixed = true;
  const Int8Rows& in;
  const float* row_scales;  // of each leaf; null: 1
  const float* row_weight;  // null: 1
  const float* column_factors;
  const int32_t* quant_bias;  // added to the first leaf; null: 0
  const FixedRows& out;
  int num_leaves;
  struct Row {
    const int32_t* sums;
    const float* scales;
    float weight;
    FixedSink sink;
    TESSERA_INLINE float Factor(int leaf) const { return scales != nullptr ? weight * scales[leaf] : weight; }
    TESSERA_INLINE int32_t Correction(int leaf) const { return sums[leaf] * 128; }
  };
  TESSERA_INLINE void Begin(const RowMap& rows, int i, Row* row) const {
    const int64_t from = InRow(rows, i) * num_leaves;
    row->sums = in.sums + from;
    row->scales = row_scales != nullptr ? row_scales + from : nullptr;
    row->weight = row_weight != nullptr ? row_weight[i] : 1.0f;
    row->sink.Begin(out, OutRow(rows, i));
  }
  // To the sums of the first leaf.
  TESSERA_INLINE void AddBias(I (*acc)[kInt8Vectors], int num_rows, int column) const {
    if (quant_bias == nullptr) return;
    for (int r = 0; r < num_rows; ++r) {
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) {
        acc[r][v] = AddI(acc[r][v], LoadI(quant_bias + column + v * kLanes));
      }
    }
  }
  TESSERA_INLINE void Emit(Row& row, int leaf, I acc, int column, int count) const {
    if (leaf == 0 && quant_bias != nullptr) acc = AddI(acc, LoadI(quant_bias + column, count));
    const F column_factor = LoadF(column_factors + column, count);
    row.sink.Add(LeafValue(acc, row.Correction(leaf), row.Factor(leaf), column_factor), column, count);
  }
  TESSERA_INLINE void End(Row& row) const { row.sink.End(); }
};

TESSERA_INLINE void StoreChain(Bf16* at, F x, int count) {
  StoreBf16(at, x, count);
}
TESSERA_INLINE void StoreChain(float* at, F x, int count) {
  StoreF(at, x, count);
}

template <class Output>
struct ChainTo {
  Output* out;
  int64_t out_stride;
  struct Row {
    Output* out;
  };
  TESSERA_INLINE void Begin(const RowMap& rows, int i, Row* row) const {
    row->out = out + OutRow(rows, i) * out_stride;
  }
  TESSERA_INLINE void Emit(Row& row, F acc, int column, int count) const {
    StoreChain(row.out + column, acc, count);
  }
  TESSERA_INLINE void End(Row& row) const {}
};

struct ChainToFixed {
  const float* row_weight;
  const FixedRows& out;
  struct Row {
    float factor;
    FixedSink sink;
  };
  TESSERA_INLINE void Begin(const RowMap& rows, int i, Row* row) const {
    row->factor = row_weight != nullptr ? row_weight[i] : 1.0f;
    row->sink.Begin(out, OutRow(rows, i));
  }
  TESSERA_INLINE void Emit(Row& row, F acc, int column, int count) const {
    row.sink.Add(Mul(SetF(row.factor), acc), column, count);
  }
  TESSERA_INLINE void End(Row& row) const { row.sink.End(); }
};

// ---- int8

// Sums over at most kNumLeaves leaves of rint(c * 2^28), without a conversion to int64 per leaf. Take gets c
// * kScale. Where |c| < 1/2 the sums fit 32 bits; scaling by a power of two before the products changes no c
// but those that overflow, which are not small, and denormal ones, whose terms are 0.
struct SmallLeafSums {
  static constexpr float kScale = 0x1p28f;
  static constexpr uint32_t kLimitBits = 0x4d000000;  // 2^27: |c * kScale| must be below
  I terms;

  TESSERA_INLINE void Begin(int num_leaves) { terms = SetI(0); }
  TESSERA_INLINE void Take(F scaled) { terms = AddI(terms, ToInt(scaled)); }
  TESSERA_INLINE void AddTo(int64_t* sums) const { AddSplit(sums, SetI(0), terms); }
};

// The same for |c| < 2^16. c is split into high + rest: adding 1.5 * 2^17, whose neighbours lie 2^-6 apart,
// rounds c to high, a multiple of 2^-6, and leaves the number of these steps in the low bits of the float.
// rest is exact: it is c itself where high is 0, and at most 2^23 times the last bit of c elsewhere. Adding
// 1.5 * 2^23 to rest * 2^28 leaves low = rint(rest * 2^28), |low| <= 2^21, likewise: the fma rounds once.
// high * 2^28 is an even integer, so that ties go the same way with and without it:
// rint(c * 2^28) = high * 2^28 + low. Both sums fit 32 bits: 16 * 2^22 steps and 16 * 2^21.
struct LeafSums {
  static constexpr float kScale = 1;
  static constexpr uint32_t kLimitBits = 0x47800000;
  static constexpr float kHighShift = 0x1.8p17f;
  static constexpr float kLowShift = 0x1.8p23f;
  I high, low;

  // Takes the bits of the shifts off in advance; integers wrap, and come back.
  TESSERA_INLINE void Begin(int num_leaves) {
    high = SetI(static_cast<int32_t>(-__builtin_bit_cast(uint32_t, kHighShift) * num_leaves));
    low = SetI(static_cast<int32_t>(-__builtin_bit_cast(uint32_t, kLowShift) * num_leaves));
  }
  TESSERA_INLINE void Take(F c) {
    const F shifted = Add(c, SetF(kHighShift));
    const F rest = Sub(c, Sub(shifted, SetF(kHighShift)));
    high = AddI(high, AsI(shifted));
    low = AddI(low, AsI(Fma(rest, SetF(0x1p28f), SetF(kLowShift))));
  }
  TESSERA_INLINE void AddTo(int64_t* sums) const { AddSplit(sums, high, low); }
};

// What a block multiplies at a time: all panels of the call, cut so that the weights stay in L2 while all
// rows pass. A leaf is whole; where leaves are independent a panel may be cut between them.
struct Int8Cut {
  int panels;
  int leaves;
  Int8Cut(const PackedInt8& weight, int num_panels, int num_rows, bool split_leaves) {
    panels = num_panels;
    leaves = weight.num_leaves;
    if (num_rows <= kInt8Rows || weight.leaf_bytes() == 0) return;
    const auto at_least_one = [](int64_t n, int most) {
      return n < 1 ? 1 : n < most ? static_cast<int>(n) : most;
    };
    if (split_leaves) leaves = at_least_one(kGroupBytes / weight.leaf_bytes(), weight.num_leaves);
    panels = at_least_one(kGroupBytes / (weight.leaf_bytes() * leaves), num_panels);
  }
};

// kRows activation rows, to be multiplied with leaves [leaf_begin, leaf_end) of any panel. Only the first
// `live` of them count, the others repeat the last.
template <int kRows>
struct Int8Tile {
  const PackedInt8& weight;
  int leaf_begin, leaf_end;
  int live;
  Int8Inputs<kRows> inputs;

  TESSERA_INLINE const uint8_t* Weights(int panel, int leaf) const {
    return weight.panels + panel * weight.panel_bytes() + leaf * weight.leaf_bytes();
  }
  TESSERA_INLINE void Multiply(int panel, int leaf, I (*acc)[kInt8Vectors]) const {
    const int first = (leaf - leaf_begin) * weight.leaf_quads();
    inputs.Multiply(first, Weights(panel, leaf), weight.leaf_quads(), acc);
  }
  // Where a full block is between two leaves: asks for the first of what the next one will ask for.
  TESSERA_INLINE void PrefetchBeyond(int panel, int leaf) const {
    if constexpr (kRows < kInt8Rows) return;
    constexpr int kLines = kRows * kInt8Vectors;  // one per vector of sums to work on meanwhile
    const uint8_t* from = Weights(panel, leaf + 1) + kPrefetchBytes;
    TESSERA_UNROLL
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(from + line * 64, 0, 2);
  }
};

// What the leaf sums of some rows become leaf values with.
template <int kRows>
struct LeafFactors {
  float factor[kRows][kNumLeaves];
  int32_t correction[kRows][kNumLeaves];

  template <class Row>
  TESSERA_INLINE void Fill(const Row* row, int live, int leaf_begin, int leaf_end) {
    for (int r = 0; r < live; ++r) {
      for (int leaf = leaf_begin; leaf < leaf_end; ++leaf) {
        factor[r][leaf - leaf_begin] = row[r].Factor(leaf);
        correction[r][leaf - leaf_begin] = row[r].Correction(leaf);
      }
    }
  }
};

// The leaves of one whole panel of a row-parallel product, its sums touched once for all of them. False, and
// nothing done, where a leaf value is too large for this kind of sums.
template <class Sums, int kRows, class Epilogue>
TESSERA_INLINE bool AddWholePanel(const Int8Tile<kRows>& tile, int panel, const LeafFactors<kRows>& factors,
                                  const typename Epilogue::Row* row, const Epilogue& epilogue) {
  const int num_leaves = tile.leaf_end - tile.leaf_begin;
  const int column = panel * kInt8Panel;
  F column_factors[kInt8Vectors];
  TESSERA_UNROLL
  for (int v = 0; v < kInt8Vectors; ++v) {
    column_factors[v] = Mul(SetF(Sums::kScale), LoadF(epilogue.column_factors + column + v * kLanes));
  }
  Sums sums[kRows][kInt8Vectors];
  for (int r = 0; r < tile.live; ++r) {
    TESSERA_UNROLL
    for (int v = 0; v < kInt8Vectors; ++v) sums[r][v].Begin(num_leaves);
    for (int at = 0; at < kInt8Panel; at += 8) __builtin_prefetch(row[r].sink.sums + column + at, 1);
  }
  I largest = SetI(0);
  for (int i = 0; i < num_leaves; ++i) {
    I acc[kRows][kInt8Vectors];
    tile.Multiply(panel, tile.leaf_begin + i, acc);
    tile.PrefetchBeyond(panel, tile.leaf_begin + i);
    if (tile.leaf_begin + i == 0) epilogue.AddBias(acc, tile.live, column);
    for (int r = 0; r < tile.live; ++r) {
      TESSERA_UNROLL
      for (int v = 0; v < kInt8Vectors; ++v) {
        const F c = LeafValue(acc[r][v], factors.correction[r][i], factors.factor[r][i], column_factors[v]);
        largest = MaxI(largest, AndI(AsI(c), SetI(0x7fffffff)));
        sums[r][v].Take(c);
      }
    }
  }
  if (LaneBits(GreaterI(largest, SetI(Sums::kLimitBits - 1))) != 0) return false;
  for (int r = 0; r < tile.live; ++r) {
    TESSERA_UNROLL
    for (int v = 0; v < kInt8Vectors; ++v) sums[r][v].AddTo(row[r].sink.sums + column + v * kLanes);
  }
  return true;
}

// A part of a call: weights that stay in L2 while all rows pass.
template <class Epilogue>
struct Int8Group {
  const Int8Rows& in;
  const PackedInt8& weight;
  const RowMap& rows;
  const Epilogue& epilogue;
  int panel, panel_end;
  int leaf_begin, leaf_end;
  bool* small;  // no leaf value of the call was large so far
};

// Rows [i, i + live) of the call, at most kRows, against a group.
template <int kRows, class Epilogue>
TESSERA_NOINLINE void Int8RowBlock(const Int8Group<Epilogue>& group, int i, int live) {
  const PackedInt8& weight = group.weight;
  const Epilogue& epilogue = group.epilogue;
  const int leaf_begin = group.leaf_begin;
  const int leaf_end = group.leaf_end;
  Int8Tile<kRows> tile{weight, leaf_begin, leaf_end, live, {}};
  typename Epilogue::Row row[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int at = i + (r < live ? r : live - 1);
    tile.inputs.x[r] =
        group.in.data + InRow(group.rows, at) * group.in.stride + leaf_begin * weight.leaf_pad();
    epilogue.Begin(group.rows, at, &row[r]);
  }
  const int quads = (leaf_end - leaf_begin) * weight.leaf_quads();
  tile.inputs.Prepare(quads, __builtin_alloca(Int8Inputs<kRows>::RoomBytes(quads)));
  [[maybe_unused]] LeafFactors<kRows> factors;
  const bool at_once = Epilogue::kFixed && leaf_end - leaf_begin <= kNumLeaves;
  if constexpr (Epilogue::kFixed) {
    if (at_once) factors.Fill(row, live, leaf_begin, leaf_end);
  }
  for (int panel = group.panel; panel < group.panel_end; ++panel) {
    const int column = panel * kInt8Panel;
    const int width = weight.num_outputs - column;
    if constexpr (Epilogue::kFixed) {
      if (at_once && width >= kInt8Panel) {
        if (*group.small && AddWholePanel<SmallLeafSums>(tile, panel, factors, row, epilogue)) continue;
        *group.small = false;
        if (AddWholePanel<LeafSums>(tile, panel, factors, row, epilogue)) continue;
      }
    }
    for (int leaf = leaf_begin; leaf < leaf_end; ++leaf) {
      I acc[kRows][kInt8Vectors];
      tile.Multiply(panel, leaf, acc);
      TESSERA_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= live) break;
        TESSERA_UNROLL
        for (int v = 0; v < kInt8Vectors; ++v) {
          const int count = LanesLeft(width, v * kLanes);
          if (!Epilogue::kFixed && width >= kInt8Panel) {  // the usual case, with a count known here
            epilogue.Emit(row[r], leaf, acc[r][v], column + v * kLanes, kLanes);
          } else if (count > 0) {
            epilogue.Emit(row[r], leaf, acc[r][v], column + v * kLanes, count);
          }
        }
      }
    }
  }
  for (int r = 0; r < live; ++r) epilogue.End(row[r]);
}

// A few rows are a block filled up with repeated ones: while weights come from memory, or from L2 for one row
// or two, products cost nothing, and another pass over the weights does.
template <class Epilogue>
inline void Int8GroupRows(const Int8Group<Epilogue>& group) {
  for (int i = 0; i < group.rows.count;) {
    const int left = group.rows.count - i;
    const int live = left < kInt8Rows ? left : kInt8Rows;
    if (live > 4) {
      Int8RowBlock<kInt8Rows>(group, i, live);
    } else if (live > 2) {
      Int8RowBlock<4>(group, i, live);
    } else if (live == 2) {
      Int8RowBlock<2>(group, i, live);
    } else {
      Int8RowBlock<1>(group, i, live);
    }
    i += live;
  }
}

template <class Epilogue>
inline void Int8Gemm(const Int8Rows& in, const PackedInt8& weight, const RowMap& rows, int panel_begin,
                     int panel_end, const Epilogue& epilogue) {
  const Int8Cut cut(weight, panel_end - panel_begin, rows.count, Epilogue::kFixed);
  const auto smaller = [](int a, int b) { return a < b ? a : b; };
  bool small = true;
  for (int panel = panel_begin; panel < panel_end; panel += cut.panels) {
    const int end = smaller(panel + cut.panels, panel_end);
    for (int leaf = 0; leaf < weight.num_leaves; leaf += cut.leaves) {
      const int leaf_end = smaller(leaf + cut.leaves, weight.num_leaves);
      Int8GroupRows<Epilogue>({in, weight, rows, epilogue, panel, end, leaf, leaf_end, &small});
    }
  }
}

inline void GemmInt8Static(const Int8Rows& in, const PackedInt8& weight, const StaticScales& scales,
                           const RowMap& rows, int panel_begin, int panel_end, Bf16* out,
                           int64_t out_stride) {
  Int8Gemm(in, weight, rows, panel_begin, panel_end, StaticToBf16{in, scales, out, out_stride});
}
inline void GemmInt8Dynamic(const Int8Rows& in, const PackedInt8& weight, const float* weight_scale,
                            const RowMap& rows, int panel_begin, int panel_end, Bf16* out,
                            int64_t out_stride) {
  Int8Gemm(in, weight, rows, panel_begin, panel_end, DynamicToBf16{in, weight_scale, out, out_stride});
}
inline void GemmInt8DynamicFixed(const Int8Rows& in, const PackedInt8& weight, const float* weight_scale,
                                 const float* row_weight, const RowMap& rows, int panel_begin, int panel_end,
                                 const FixedRows& out) {
  Int8Gemm(in, weight, rows, panel_begin, panel_end,
           Int8ToFixed{in, in.scales, row_weight, weight_scale, nullptr, out, weight.num_leaves});
}
inline void GemmInt8StaticFixed(const Int8Rows& in, const PackedInt8& weight, const StaticScales& scales,
                                const float* row_weight, const RowMap& rows, int panel_begin, int panel_end,
                                const FixedRows& out) {
  Int8Gemm(in, weight, rows, panel_begin, panel_end,
           Int8ToFixed{in, nullptr, row_weight, scales.deq_scale, scales.quant_bias, out, weight.num_leaves});
}

// ---- Chains: bf16 pairs and plain fp32

struct FloatOp {
  using Value = float;
  static constexpr int kStep = 1;
  using Weights = F;
  using Input = F;
  static TESSERA_INLINE F Load(const float* at) { return LoadF(at); }
  static TESSERA_INLINE F Broadcast(const float* at) { return SetF(*at); }
  static TESSERA_INLINE F Step(F acc, F w, F x) { return Fma(x, w, acc); }
};

// acc[row][vector] = the chains of kRows inputs against kPanels neighbouring panels, from +0.
template <class Op, int kRows, int kPanels>
TESSERA_INLINE void ChainBlock(const typename Op::Value* const* x, const typename Op::Value* w,
                               int64_t panel_stride, int steps, F (*acc)[kPanels * kFloatPanel / kLanes]) {
  constexpr int kPerPanel = kFloatPanel / kLanes;
  constexpr int kVectors = kPanels * kPerPanel;
  F sum[kRows][kVectors];
  TESSERA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    TESSERA_UNROLL
    for (int v = 0; v < kVectors; ++v) sum[r][v] = SetF(0.0f);
  }
  for (int step = 0; step < steps; ++step) {
    typename Op::Weights weights[kVectors];
    TESSERA_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const auto* at = w + v / kPerPanel * panel_stride + (v % kPerPanel) * kLanes * Op::kStep;
      weights[v] = Op::Load(at);
      if constexpr (kRows == kChainRows) {
        __builtin_prefetch(reinterpret_cast<const uint8_t*>(at) + kPrefetchBytes, 0, 2);
      }
    }
    TESSERA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const typename Op::Input input = Op::Broadcast(x[r] + step * Op::kStep);
      TESSERA_UNROLL
      for (int v = 0; v < kVectors; ++v) sum[r][v] = Op::Step(sum[r][v], weights[v], input);
    }
    w += kFloatPanel * Op::kStep;
  }
  TESSERA_UNROLL
  for (int r = 0; r < kRows; ++r) {
    TESSERA_UNROLL
    for (int v = 0; v < kVectors; ++v) acc[r][v] = sum[r][v];
  }
}

// One chain product: inputs, the panels of a weight, and its leaves.
template <class Op>
struct ChainShape {
  const typename Op::Value* in;
  int64_t in_stride;
  const typename Op::Value* panels;
  int num_outputs;
  int num_leaves;
  int leaf_steps;
  int64_t leaf_elements() const { return int64_t{leaf_steps} * kFloatPanel * Op::kStep; }
  int64_t panel_elements() const { return leaf_elements() * num_leaves; }
  int64_t panel_bytes() const { return panel_elements() * static_cast<int64_t>(sizeof(typename Op::Value)); }
};

template <class Op, int kRows, int kPanels, class Epilogue>
inline void ChainPanels(const ChainShape<Op>& shape, const typename Op::Value* const* x, int panel,
                        typename Epilogue::Row* row, const Epilogue& epilogue) {
  constexpr int kVectors = kPanels * kFloatPanel / kLanes;
  for (int leaf = 0; leaf < shape.num_leaves; ++leaf) {
    const typename Op::Value* leaf_x[kRows];
    TESSERA_UNROLL
    for (int r = 0; r < kRows; ++r) leaf_x[r] = x[r] + int64_t{leaf} * shape.leaf_steps * Op::kStep;
    F acc[kRows][kVectors];
    ChainBlock<Op, kRows, kPanels>(
        leaf_x, shape.panels + panel * shape.panel_elements() + leaf * shape.leaf_elements(),
        shape.panel_elements(), shape.leaf_steps, acc);
    const int column = panel * kFloatPanel;
    const int width = shape.num_outputs - column;
    TESSERA_UNROLL
    for (int r = 0; r < kRows; ++r) {
      TESSERA_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const int count = LanesLeft(width, v * kLanes);
        if (count > 0) epilogue.Emit(row[r], acc[r][v], column + v * kLanes, count);
      }
    }
  }
}

template <class Op, int kRows, class Epilogue>
inline void ChainRows(const ChainShape<Op>& shape, const RowMap& rows, int i, int panel, int panel_end,
                      const Epilogue& epilogue) {
  constexpr int kPanels = kRows == 1 ? kLonePanels : kChainPanels;
  const typename Op::Value* x[kRows];
  typename Epilogue::Row row[kRows];
  for (int r = 0; r < kRows; ++r) {
    x[r] = shape.in + InRow(rows, i + r) * shape.in_stride;
    epilogue.Begin(rows, i + r, &row[r]);
  }
  // While weights come from memory: prefetchers follow two streams along long panels, but of short ones,
  // which jump over each other, only one.
  const bool one_stream = kRows < kChainRows && shape.panel_bytes() <= kShortPanelBytes;
  if (!one_stream) {
    for (; panel + kPanels <= panel_end; panel += kPanels) {
      ChainPanels<Op, kRows, kPanels>(shape, x, panel, row, epilogue);
    }
  }
  for (; panel < panel_end; ++panel) ChainPanels<Op, kRows, 1>(shape, x, panel, row, epilogue);
  for (int r = 0; r < kRows; ++r) epilogue.End(row[r]);
}

template <class Op, class Epilogue>
inline void ChainGemm(const ChainShape<Op>& shape, const RowMap& rows, int panel_begin, int panel_end,
                      const Epilogue& epilogue) {
  const int group = GroupPanels(shape.panel_bytes(), panel_end - panel_begin, rows.count <= kChainRows);
  for (int begin = panel_begin; begin < panel_end; begin += group) {
    const int end = panel_end - begin < group ? panel_end : begin + group;
    int i = 0;
    for (; i + kChainRows <= rows.count; i += kChainRows) {
      ChainRows<Op, kChainRows>(shape, rows, i, begin, end, epilogue);
    }
    if constexpr (kChainRows > 4) {
      for (; i + 4 <= rows.count; i += 4) ChainRows<Op, 4>(shape, rows, i, begin, end, epilogue);
    }
    for (; i + 2 <= rows.count; i += 2) ChainRows<Op, 2>(shape, rows, i, begin, end, epilogue);
    for (; i < rows.count; ++i) ChainRows<Op, 1>(shape, rows, i, begin, end, epilogue);
  }
}

TESSERA_INLINE ChainShape<PairOp> PairShape(const Bf16Rows& in, const PackedBf16& weight) {
  return {in.data, in.stride, weight.panels, weight.num_outputs, weight.num_leaves, weight.leaf_pairs()};
}

inline void GemmBf16(const Bf16Rows& in, const PackedBf16& weight, const RowMap& rows, int panel_begin,
                     int panel_end, Bf16* out, int64_t out_stride) {
  ChainGemm(PairShape(in, weight), rows, panel_begin, panel_end, ChainTo<Bf16>{out, out_stride});
}
inline void GemmBf16Float(const Bf16Rows& in, const PackedBf16& weight, const RowMap& rows, int panel_begin,
                          int panel_end, float* out, int64_t out_stride) {
  ChainGemm(PairShape(in, weight), rows, panel_begin, panel_end, ChainTo<float>{out, out_stride});
}
inline void GemmBf16Fixed(const Bf16Rows& in, const PackedBf16& weight, const float* row_weight,
                          const RowMap& rows, int panel_begin, int panel_end, const FixedRows& out) {
  ChainGemm(PairShape(in, weight), rows, panel_begin, panel_end, ChainToFixed{row_weight, out});
}
inline void GemmFloat(const float* in, int64_t in_stride, const PackedFloat& weight, int num_rows,
                      int panel_begin, int panel_end, float* out, int64_t out_stride) {
  const ChainShape<FloatOp> shape = {in, in_stride, weight.panels, weight.num_outputs, 1, weight.k};
  ChainGemm(shape, RowMap{.count = num_rows}, panel_begin, panel_end, ChainTo<float>{out, out_stride});
}
