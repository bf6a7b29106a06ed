// The address arithmetic of the paged cache.
#include "model/kv_cache.h"

#include <algorithm>

namespace tessera {
namespace {

constexpr int64_t kRowAlign = 32;  // elements: one cache line

int64_t RowStride(const ModelConfig& config) {
  return (config.latent_width() + kRowAlign - 1) / kRowAlign * kRowAlign;
}

}  // namespace

uint64_t KvCache::BlockBytes(const ModelConfig& config, int block_size) {
  return uint64_t{2} * static_cast<uint64_t>(RowStride(config)) * static_cast<uint64_t>(block_size) *
         static_cast<uint64_t>(config.num_layers);
}

Result<KvCache> KvCache::Allocate(const ModelConfig& config, int num_blocks, int block_size) {
  KvCache cache;
  cache.num_layers_ = config.num_layers;
  cache.num_blocks_ = num_blocks;
  cache.block_size_ = block_size;
  cache.row_stride_ = RowStride(config);
  ASSIGN_OR_RETURN(cache.arena_,
                   Arena::Allocate(BlockBytes(config, block_size) * static_cast<uint64_t>(num_blocks)));
  return cache;
}

kernels::Bf16* KvCache::Row(int layer, int32_t block, int offset) {
  const int64_t row = (int64_t{layer} * num_blocks_ + block) * block_size_ + offset;
  return reinterpret_cast<kernels::Bf16*>(arena_.data()) + row * row_stride_;
}

kernels::CachePages KvCache::Pages(int layer, const int32_t* block_ids) const {
  const auto* base = reinterpret_cast<const kernels::Bf16*>(arena_.data());
  return {.base = base + int64_t{layer} * num_blocks_ * block_size_ * row_stride_,
          .block_ids = block_ids,
          .block_size = block_size_,
          .block_stride = block_size_ * row_stride_,
          .row_stride = row_stride_};
}

void KvCache::ZeroBlock(int32_t block) {
  for (int layer = 0; layer < num_layers_; ++layer) {
    std::fill_n(Row(layer, block, 0), block_size_ * row_stride_, kernels::Bf16{});
  }
}

}  // namespace tessera
