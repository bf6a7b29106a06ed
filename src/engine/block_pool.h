// Who holds which cache block of one group: reference counts, the free list (least recently used first) and
// the index of full blocks by content. Ids only: it never sees a page, a sequence or a token. Every operation
// is O(1).
#pragma once

#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/sha256.h"

namespace tessera {

// The content of a full block and of everything before it: SHA-256 of (parent's key, token ids, how many of
// them are computed in the expanded form). The parent of a first block is the root of its salt, so that
// tenants with different salts never meet. The name of the numerics is part of the root: bits of another
// scheme are another content.
using BlockKey = Sha256;
BlockKey RootKey(std::string_view salt);
BlockKey ChildKey(const BlockKey& parent, std::span<const int32_t> tokens, int32_t num_expanded);

class BlockPool {
 public:
  explicit BlockPool(int num_blocks);

  int num_blocks() const { return static_cast<int>(blocks_.size()) - 1; }
  int num_free() const { return num_free_; }  // blocks nobody references; published ones among them
  int references(int32_t block) const { return blocks_[block].references; }

  struct Allocation {
    int32_t block = -1;
    bool dirty = false;  // its page must be cleared before it is used: it was tainted
  };
  // The least recently freed block, with one reference; what was published under it is forgotten.
  // REQUIRES: num_free() > 0.
  Allocation Allocate();
  // One more holder. The block may be free: it then leaves the free list and keeps its content.
  void Reference(int32_t block);
  // One holder less. The last one returns the block to the free list: to its end if it is published, to its
  // front if nobody can find it again (it is the first to be reused, so that fresh pages stay untouched).
  // Holders release their blocks last block first, so that the tail of a prefix is evicted before its head.
  void Release(int32_t block);

  // Makes a full block findable. Two blocks may have one key: the older is found until it is evicted.
  // REQUIRES: referenced and not published.
  void Publish(int32_t block, const BlockKey& key);
  bool published(int32_t block) const { return blocks_[block].published; }
  // A block with this content, or -1.
  int32_t Find(const BlockKey& key) const;

  // The values of its page must not be read again: forgets its key, and marks it dirty for its next
  // allocation. REQUIRES: referenced.
  void Taint(int32_t block);

 private:
  struct Block {
    int32_t references = 0;
    int32_t previous = -1, next = -1;          // free list; meaningless while referenced
    int32_t older_twin = -1, newer_twin = -1;  // published blocks of one key
    bool published = false;
    bool dirty = false;
    BlockKey key = {};
  };
  // Keys are digests: any eight of their bytes are a hash.
  struct KeyHash {
    size_t operator()(const BlockKey& key) const {
      size_t hash = 0;
      std::memcpy(&hash, key.data(), sizeof(hash));
      return hash;
    }
  };
  struct Twins {
    int32_t oldest = -1, newest = -1;
  };

  void InsertFree(int32_t block, int32_t before);
  void RemoveFree(int32_t block);
  void Unpublish(int32_t block);

  std::vector<Block> blocks_;  // the last one is the ring's anchor, not a block
  int num_free_ = 0;
  std::unordered_map<BlockKey, Twins, KeyHash> by_key_;
};

}  // namespace tessera
