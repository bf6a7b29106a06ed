// Attention over a batch: any number of threads, and so any cut into tiles and blocks, gives the same bits; a
// value that is not finite is reported for the tokens that see it.
#include "model/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "base/random.h"

namespace tessera {
namespace {

constexpr int kHeads = 24;
constexpr int kPage = 64;

class LatentAttentionTest : public ::testing::Test {
 protected:
  // `tokens[i]` tokens of a sequence after `computed[i]` cached positions, for every sequence i.
  void Build(const std::vector<int>& computed, const std::vector<int>& tokens) {
    config_.num_layers = 2;
    config_.kv_lora_rank = 32;
    config_.qk_rope_head_dim = 8;
    config_.max_position_embeddings = 4096;
    step_.groups.resize(1);
    GroupStep& group = step_.groups[0];
    for (size_t i = 0; i < computed.size(); ++i) {
      const int pages = (computed[i] + tokens[i] + kPage - 1) / kPage;
      group.sequences.push_back({.first_token = static_cast<int32_t>(group.tokens.size()),
                                 .num_tokens = tokens[i],
                                 .num_computed = computed[i],
                                 .first_block = static_cast<int32_t>(group.block_ids.size()),
                                 .num_blocks = pages});
      group.tokens.resize(group.tokens.size() + tokens[i]);
      for (int page = 0; page < pages; ++page) {
        group.block_ids.push_back(static_cast<int32_t>(group.block_ids.size()));
      }
    }
    const int num_pages = static_cast<int>(group.block_ids.size());
    cache_.emplace(*KvCache::Allocate(config_, num_pages, kPage));
    RandomStream random(1);
    const auto value = [&] { return kernels::ToBf16(random.Unit() - 0.5f); };
    for (int page = 0; page < num_pages; ++page) {
      for (int offset = 0; offset < kPage; ++offset) {
        std::generate_n(cache_->Row(1, page, offset), config_.latent_width(), value);
      }
    }
    queries_.resize(group.tokens.size() * kHeads * config_.latent_width());
    std::generate(queries_.begin(), queries_.end(), value);
  }

  struct Answer {
    std::vector<uint16_t> bits;
    std::vector<int> failed;
  };
  Answer Run(int num_threads) {
    const Topology topology;
    const Batch batch(step_, topology);
    ThreadPool threads(num_threads);
    LatentAttention attention(config_, kHeads, 0.5f, **kernels::Choose(""), threads);
    std::vector<kernels::Bf16> out(int64_t{batch.num_tokens()} * kHeads * config_.kv_lora_rank);
    Answer answer;
    answer.failed = attention.Run(1, batch, 0, batch.num_tokens(), *cache_, queries_.data(), out.data());
    for (const kernels::Bf16 x : out) answer.bits.push_back(x.bits);
    std::sort(answer.failed.begin(), answer.failed.end());
    answer.failed.erase(std::unique(answer.failed.begin(), answer.failed.end()), answer.failed.end());
    return answer;
  }
  void ExpectSameForAllThreads() {
    const Answer one = Run(1);
    EXPECT_TRUE(one.failed.empty());
    for (const int num_threads : {2, 3, 16}) {
      const Answer many = Run(num_threads);
      EXPECT_EQ(many.bits, one.bits) << num_threads;
      EXPECT_TRUE(many.failed.empty());
    }
  }

  ModelConfig config_;
  Step step_;
  std::optional<KvCache> cache_;
  std::vector<kernels::Bf16> queries_;
};

TEST_F(LatentAttentionTest, OneTokenWithALongPast) {
  Build({3000}, {1});
  ExpectSameForAllThreads();
}

TEST_F(LatentAttentionTest, ShortAndLongSequencesTogether) {
  Build({5, 2100, 511, 512, 0}, {1, 1, 1, 2, 1});
  ExpectSameForAllThreads();
}

TEST_F(LatentAttentionTest, PromptAcrossBlockBorders) {
  Build({1000}, {40});
  ExpectSameForAllThreads();
}

TEST_F(LatentAttentionTest, MorePartsThanAreHeldAtATime) {
  Build(std::vector<int>(50, 3500), std::vector<int>(50, 1));
  ExpectSameForAllThreads();
}

TEST_F(LatentAttentionTest, TokensThatSeeAValueThatIsNotFinite) {
  Build({1500, 1500}, {3, 1});
  cache_->Row(1, 1501 / kPage, 1501 % kPage)[2] = kernels::ToBf16(__builtin_inff());  // the first one's
  const Answer one = Run(1);
  EXPECT_EQ(one.failed, (std::vector<int>{1, 2}));
  for (const int num_threads : {2, 16}) {
    const Answer many = Run(num_threads);
    EXPECT_EQ(many.failed, one.failed);
    const int64_t token = kHeads * config_.kv_lora_rank;
    EXPECT_TRUE(std::equal(one.bits.begin(), one.bits.begin() + token, many.bits.begin()));
    EXPECT_TRUE(std::equal(one.bits.begin() + 3 * token, one.bits.end(), many.bits.begin() + 3 * token));
  }
}

}  // namespace
}  // namespace tessera
