// See attention.h. A tile is one piece of work, or, where it is a large share of all, one piece for each of
// its blocks, whose parts are merged at the end: the bits are the same.
#include "model/attention.h"

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "model/linear.h"

namespace tessera {
namespace {

constexpr int kLeastRows = 16;           // of a tile, where there would be less work than threads
constexpr int kSharesPerThread = 8;      // a piece is at most one of them, or one block
constexpr int kMostParts = 256;          // held at a time, if one tile does not have more: 34 MB for R1
constexpr int kMergedRows = 4;           // by one task
constexpr int64_t kMacsAlone = 200'000;  // less is not worth waking a thread for

int64_t ScratchBytes(const ModelConfig& config) {
  return RoundUp(kernels::AttentionScratchBytes(config.latent_width(), config.kv_lora_rank), 64);
}

}  // namespace

LatentAttention::LatentAttention(const ModelConfig& config, int heads, float softmax_scale,
                                 const kernels::Kernels& kernels, ThreadPool& threads)
    : heads_(heads),
      shape_{.key_width = config.latent_width(),
             .value_width = config.kv_lora_rank,
             .softmax_scale = softmax_scale},
      kernels_(kernels),
      threads_(threads),
      scratch_bytes_(ScratchBytes(config)),
      part_bytes_(kernels::AttentionPartBytes(config.kv_lora_rank)),
      scratch_(Arena::AllocateOrDie(scratch_bytes_ * threads.num_threads())) {}

std::vector<int> LatentAttention::Run(int layer, const Batch& batch, int first, int count,
                                      const KvCache& cache, const kernels::Bf16* queries,
                                      kernels::Bf16* out) {
  MakeTiles(layer, batch, first, count, cache, queries);
  int64_t macs = 0;
  for (const Tile& tile : tiles_) {
    macs +=
        int64_t{tile.in.num_visible[0]} * tile.in.num_rows * (tile.in.key_width + tile.in.value_width) * 2;
  }
  const int num_threads = threads_.num_active();
  const bool alone = num_threads == 1 || macs < kMacsAlone;
  const int total = TotalBlocks();
  const int largest_share = alone ? total : std::max(1, total / (num_threads * kSharesPerThread));
  for (size_t begin = 0; begin < tiles_.size();) {
    const size_t end = TakePieces(begin, largest_share);
    RunPieces(out, alone);
    MergeParts({tiles_.data() + begin, end - begin}, out);
    begin = end;
  }
  std::vector<int> failed;
  for (const Tile& tile : tiles_) {
    for (uint64_t bad = tile.bad_rows; bad != 0; bad &= bad - 1) {
      failed.push_back((tile.row + std::countr_zero(bad)) / heads_);
    }
  }
  return failed;
}

int LatentAttention::TotalBlocks() const {
  int total = 0;
  for (const Tile& tile : tiles_) total += tile.num_blocks;
  return total;
}

void LatentAttention::MakeTiles(int layer, const Batch& batch, int first, int count, const KvCache& cache,
                                const kernels::Bf16* queries) {
  Grow(num_visible_, int64_t{count} * heads_);
  for (int t = 0; t < count; ++t) {
    std::fill_n(num_visible_.begin() + int64_t{t} * heads_, heads_, batch.position[first + t] + 1);
  }
  int most_rows = kernels::kAttentionRows;
  CutTiles(layer, batch, first, count, cache, queries, most_rows);
  while (most_rows > kLeastRows && TotalBlocks() < threads_.num_active()) {
    most_rows /= 2;
    CutTiles(layer, batch, first, count, cache, queries, most_rows);
  }
}

// Tiles of at most `most_rows` query rows (token, head), token-major, never across sequences.
void LatentAttention::CutTiles(int layer, const Batch& batch, int first, int count, const KvCache& cache,
                               const kernels::Bf16* queries, int most_rows) {
  tiles_.clear();
  for (int t = 0; t < count;) {
    const int sequence = batch.sequence[first + t];
    int end = t;
    while (end < count && batch.sequence[first + end] == sequence) ++end;
    kernels::AttentionTile in = shape_;
    in.pages = cache.Pages(layer, batch.BlockIds(batch.step.sequences[sequence]));
    for (int row = t * heads_; row < end * heads_; row += most_rows) {
      in.num_rows = std::min(most_rows, end * heads_ - row);
      in.num_visible = num_visible_.data() + row;
      in.queries = {queries + int64_t{row} * in.key_width, in.key_width};
      tiles_.push_back({.in = in, .row = row, .num_blocks = in.num_blocks()});
    }
    t = end;
  }
}

// The pieces of tiles [begin, end), as many as there is room for their parts; returns end.
size_t LatentAttention::TakePieces(size_t begin, int largest_share) {
  pieces_.clear();
  int num_parts = 0;
  size_t end = begin;
  for (; end < tiles_.size(); ++end) {
    Tile& tile = tiles_[end];
    if (tile.num_blocks <= largest_share) {
      pieces_.push_back({&tile, kWhole});
      continue;
    }
    if (num_parts > 0 && num_parts + tile.num_blocks > kMostParts) break;
    tile.first_part = num_parts;
    num_parts += tile.num_blocks;
    for (int block = 0; block < tile.num_blocks; ++block) pieces_.push_back({&tile, block});
  }
  const int64_t bytes = num_parts * part_bytes_;
  if (static_cast<int64_t>(parts_.size_bytes()) < bytes) parts_ = Arena::AllocateOrDie(bytes);
  return end;
}

void LatentAttention::RunPieces(kernels::Bf16* out, bool alone) {
  const int num_pieces = static_cast<int>(pieces_.size());
  const int tasks = alone ? 1 : num_pieces;
  std::vector<char> finite(pieces_.size(), true);
  threads_.ParallelFor(tasks, [&](int task, int thread) {
    const auto [begin, end] = SliceOf(num_pieces, tasks, task);
    for (int i = begin; i < end; ++i) {
      const auto [tile, block] = pieces_[i];
      if (block == kWhole) {
        kernels_.attention(tile->in, Scratch(thread), out + int64_t{tile->row} * shape_.value_width,
                           shape_.value_width, &tile->bad_rows);
      } else {
        finite[i] =
            kernels_.attention_block(tile->in, block, Scratch(thread), Part(tile->first_part + block));
      }
    }
  });
  for (int i = 0; i < num_pieces; ++i) {
    if (!finite[i]) pieces_[i].tile->bad_rows = ~uint64_t{0};  // until MergeParts knows which rows
  }
}

// Merges the parts of the tiles that were cut. The rare one with a score that is not finite is done again, as
// a whole.
void LatentAttention::MergeParts(std::span<Tile> tiles, kernels::Bf16* out) {
  struct Rows {
    Tile* tile;
    int begin;
  };
  std::vector<Rows> tasks;
  for (Tile& tile : tiles) {
    if (tile.first_part < 0) continue;
    if (tile.bad_rows != 0) {
      kernels_.attention(tile.in, Scratch(0), out + int64_t{tile.row} * shape_.value_width,
                         shape_.value_width, &tile.bad_rows);
      continue;
    }
    for (int row = 0; row < tile.in.num_rows; row += kMergedRows) tasks.push_back({&tile, row});
  }
  threads_.ParallelFor(static_cast<int>(tasks.size()), [&](int task, int) {
    const auto [tile, begin] = tasks[task];
    const int end = std::min(begin + kMergedRows, tile->in.num_rows);
    std::byte* merged = Part(tile->first_part);
    for (int block = 1; block < tile->num_blocks; ++block) {
      kernels_.attention_merge(tile->in, block, Part(tile->first_part + block), begin, end, merged);
    }
    kernels_.attention_finish(tile->in, merged, begin, end, out + int64_t{tile->row} * shape_.value_width,
                              shape_.value_width);
  });
}

}  // namespace tessera
