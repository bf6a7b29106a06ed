// Attention of a batch's tokens over their cached latents: cuts the work into tiles of query rows and blocks
// of positions, so that every thread has some. What a tile means is in kernels.h. Internal to model/. One
// thread calls Run.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "model/batch.h"
#include "model/config.h"
#include "model/kv_cache.h"

namespace tessera {

class LatentAttention {
 public:
  // `heads` are this rank's. Kernels and threads outlive the object.
  LatentAttention(const ModelConfig& config, int heads, float softmax_scale, const kernels::Kernels& kernels,
                  ThreadPool& threads);

  // Tokens [first, first + count) of the batch: queries [token][head][latent | rope], absorbed and rotated,
  // give out [token][head][latent]. Returns the tokens, counted from `first`, that see a score which is not
  // finite.
  std::vector<int> Run(int layer, const Batch& batch, int first, int count, const KvCache& cache,
                       const kernels::Bf16* queries, kernels::Bf16* out);

 private:
  struct Tile {
    kernels::AttentionTile in;
    int row;  // token * heads + head, token counted from `first`
    int num_blocks;
    int first_part = -1;  // of num_blocks parts, where the tile is cut into its blocks
    uint64_t bad_rows = 0;
  };
  struct Piece {
    Tile* tile;
    int block;  // kWhole for all of the tile
  };
  static constexpr int kWhole = -1;

  void MakeTiles(int layer, const Batch& batch, int first, int count, const KvCache& cache,
                 const kernels::Bf16* queries);
  void CutTiles(int layer, const Batch& batch, int first, int count, const KvCache& cache,
                const kernels::Bf16* queries, int most_rows);
  size_t TakePieces(size_t begin, int largest_share);
  void RunPieces(kernels::Bf16* out, bool alone);
  void MergeParts(std::span<Tile> tiles, kernels::Bf16* out);
  std::byte* Scratch(int thread) const { return scratch_.data() + thread * scratch_bytes_; }
  std::byte* Part(int part) const { return parts_.data() + part * part_bytes_; }
  int TotalBlocks() const;

  const int heads_;
  const kernels::AttentionTile shape_;  // what all tiles have in common
  const kernels::Kernels& kernels_;
  ThreadPool& threads_;
  const int64_t scratch_bytes_;  // per thread
  const int64_t part_bytes_;

  std::vector<int32_t> num_visible_;  // [token][head]
  std::vector<Tile> tiles_;
  std::vector<Piece> pieces_;
  Arena scratch_;
  Arena parts_;
};

}  // namespace tessera
