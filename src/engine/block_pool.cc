// The free list is a ring through blocks_ whose anchor is one extra entry at the end.
#include "engine/block_pool.h"

#include <string>
#include <utility>

#include "base/check.h"
#include "base/format.h"
#include "kernels/kernels.h"

namespace tessera {

BlockKey RootKey(std::string_view salt) {
  std::string text = Format("{} prefix\n", kernels::kNumerics);
  text += salt;
  return HashSha256(std::as_bytes(std::span(text)));
}

BlockKey ChildKey(const BlockKey& parent, std::span<const int32_t> tokens, int32_t num_expanded) {
  thread_local std::vector<std::byte> bytes;
  bytes.resize(parent.size() + tokens.size_bytes() + sizeof(num_expanded));
  std::byte* at = bytes.data();
  std::memcpy(at, parent.data(), parent.size());
  std::memcpy(at + parent.size(), tokens.data(), tokens.size_bytes());
  std::memcpy(at + parent.size() + tokens.size_bytes(), &num_expanded, sizeof(num_expanded));
  return HashSha256(bytes);
}

BlockPool::BlockPool(int num_blocks) {
  CHECK_GT(num_blocks, 0);
  blocks_.resize(num_blocks + 1);
  blocks_[num_blocks].previous = blocks_[num_blocks].next = num_blocks;
  for (int32_t block = 0; block < num_blocks; ++block) InsertFree(block, num_blocks);
}

BlockPool::Allocation BlockPool::Allocate() {
  CHECK_GT(num_free_, 0);
  const int32_t block = blocks_.back().next;
  RemoveFree(block);
  if (blocks_[block].published) Unpublish(block);
  blocks_[block].references = 1;
  return {.block = block, .dirty = std::exchange(blocks_[block].dirty, false)};
}

void BlockPool::Reference(int32_t block) {
  CHECK(block >= 0 && block < num_blocks());
  if (blocks_[block].references == 0) RemoveFree(block);
  ++blocks_[block].references;
}

void BlockPool::Release(int32_t block) {
  CHECK(block >= 0 && block < num_blocks());
  CHECK_GT(blocks_[block].references, 0);
  if (--blocks_[block].references > 0) return;
  const int32_t anchor = num_blocks();
  InsertFree(block, blocks_[block].published ? anchor : blocks_[anchor].next);
}

void BlockPool::Publish(int32_t block, const BlockKey& key) {
  Block& entry = blocks_[block];
  CHECK_GT(entry.references, 0);
  CHECK(!entry.published);
  entry.published = true;
  entry.key = key;
  entry.newer_twin = -1;
  Twins& twins = by_key_[key];
  entry.older_twin = twins.newest;
  if (twins.newest >= 0) {
    blocks_[twins.newest].newer_twin = block;
  } else {
    twins.oldest = block;
  }
  twins.newest = block;
}

int32_t BlockPool::Find(const BlockKey& key) const {
  const auto found = by_key_.find(key);
  return found == by_key_.end() ? -1 : found->second.oldest;
}

void BlockPool::Taint(int32_t block) {
  CHECK_GT(blocks_[block].references, 0);
  if (blocks_[block].published) Unpublish(block);
  blocks_[block].dirty = true;
}

void BlockPool::Unpublish(int32_t block) {
  Block& entry = blocks_[block];
  const auto found = by_key_.find(entry.key);
  CHECK(found != by_key_.end());
  Twins& twins = found->second;
  (entry.older_twin >= 0 ? blocks_[entry.older_twin].newer_twin : twins.oldest) = entry.newer_twin;
  (entry.newer_twin >= 0 ? blocks_[entry.newer_twin].older_twin : twins.newest) = entry.older_twin;
  if (twins.oldest < 0) by_key_.erase(found);
  entry.published = false;
}

void BlockPool::InsertFree(int32_t block, int32_t before) {
  const int32_t previous = blocks_[before].previous;
  blocks_[block].previous = previous;
  blocks_[block].next = before;
  blocks_[previous].next = block;
  blocks_[before].previous = block;
  ++num_free_;
}

void BlockPool::RemoveFree(int32_t block) {
  blocks_[blocks_[block].previous].next = blocks_[block].next;
  blocks_[blocks_[block].next].previous = blocks_[block].previous;
  --num_free_;
}

}  // namespace tessera
