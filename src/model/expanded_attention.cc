// See expanded_attention.h. Per block of positions two loops over threads: make the rows of some heads, then
// let their tiles of queries pass.
#include "model/expanded_attention.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/check.h"
#include "model/linear.h"

namespace tessera {
namespace {

constexpr int kMostTogether = 32;    // 43 MB for R1
constexpr int kMostPositions = 128;  // expanded by one task
constexpr int kLeastPositions = 32;

int NumTiles(int num_tokens) {
  return (num_tokens + kernels::kAttentionRows - 1) / kernels::kAttentionRows;
}

int KeyBegin(const ModelConfig& config) {
  return RoundUp(config.v_head_dim, 16);
}

int64_t RowStride(const ModelConfig& config) {
  return RoundUp(KeyBegin(config) + RoundUp(config.qk_head_dim() + 1, 16), 32);
}

int64_t ScratchBytes(const ModelConfig& config) {
  return RoundUp(kernels::AttentionScratchBytes(config.qk_head_dim(), config.v_head_dim), 64) +
         kernels::AttentionPartBytes(config.v_head_dim);
}

int64_t RowBytes(const ModelConfig& config) {  // of one head
  return kernels::kAttentionBlock * RowStride(config) * int64_t{sizeof(kernels::Bf16)};
}

}  // namespace

ExpandedAttention::ExpandedAttention(const ModelConfig& config, int heads, float softmax_scale,
                                     const kernels::Kernels& kernels, ThreadPool& threads)
    : config_(config),
      heads_(heads),
      key_begin_(KeyBegin(config)),
      row_stride_(RowStride(config)),
      softmax_scale_(softmax_scale),
      kernels_(kernels),
      threads_(threads),
      num_together_(NumTogether(heads, threads.num_threads())),
      scratch_bytes_(ScratchBytes(config)),
      part_bytes_(kernels::AttentionPartBytes(config.v_head_dim)),
      scratch_(Arena::AllocateOrDie(scratch_bytes_ * threads.num_threads())),
      rows_(Arena::AllocateOrDie(num_together_ * RowBytes(config))),
      merged_(Arena::AllocateOrDie(num_together_ * NumTiles(kMostTokens) * part_bytes_)) {}

int ExpandedAttention::NumTogether(int heads, int num_threads) {
  return std::min({heads, std::max(num_threads, 2), kMostTogether});
}

int ExpandedAttention::num_tiles() const {
  return NumTiles(num_tokens_);
}

kernels::Bf16* ExpandedAttention::Rows(int place) const {
  return reinterpret_cast<kernels::Bf16*>(rows_.data()) + place * kernels::kAttentionBlock * row_stride_;
}

std::byte* ExpandedAttention::Merged(int place, int tile) const {
  return merged_.data() + (place * NumTiles(kMostTokens) + tile) * part_bytes_;
}

std::vector<int> ExpandedAttention::Run(int layer, const LayerWeights& weights, const Batch& batch, int first,
                                        int count, const KvCache& cache, const kernels::Bf16* queries,
                                        kernels::Bf16* out) {
  CHECK_LE(count, kMostTokens);
  num_tokens_ = count;
  pages_ = cache.Pages(layer, batch.BlockIds(batch.step.sequences[batch.sequence[first]]));
  FindRows(batch, first, count);
  bad_tiles_.assign(static_cast<size_t>(heads_) * num_tiles(), false);
  for (int head = 0; head < heads_; head += num_together_) {
    RunHeads(weights, {head, std::min(head + num_together_, heads_)}, queries, out);
  }
  std::vector<int> failed;
  for (size_t i = 0; i < bad_tiles_.size(); ++i) {
    const int place = static_cast<int>(i);
    if (bad_tiles_[i]) RepairTile(weights, place / num_tiles(), place % num_tiles(), queries, out, failed);
  }
  return failed;
}

// What each token sees, and where its latents lie.
void ExpandedAttention::FindRows(const Batch& batch, int first, int count) {
  num_visible_.resize(count);
  for (int t = 0; t < count; ++t) num_visible_[t] = batch.position[first + t] + 1;
  const int context = num_visible_.back();
  block_ids_.resize(context / kernels::kAttentionBlock + 1);
  cache_rows_.resize(context);
  const int block_size = pages_.block_size;
  for (int position = 0; position < context; ++position) {
    cache_rows_[position] = pages_.block_ids[position / block_size] * block_size + position % block_size;
  }
}

void ExpandedAttention::RunHeads(const LayerWeights& weights, Slice heads, const kernels::Bf16* queries,
                                 kernels::Bf16* out) {
  const int context = num_visible_.back();
  for (int block = 0; block * kernels::kAttentionBlock < context; ++block) {
    ExpandBlock(weights, heads, block);
    AttendBlock(heads, block, queries, out);
  }
}

void ExpandedAttention::ExpandBlock(const LayerWeights& weights, Slice heads, int block) {
  const int begin = block * kernels::kAttentionBlock;
  const int end = std::min(begin + kernels::kAttentionBlock, num_visible_.back());
  const int share = (end - begin) * heads.size() / (threads_.num_active() * 2);
  const int width = std::clamp(share / kLeastPositions * kLeastPositions, kLeastPositions, kMostPositions);
  const int pieces = (end - begin + width - 1) / width;
  threads_.ParallelFor(heads.size() * pieces, [&](int task, int) {
    const int place = task / pieces;
    const int from = begin + task % pieces * width;
    Expand(weights, heads.begin + place, {from, std::min(from + width, end)},
           Rows(place) + (from - begin) * row_stride_);
  });
}

// Rows [value | key] of one head: Wv and Wk over the latent, then the rotated part of the key.
void ExpandedAttention::Expand(const LayerWeights& weights, int head, Slice positions,
                               kernels::Bf16* rows) const {
  const kernels::Bf16Rows latents = {pages_.base, pages_.row_stride};
  const kernels::RowMap map = {.count = positions.size(), .in_rows = cache_rows_.data() + positions.begin};
  const kernels::PackedBf16& value = weights.value_up[head];
  const kernels::PackedBf16& key = weights.key_of_latent[head];
  kernels_.gemm_bf16(latents, value, map, 0, value.num_panels(), rows, row_stride_);
  kernels_.gemm_bf16(latents, key, map, 0, key.num_panels(), rows + key_begin_, row_stride_);
  for (int i = 0; i < positions.size(); ++i) {
    std::memcpy(rows + i * row_stride_ + key_begin_ + config_.qk_nope_head_dim,
                pages_.base + map.in_rows[i] * pages_.row_stride + config_.kv_lora_rank,
                static_cast<size_t>(config_.qk_rope_head_dim) * sizeof(kernels::Bf16));
  }
}

kernels::AttentionTile ExpandedAttention::TileOf(int head, int tile, const kernels::Bf16* queries,
                                                 const kernels::Bf16* rows) const {
  const int width = config_.qk_head_dim();
  const int token = tile * kernels::kAttentionRows;
  const int64_t query_stride = int64_t{heads_} * width;
  return {.queries = {queries + token * query_stride + int64_t{head} * width, query_stride},
          .num_rows = std::min(kernels::kAttentionRows, num_tokens_ - token),
          .num_visible = num_visible_.data() + token,
          .pages = {.base = rows,
                    .block_ids = block_ids_.data(),
                    .block_size = kernels::kAttentionBlock,
                    .row_stride = row_stride_},
          .key_begin = key_begin_,
          .key_width = width,
          .value_width = config_.v_head_dim,
          .softmax_scale = softmax_scale_};
}

// All tiles that see the block: later tokens see no less.
void ExpandedAttention::AttendBlock(Slice heads, int block, const kernels::Bf16* queries,
                                    kernels::Bf16* out) {
  const int before = block * kernels::kAttentionBlock;
  const auto sees = std::ranges::upper_bound(num_visible_, before);
  const int first_tile = static_cast<int>(sees - num_visible_.begin()) / kernels::kAttentionRows;
  const int tiles = num_tiles() - first_tile;
  const int64_t out_stride = int64_t{heads_} * config_.v_head_dim;
  threads_.ParallelFor(heads.size() * tiles, [&](int task, int thread) {
    const int place = task / tiles;
    const int head = heads.begin + place;
    const int tile = first_tile + task % tiles;
    const kernels::AttentionTile in = TileOf(head, tile, queries, Rows(place));
    std::byte* merged = Merged(place, tile);
    std::byte* part = block == 0 ? merged : Scratch(thread) + scratch_bytes_ - part_bytes_;
    if (!kernels_.attention_block(in, block, Scratch(thread), part)) {
      bad_tiles_[static_cast<size_t>(head) * num_tiles() + tile] = true;
    }
    if (block > 0) kernels_.attention_merge(in, block, part, 0, in.num_rows, merged);
    if (block + 1 == in.num_blocks()) {
      kernels::Bf16* target = out + int64_t{tile} * kernels::kAttentionRows * out_stride;
      kernels_.attention_finish(in, merged, 0, in.num_rows, target + int64_t{head} * config_.v_head_dim,
                                out_stride);
    }
  });
}

// The rare tile with a score that is not finite: once more, with all its positions at hand, to learn whose it
// is and to keep the rows beside it exact.
void ExpandedAttention::RepairTile(const LayerWeights& weights, int head, int tile,
                                   const kernels::Bf16* queries, kernels::Bf16* out,
                                   std::vector<int>& failed) {
  kernels::AttentionTile in = TileOf(head, tile, queries, nullptr);
  const int positions = in.num_visible[in.num_rows - 1];
  const Arena arena =
      Arena::AllocateOrDie(RoundUp(positions, 64) * row_stride_ * int64_t{sizeof(kernels::Bf16)});
  auto* rows = reinterpret_cast<kernels::Bf16*>(arena.data());
  Expand(weights, head, {0, positions}, rows);
  in.pages.base = rows;
  in.pages.block_size = RoundUp(positions, 64);
  const int64_t out_stride = int64_t{heads_} * config_.v_head_dim;
  const int token = tile * kernels::kAttentionRows;
  uint64_t bad = 0;
  kernels_.attention(in, Scratch(0), out + token * out_stride + int64_t{head} * config_.v_head_dim,
                     out_stride, &bad);
  for (; bad != 0; bad &= bad - 1) failed.push_back(token + std::countr_zero(bad));
}

}  // namespace tessera
