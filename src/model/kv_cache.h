// The paged latent cache of one rank: for every layer and block, block_size rows of [latent | rope] in bf16.
// Memory is zeroed and touched lazily. Written by the forward pass alone.
#pragma once

#include <cstdint>

#include "base/error.h"
#include "base/memory.h"
#include "kernels/kernels.h"
#include "model/config.h"

namespace tessera {

class KvCache {
 public:
  static Result<KvCache> Allocate(const ModelConfig& config, int num_blocks, int block_size);
  // Bytes of one block over all layers.
  static uint64_t BlockBytes(const ModelConfig& config, int block_size);

  int num_blocks() const { return num_blocks_; }
  int block_size() const { return block_size_; }
  // The cache of a layer as a sequence with these blocks sees it.
  kernels::CachePages Pages(int layer, const int32_t* block_ids) const;
  kernels::Bf16* Row(int layer, int32_t block, int offset);
  void ZeroBlock(int32_t block);

 private:
  KvCache() = default;
  Arena arena_;
  int num_layers_ = 0;
  int num_blocks_ = 0;
  int block_size_ = 0;
  int64_t row_stride_ = 0;  // elements
};

}  // namespace tessera
