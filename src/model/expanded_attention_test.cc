// The expanded form against its definition, written here as plain loops: every key and value of a head made
// from the latent by a pair chain, then one attention over all positions. Equal bits for any number of
// threads and any cut of the prompt; a value that is not finite is reported for the tokens that see it. And
// against the absorbed form, which is the same function in exact arithmetic.
#include "model/expanded_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "base/random.h"
#include "model/attention.h"

namespace tessera {
namespace {

using kernels::Bf16;

constexpr int kPage = 48;

struct Shape {
  int heads, latent, nope, rope, value;
};

class ExpandedAttentionTest : public ::testing::Test {
 protected:
  // A sequence of `context` positions with random latents; queries for all of them.
  void Build(const Shape& shape, int context) {
    shape_ = shape;
    config_.num_layers = 1;
    config_.num_heads = shape.heads;
    config_.kv_lora_rank = shape.latent;
    config_.qk_nope_head_dim = shape.nope;
    config_.qk_rope_head_dim = shape.rope;
    config_.v_head_dim = shape.value;
    const int num_pages = (context + kPage - 1) / kPage;
    cache_.emplace(*KvCache::Allocate(config_, num_pages, kPage));
    block_ids_.resize(num_pages);
    for (int i = 0; i < num_pages; ++i) block_ids_[i] = (i * 7 + 3) % num_pages;
    if (num_pages % 7 == 0) std::ranges::generate(block_ids_, [i = 0]() mutable { return i++; });
    RandomStream random(5);
    const auto value = [&] { return kernels::ToBf16(random.Unit() - 0.5f); };
    for (int position = 0; position < context; ++position) {
      std::generate_n(Row(position), config_.latent_width(), value);
    }
    queries_.resize(int64_t{context} * shape.heads * config_.qk_head_dim());
    std::ranges::generate(queries_, value);
    key_weight_.resize(int64_t{shape.heads} * shape.nope * shape.latent);
    value_weight_.resize(int64_t{shape.heads} * shape.value * shape.latent);
    std::ranges::generate(key_weight_, value);
    std::ranges::generate(value_weight_, value);
    Pack();
  }
  Bf16* Row(int position) { return cache_->Row(0, block_ids_[position / kPage], position % kPage); }

  void Pack() {
    const auto [heads, latent, nope, rope, value] = shape_;
    arena_ = *Arena::Allocate(size_t{64} << 20);
    weights_ = {};
    const auto pack = [&](std::vector<kernels::PackedBf16>& all, const Bf16* rows, int outputs, int k) {
      kernels::PackedBf16 packed = {.num_outputs = outputs, .leaf_k = k};
      auto* target = reinterpret_cast<Bf16*>(arena_.Take(packed.size_bytes()));
      kernels::PackBf16(rows, k, packed, 0, packed.num_panels(), target);
      packed.panels = target;
      all.push_back(packed);
    };
    for (int h = 0; h < heads; ++h) {
      pack(weights_.key_of_latent, key_weight_.data() + int64_t{h} * nope * latent, nope, latent);
      pack(weights_.value_up, value_weight_.data() + int64_t{h} * value * latent, value, latent);
    }
  }

  struct Answer {
    std::vector<uint16_t> bits;  // [token][head][v]
    std::vector<int> failed;
  };
  // Tokens [begin, context) in runs of at most `run` tokens.
  Answer Run(int begin, int context, int run, int num_threads, const kernels::Kernels& kernels) {
    ThreadPool threads(num_threads);
    ExpandedAttention attention(config_, shape_.heads, 0.25f, kernels, threads);
    const int width = shape_.heads * config_.qk_head_dim();
    const int out_width = shape_.heads * shape_.value;
    Answer answer;
    for (int first = begin; first < context; first += run) {
      const int count = std::min(run, context - first);
      Step step;
      GroupStep& group = step.groups.emplace_back();
      group.tokens.resize(count);
      group.sequences = {{.num_tokens = count, .num_computed = first, .num_expanded = context}};
      group.block_ids = block_ids_;
      const Topology topology;
      const Batch batch(step, topology);
      std::vector<Bf16> out(int64_t{count} * out_width, Bf16{0x1234});
      const std::vector<int> failed = attention.Run(0, weights_, batch, 0, count, *cache_,
                                                    queries_.data() + int64_t{first} * width, out.data());
      for (const int t : failed) answer.failed.push_back(first + t);
      for (const Bf16 x : out) answer.bits.push_back(x.bits);
    }
    std::ranges::sort(answer.failed);
    answer.failed.erase(std::ranges::unique(answer.failed).begin(), answer.failed.end());
    return answer;
  }

  static float Chain(const Bf16* a, const Bf16* b, int k) {
    float sum = 0;
    for (int i = 0; i < k; i += 2) {
      sum = std::fma(kernels::ToFloat(a[i + 1]), kernels::ToFloat(b[i + 1]), sum);
      sum = std::fma(kernels::ToFloat(a[i]), kernels::ToFloat(b[i]), sum);
    }
    return sum;
  }
  // The definition, for tokens [begin, context).
  std::vector<uint16_t> Definition(int begin, int context) {
    const auto [heads, latent, nope, rope, value] = shape_;
    const int key_begin = (value + 15) / 16 * 16;
    const int stride = (key_begin + nope + rope + 1 + 31) / 32 * 32;
    const kernels::Kernels& scalar = **kernels::ForIsa(kernels::Isa::kScalar);
    const Arena scratch = *Arena::Allocate(kernels::AttentionScratchBytes(nope + rope, value));
    std::vector<Bf16> out(int64_t{context - begin} * heads * value);
    for (int h = 0; h < heads; ++h) {
      std::vector<Bf16> rows(int64_t{context} * stride);
      for (int t = 0; t < context; ++t) {
        Bf16* row = rows.data() + int64_t{t} * stride;
        for (int v = 0; v < value; ++v)
          row[v] = kernels::ToBf16(Chain(Row(t), &value_weight_[(int64_t{h} * value + v) * latent], latent));
        for (int n = 0; n < nope; ++n) {
          row[key_begin + n] =
              kernels::ToBf16(Chain(Row(t), &key_weight_[(int64_t{h} * nope + n) * latent], latent));
        }
        std::copy_n(Row(t) + latent, rope, row + key_begin + nope);
      }
      const int32_t page = 0;
      for (int t = begin; t < context; ++t) {
        const int32_t visible = t + 1;
        const int64_t query = (int64_t{t} * heads + h) * (nope + rope);
        const kernels::AttentionTile tile = {.queries = {queries_.data() + query, nope + rope},
                                             .num_rows = 1,
                                             .num_visible = &visible,
                                             .pages = {rows.data(), &page, context, 0, stride},
                                             .key_begin = key_begin,
                                             .key_width = nope + rope,
                                             .value_width = value,
                                             .softmax_scale = 0.25f};
        scalar.attention(tile, scratch.data(), out.data() + (int64_t{t - begin} * heads + h) * value, value,
                         nullptr);
      }
    }
    std::vector<uint16_t> bits;
    for (const Bf16 x : out) bits.push_back(x.bits);
    return bits;
  }

  Shape shape_;
  ModelConfig config_;
  std::optional<KvCache> cache_;
  std::vector<int32_t> block_ids_;
  std::vector<Bf16> queries_, key_weight_, value_weight_;
  Arena arena_;
  LayerWeights weights_;
};

TEST_F(ExpandedAttentionTest, IsItsDefinition) {
  const kernels::Kernels& scalar = **kernels::ForIsa(kernels::Isa::kScalar);
  const kernels::Kernels& best = **kernels::Choose("");
  for (const Shape& shape : {Shape{3, 32, 16, 8, 16}, Shape{1, 18, 5, 4, 7}, Shape{5, 24, 10, 2, 33}}) {
    Build(shape, 700);
    const std::vector<uint16_t> wanted = Definition(500, 700);
    EXPECT_EQ(Run(500, 700, 200, 1, scalar).bits, wanted);
    EXPECT_EQ(Run(500, 700, 200, 2, best).bits, wanted);
  }
}

TEST_F(ExpandedAttentionTest, ThreadsAndCutsDoNotMatter) {
  const kernels::Kernels& best = **kernels::Choose("");
  Build({6, 32, 16, 8, 16}, 1300);
  const std::vector<uint16_t> whole = Run(0, 1300, 1300, 1, best).bits;
  for (const auto& [run, num_threads] : {std::pair{1300, 2}, {1300, 16}, {511, 3}, {64, 2}, {257, 40}}) {
    const Answer answer = Run(0, 1300, run, num_threads, best);
    EXPECT_TRUE(answer.failed.empty());
    EXPECT_EQ(answer.bits, whole) << run << " " << num_threads;
  }
}

TEST_F(ExpandedAttentionTest, TokensThatSeeAValueThatIsNotFinite) {
  const kernels::Kernels& best = **kernels::Choose("");
  Build({3, 32, 16, 8, 16}, 800);
  const std::vector<uint16_t> fine = Run(600, 800, 200, 2, best).bits;
  Row(770)[5] = kernels::ToBf16(__builtin_inff());
  for (const int run : {200, 64, 1}) {
    const Answer answer = Run(600, 800, run, 2, best);
    ASSERT_EQ(answer.failed.size(), 30u) << run;
    EXPECT_EQ(answer.failed.front(), 770);
    EXPECT_EQ(answer.failed.back(), 799);
    const int64_t good = int64_t{170} * 3 * 16;
    EXPECT_TRUE(std::equal(fine.begin(), fine.begin() + good, answer.bits.begin())) << run;
  }
}

// The same function: absorbing Wk into the query and Wv into the output, in fp32.
TEST_F(ExpandedAttentionTest, IsTheAbsorbedFormButForRounding) {
  const kernels::Kernels& best = **kernels::Choose("");
  const auto [heads, latent, nope, rope, value] = Shape{4, 32, 16, 8, 16};
  Build({heads, latent, nope, rope, value}, 600);
  const Answer answer = Run(590, 600, 10, 2, best);
  const Arena scratch = *Arena::Allocate(kernels::AttentionScratchBytes(latent + rope, latent));
  double error = 0, size = 0;
  for (int t = 590; t < 600; ++t) {
    for (int h = 0; h < heads; ++h) {
      const Bf16* query = &queries_[(int64_t{t} * heads + h) * (nope + rope)];
      std::vector<Bf16> absorbed(latent + rope);
      for (int r = 0; r < latent; ++r) {
        float sum = 0;
        for (int n = 0; n < nope; ++n) {
          sum += kernels::ToFloat(query[n]) *
                 kernels::ToFloat(key_weight_[(int64_t{h} * nope + n) * latent + r]);
        }
        absorbed[r] = kernels::ToBf16(sum);
      }
      std::copy_n(query + nope, rope, absorbed.begin() + latent);
      const int32_t visible = t + 1;
      const kernels::AttentionTile tile = {.queries = {absorbed.data(), latent + rope},
                                           .num_rows = 1,
                                           .num_visible = &visible,
                                           .pages = cache_->Pages(0, block_ids_.data()),
                                           .key_width = latent + rope,
                                           .value_width = latent,
                                           .softmax_scale = 0.25f};
      std::vector<Bf16> mixed(latent);
      best.attention(tile, scratch.data(), mixed.data(), latent, nullptr);
      for (int v = 0; v < value; ++v) {
        const float wanted = Chain(mixed.data(), &value_weight_[(int64_t{h} * value + v) * latent], latent);
        const Bf16 got = {answer.bits[(int64_t{t - 590} * heads + h) * value + v]};
        error += std::pow(kernels::ToFloat(got) - wanted, 2);
        size += wanted * wanted;
      }
    }
  }
  EXPECT_GT(size, 0);
  EXPECT_LT(std::sqrt(error / size), 0.02);
}

}  // namespace
}  // namespace tessera
