// Attention of prompt tokens in the expanded form (docs/numerics.md, "form"): keys and values of every head
// are made from the cached latents, one canonical block of positions at a time, and all query rows of the run
// pass it while it is warm. Worth it from some 170 tokens of a sequence on; memory does not grow with the
// context. What a tile means is in kernels.h. Internal to model/. One thread calls Run.
#pragma once

#include <cstdint>
#include <vector>

#include "base/memory.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/kv_cache.h"
#include "model/weights.h"

namespace tessera {

class ExpandedAttention {
 public:
  static constexpr int kMostTokens = 2048;  // of one run

  // Everything outlives the object.
  ExpandedAttention(const ModelConfig& config, int heads, float softmax_scale,
                    const kernels::Kernels& kernels, ThreadPool& threads);
  // Tokens [first, first + count) of the batch, 1 .. kMostTokens of one sequence, whose latents are in the
  // cache: queries [token][head][nope | rope], rotated, give out [token][head][v]. Returns the tokens,
  // counted from `first`, that see a score which is not finite.
  std::vector<int> Run(int layer, const LayerWeights& weights, const Batch& batch, int first, int count,
                       const KvCache& cache, const kernels::Bf16* queries, kernels::Bf16* out);

 private:
  // Heads that are worked on together, each with one block of rows and one merged part per tile.
  static int NumTogether(int heads, int num_threads);

  void FindRows(const Batch& batch, int first, int count);
  void RunHeads(const LayerWeights& weights, Slice heads, const kernels::Bf16* queries, kernels::Bf16* out);
  void ExpandBlock(const LayerWeights& weights, Slice heads, int block);
  void Expand(const LayerWeights& weights, int head, Slice positions, kernels::Bf16* rows) const;
  void AttendBlock(Slice heads, int block, const kernels::Bf16* queries, kernels::Bf16* out);
  kernels::AttentionTile TileOf(int head, int tile, const kernels::Bf16* queries,
                                const kernels::Bf16* rows) const;
  void RepairTile(const LayerWeights& weights, int head, int tile, const kernels::Bf16* queries,
                  kernels::Bf16* out, std::vector<int>& failed);

  int num_tiles() const;
  // Rows of the head at `place` among those worked on.
  kernels::Bf16* Rows(int place) const;
  std::byte* Merged(int place, int tile) const;
  std::byte* Scratch(int thread) const { return scratch_.data() + thread * scratch_bytes_; }

  const ModelConfig& config_;
  const int heads_;
  const int key_begin_;  // of a row: [value | key], each padded
  const int64_t row_stride_;
  const float softmax_scale_;
  const kernels::Kernels& kernels_;
  ThreadPool& threads_;
  const int num_together_;
  const int64_t scratch_bytes_;  // per thread: of a tile, then one part
  const int64_t part_bytes_;
  Arena scratch_;
  Arena rows_;    // [head worked on][position of the block][row_stride_]
  Arena merged_;  // [head worked on][tile] parts

  // Of the run at hand.
  int num_tokens_ = 0;
  kernels::CachePages pages_;
  std::vector<int32_t> cache_rows_;   // [position]: row of the cache, from pages_.base on
  std::vector<int32_t> num_visible_;  // [token]
  std::vector<int32_t> block_ids_;    // all zero: every block lies in the same rows
  std::vector<char> bad_tiles_;       // [head][tile]: a score was not finite
};

}  // namespace tessera
