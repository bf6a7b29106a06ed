// The sampler against its own specification, written naively over fully sorted rows, on every instruction
// set; and cases whose answer is known by hand.
#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/random.h"
#include "base/threads.h"

namespace tessera {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

const kernels::Kernels& Scalar() {
  return **kernels::ForIsa(kernels::Isa::kScalar);
}

// sampler.cc's comment, line by line.
class NaiveSampler {
 public:
  NaiveSampler(const GroupStep& step, const SamplingRow& row, std::vector<float> x)
      : step_(step), row_(row), y_(std::move(x)) {}

  int32_t Draw() {
    Adjust();
    const float max = *std::ranges::max_element(y_);
    if (max == kMinusInfinity) return -1;
    if (row_.temperature == 0) return static_cast<int32_t>(std::ranges::find(y_, max) - y_.begin());
    for (float& y : y_) y = y / row_.temperature;
    const int n = static_cast<int>(y_.size());
    std::vector<float> p = Exp(y_);
    if (row_.min_p > 0) {
      for (int i = 0; i < n; ++i) {
        if (p[i] < row_.min_p) y_[i] = kMinusInfinity;
      }
      p = Exp(y_);
    }
    float total = Sum64(p);
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::sort(order, [&](int32_t a, int32_t b) { return y_[a] != y_[b] ? y_[a] > y_[b] : a < b; });
    std::erase_if(order, [&](int32_t id) { return y_[id] == kMinusInfinity; });
    if (row_.top_k > 0 && row_.top_k < n) {
      if (order.size() > static_cast<size_t>(row_.top_k)) order.resize(row_.top_k);
      total = 0;
      for (const int32_t id : order) total += p[id];
    }
    if (row_.top_p < 1) {
      float sum = 0;
      size_t size = 0;
      while (size < order.size() && !(size > 0 && sum >= row_.top_p * total)) sum += p[order[size++]];
      order.resize(size);
      total = sum;
    }
    const float u = UnitFloat(Philox4x32(row_.seed, {row_.position, row_.choice, 0, 0})[0]);
    float sum = 0;
    int32_t last = -1;
    for (const int32_t id : order) {
      sum += p[id];
      if (p[id] > 0) last = id;
      if (sum > u * total) return id;
    }
    return last;
  }

 private:
  void Adjust() {
    const auto list = [&](int begin, int end) {
      return std::vector<int32_t>(step_.token_lists.begin() + begin, step_.token_lists.begin() + end);
    };
    if (row_.allowed_begin >= 0) {
      std::vector<bool> is_allowed(y_.size());
      for (const int32_t id : list(row_.allowed_begin, row_.allowed_end)) is_allowed[id] = true;
      for (size_t id = 0; id < y_.size(); ++id) {
        if (!is_allowed[id]) y_[id] = kMinusInfinity;
      }
    }
    for (const int32_t id : list(row_.forbidden_begin, row_.forbidden_end)) y_[id] = kMinusInfinity;
    for (int i = row_.bias_begin; i < row_.bias_end; ++i) y_[step_.biases[i].token] += step_.biases[i].bias;
    for (int i = row_.counts_begin; i < row_.counts_end; ++i) {
      const TokenCount& count = step_.counts[i];
      float& y = y_[count.token];
      y = y > 0 ? y / row_.repetition_penalty : y * row_.repetition_penalty;
      if (count.in_output == 0) continue;
      y -= row_.frequency_penalty * static_cast<float>(count.in_output);
      y -= row_.presence_penalty;
    }
  }
  static std::vector<float> Exp(const std::vector<float>& y) {
    std::vector<float> p(y.size());
    Scalar().exp_sum(y.data(), static_cast<int>(y.size()), 1, *std::ranges::max_element(y), p.data());
    return p;
  }
  static float Sum64(const std::vector<float>& p) {
    float lanes[64] = {};
    for (size_t i = 0; i < p.size(); ++i) lanes[i % 64] += p[i];
    for (int apart = 32; apart > 0; apart /= 2) {
      for (int lane = 0; lane < apart; ++lane) lanes[lane] += lanes[lane + apart];
    }
    return lanes[0];
  }

  const GroupStep& step_;
  const SamplingRow& row_;
  std::vector<float> y_;
};

class SamplerTest : public testing::TestWithParam<kernels::Isa> {
 protected:
  void SetUp() override {
    SetFlushToZero();
    const auto table = kernels::ForIsa(GetParam());
    if (!table) GTEST_SKIP() << table.error().message;
    kernels_ = *table;
  }
  const kernels::Kernels* kernels_ = nullptr;
};

struct Case {
  GroupStep step;
  std::vector<float> logits;
};

// Rows of every shape that the sampler treats apart: flat, peaked, tied, equal, huge, tiny.
std::vector<float> RandomLogits(RandomStream& random, uint32_t n) {
  const float spread =
      std::vector<float>{0, 1, 4, 30, 1e-3f, 1e-7f, 1e30f}[random.Below(random.Below(2) ? 4 : 7)];
  const float offset = random.Below(4) == 0 ? std::vector<float>{-20, 7, 1000}[random.Below(3)] : 0;
  const uint32_t ties = random.Below(6);
  std::vector<float> logits;
  for (uint32_t i = 0; i < n; ++i) {
    float x = (random.Unit() + random.Unit() + random.Unit() - 1.5f) * spread + offset;
    if (ties == 0) x = std::floor(x);
    if (ties == 1) x = std::round(x * 16) / 16;
    logits.push_back(x);
  }
  if (random.Below(3) == 0) {
    for (int i = 0; i < 40; ++i) logits[random.Below(n)] += spread * random.Unit() * 3;
  }
  return logits;
}

Case RandomCase(uint64_t seed, bool is_large) {
  RandomStream random(seed);
  Case result;
  const uint32_t sizes[] = {1, 5, 63, 64, 65, 300, 1000, 5000};
  const uint32_t large_sizes[] = {2049, 16384, 33000, 129280};
  const uint32_t n = is_large ? large_sizes[random.Below(4)] : sizes[random.Below(8)];
  result.logits = RandomLogits(random, n);
  SamplingRow row;
  row.temperature = std::vector<float>{0, 0.3f, 1, 1, 2.5f, 0.01f}[random.Below(6)];
  row.top_p = std::vector<float>{1, 1, 0.95f, 0.5f, 1e-6f, 0.999999f}[random.Below(6)];
  row.top_k = std::vector<int32_t>{0, 0, -1, 1, 3, 50, 1200, static_cast<int32_t>(n)}[random.Below(8)];
  row.min_p = std::vector<float>{0, 0, 0, 0.05f, 0.5f, 1, 1e-6f}[random.Below(7)];
  row.seed = random.Next64();
  row.position = random.Below(1000);
  row.choice = random.Below(4);
  GroupStep& step = result.step;
  if (random.Below(3) == 0) {
    row.repetition_penalty = 1.3f;
    row.frequency_penalty = 0.7f;
    row.presence_penalty = -0.4f;
    for (uint32_t id = 0; id < n; id += 1 + random.Below(5)) {
      step.counts.push_back({static_cast<int32_t>(id), static_cast<int32_t>(random.Below(3)), 1});
    }
    row.counts_end = static_cast<int32_t>(step.counts.size());
  }
  if (random.Below(3) == 0) {
    for (int i = 0; i < 5; ++i)
      step.biases.push_back({static_cast<int32_t>(random.Below(n)), random.Unit() * 8 - 4});
    row.bias_end = 5;
  }
  if (random.Below(3) == 0) {
    for (uint32_t i = 0; i < n / 3; ++i) step.token_lists.push_back(static_cast<int32_t>(random.Below(n)));
    row.forbidden_end = static_cast<int32_t>(step.token_lists.size());
  }
  if (random.Below(4) == 0) {
    row.allowed_begin = static_cast<int32_t>(step.token_lists.size());
    for (uint32_t i = 0; i < 1 + n / 2; ++i)
      step.token_lists.push_back(static_cast<int32_t>(random.Below(n)));
    row.allowed_end = static_cast<int32_t>(step.token_lists.size());
  }
  step.sampling.push_back(row);
  return result;
}

TEST_P(SamplerTest, DrawsWhatTheSpecificationSays) {
  for (uint64_t seed = 0; seed < 3160; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Case test = RandomCase(seed, seed >= 3000);
    const int32_t wanted = NaiveSampler(test.step, test.step.sampling[0], test.logits).Draw();
    Sampler sampler(*kernels_, static_cast<int>(test.logits.size()));
    RowOutput output;
    const bool drawn = sampler.Sample(test.step, {.sampling = 0}, test.logits, output);
    ASSERT_EQ(drawn, wanted >= 0);
    ASSERT_EQ(output.token, wanted);
  }
}

TEST_P(SamplerTest, LogprobsAreRawAndTopIsSorted) {
  for (uint64_t seed = 0; seed < 220; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Case test = RandomCase(seed, seed >= 200);
    const std::vector<float> raw = test.logits;
    const int n = static_cast<int>(raw.size());
    const float max = *std::ranges::max_element(raw) + 0.0f;
    const float log_sum = Scalar().log(Scalar().exp_sum(raw.data(), n, 1, max, nullptr));
    std::vector<int32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::sort(order,
                      [&](int32_t a, int32_t b) { return raw[a] > raw[b] || (raw[a] == raw[b] && a < b); });
    Sampler sampler(*kernels_, n);
    RowOutput output;
    const int num_logprobs = seed % 10 == 0 ? n : 7;
    if (!sampler.Sample(test.step, {.sampling = 0, .num_logprobs = num_logprobs}, test.logits, output))
      continue;
    ASSERT_EQ(output.top.size(), std::min<size_t>(num_logprobs, n));
    EXPECT_EQ(std::bit_cast<uint32_t>(output.logprob),
              std::bit_cast<uint32_t>((raw[output.token] - max) - log_sum));
    for (size_t i = 0; i < output.top.size(); ++i) {
      ASSERT_EQ(output.top[i].token, order[i]);
      ASSERT_EQ(std::bit_cast<uint32_t>(output.top[i].logprob),
                std::bit_cast<uint32_t>((raw[order[i]] - max) - log_sum));
    }
  }
}

TEST_P(SamplerTest, FollowsTheDistribution) {
  GroupStep step;
  step.sampling.resize(1);
  std::vector<int> counts(3);
  Sampler sampler(*kernels_, 3);
  constexpr int kDraws = 20000;
  for (int i = 0; i < kDraws; ++i) {
    step.sampling[0].position = static_cast<uint32_t>(i);
    std::vector<float> logits = {std::log(0.5f), std::log(0.2f), std::log(0.3f)};
    RowOutput output;
    ASSERT_TRUE(sampler.Sample(step, {.sampling = 0}, logits, output));
    ++counts[output.token];
  }
  EXPECT_NEAR(counts[0], kDraws * 0.5, 300);
  EXPECT_NEAR(counts[1], kDraws * 0.2, 300);
  EXPECT_NEAR(counts[2], kDraws * 0.3, 300);
}

TEST_P(SamplerTest, TargetRowsDrawNothing) {
  Sampler sampler(*kernels_, 2);
  std::vector<float> logits = {1, 1, 100};  // the third is padding of the head
  RowOutput output;
  ASSERT_TRUE(sampler.Sample({}, {.target = 1, .num_logprobs = 3}, logits, output));
  EXPECT_EQ(output.token, 1);
  EXPECT_NEAR(output.logprob, -0.693147f, 1e-6);
  ASSERT_EQ(output.top.size(), 2u);
  EXPECT_EQ(output.top[0].token, 0);
}

TEST_P(SamplerTest, PaddingIsNeverDrawnNorChecked) {
  Sampler sampler(*kernels_, 2);
  GroupStep step;
  step.sampling.push_back({.temperature = 0});
  std::vector<float> logits = {1, 2, std::numeric_limits<float>::quiet_NaN()};
  RowOutput output;
  ASSERT_TRUE(sampler.Sample(step, {.sampling = 0}, logits, output));
  EXPECT_EQ(output.token, 1);
}

TEST_P(SamplerTest, RefusesWhatIsNotFinite) {
  Sampler sampler(*kernels_, 40);
  GroupStep step;
  step.sampling.push_back({.temperature = 0});
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), kMinusInfinity}) {
    for (const int place : {0, 15, 16, 39}) {
      std::vector<float> logits(40, 1.0f);
      logits[place] = bad;
      RowOutput output{.token = 3};
      EXPECT_FALSE(sampler.Sample(step, {.sampling = 0}, logits, output));
      EXPECT_EQ(output.token, -1);
    }
  }
}

TEST_P(SamplerTest, RefusesARowWithoutTokens) {
  GroupStep step;
  step.token_lists = {0, 1, 0};
  step.sampling.push_back({.forbidden_begin = 0, .forbidden_end = 2, .allowed_begin = 2, .allowed_end = 3});
  std::vector<float> logits(4, 1.0f);
  RowOutput output;
  EXPECT_FALSE(Sampler(*kernels_, 4).Sample(step, {.sampling = 0}, logits, output));
}

TEST_P(SamplerTest, MaskAndForeignIds) {
  GroupStep step;
  step.masks = {0b0100, 0b1};  // ids 2 and 32
  step.token_lists = {-5, 1000};
  step.biases = {{32, 3}, {99, 1}, {-1, 1}};
  step.sampling.push_back({.temperature = 0, .bias_end = 3, .forbidden_end = 2, .mask_begin = 0});
  std::vector<float> logits(40, 1.0f);
  logits[7] = 50;
  RowOutput output;
  ASSERT_TRUE(Sampler(*kernels_, 40).Sample(step, {.sampling = 0}, logits, output));
  EXPECT_EQ(output.token, 32);
}

INSTANTIATE_TEST_SUITE_P(EveryIsa, SamplerTest,
                         testing::Values(kernels::Isa::kScalar, kernels::Isa::kAvx2, kernels::Isa::kAvx512,
                                         kernels::Isa::kAvx512Bf16),
                         [](const auto& info) { return std::string(kernels::IsaName(info.param)); });

}  // namespace
}  // namespace tessera
