// Reads stored logits and measures how far ours are from them.
#include "support/golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "model/model.h"
#include "model/safetensors.h"

namespace tessera::test {
namespace {

std::vector<std::byte> ReadTensor(const SafetensorsFile& file, const std::string& name) {
  const auto found = file.tensors().find(name);
  if (found == file.tensors().end()) return {};
  std::vector<std::byte> bytes(found->second.end - found->second.begin);
  EXPECT_TRUE(file.Read(found->second, bytes));
  return bytes;
}

template <typename Stored>
std::vector<float> Widen(const std::vector<std::byte>& bytes) {
  const auto* values = reinterpret_cast<const Stored*>(bytes.data());
  return {values, values + bytes.size() / sizeof(Stored)};
}

// All logits of one sequence, computed in one step.
std::vector<float> OurLogits(const LoadedModel& model, const std::vector<int32_t>& ids,
                             const kernels::Kernels& table, bool expanded) {
  constexpr int kBlockSize = 16;
  const int length = static_cast<int>(ids.size());
  const int num_blocks = (length + kBlockSize - 1) / kBlockSize;
  ThreadPool threads(2);
  const auto alone = Communicator::Alone();
  const auto forward = std::move(
      *Model::Create(model.config, model.weights, length, {Topology(), *alone, *alone}, table, threads));
  KvCache cache = std::move(*KvCache::Allocate(model.config, num_blocks, kBlockSize));
  GroupStep step;
  step.tokens = ids;
  step.block_ids.resize(num_blocks);
  std::iota(step.block_ids.rbegin(), step.block_ids.rend(), 0);
  step.sequences.push_back(
      {.num_tokens = length, .num_expanded = expanded ? length : 0, .num_blocks = num_blocks});
  for (int t = 0; t < length; ++t) step.rows.push_back({.token = t});
  Step whole;
  whole.groups.push_back(step);
  const std::vector<std::string> failures = forward->Forward(whole, cache).value();
  EXPECT_EQ(failures, std::vector<std::string>{""});
  std::vector<float> logits(static_cast<size_t>(length) * model.config.vocab_size);
  EXPECT_TRUE(forward->Logits(0, length, logits.data()));
  return logits;
}

double LogProbability(std::span<const float> logits, int token) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - top);
  return logits[token] - top - std::log(sum);
}

}  // namespace

std::vector<GoldenSequence> LoadGolden(const std::string& path, const std::string& kind) {
  const auto file = SafetensorsFile::Open(path);
  EXPECT_TRUE(file) << file.error().message;
  std::vector<GoldenSequence> golden;
  for (int n = 0;; ++n) {
    const std::string logits = Format("{}.{}.logits", n, kind);
    const std::vector<std::byte> ids = ReadTensor(*file, Format("{}.ids", n));
    if (ids.empty()) return golden;
    const auto* first = reinterpret_cast<const int32_t*>(ids.data());
    GoldenSequence sequence{.ids = {first, first + ids.size() / 4}, .logits = {}};
    const bool half = file->tensors().at(logits).dtype == Dtype::kFp16;
    sequence.logits =
        half ? Widen<_Float16>(ReadTensor(*file, logits)) : Widen<float>(ReadTensor(*file, logits));
    golden.push_back(std::move(sequence));
  }
}

GoldenComparison CompareWithGolden(const LoadedModel& model, const std::vector<GoldenSequence>& golden,
                                   const kernels::Kernels& table, bool expanded) {
  GoldenComparison result;
  double equal = 0;
  double difference = 0;
  int targets = 0;
  const size_t vocab = model.config.vocab_size;
  for (const GoldenSequence& sequence : golden) {
    const std::vector<float> ours = OurLogits(model, sequence.ids, table, expanded);
    EXPECT_EQ(ours.size(), sequence.logits.size());
    for (size_t t = 0; t < sequence.ids.size(); ++t) {
      const auto a = std::span<const float>(ours).subspan(t * vocab, vocab);
      const auto b = std::span<const float>(sequence.logits).subspan(t * vocab, vocab);
      const auto dot = [](auto x, auto y) { return std::inner_product(x.begin(), x.end(), y.begin(), 0.0); };
      result.cosines.push_back(dot(a, b) / std::sqrt(dot(a, a) * dot(b, b)));
      equal += std::max_element(a.begin(), a.end()) - a.begin() ==
               std::max_element(b.begin(), b.end()) - b.begin();
      if (t + 1 < sequence.ids.size()) {
        difference +=
            std::abs(LogProbability(a, sequence.ids[t + 1]) - LogProbability(b, sequence.ids[t + 1]));
        ++targets;
      }
    }
  }
  result.top1_equal = equal / static_cast<double>(result.cosines.size());
  result.mean_logprob_difference = difference / targets;
  return result;
}

GoldenComparison Together(const GoldenComparison& a, const GoldenComparison& b) {
  GoldenComparison both = a;
  both.cosines.insert(both.cosines.end(), b.cosines.begin(), b.cosines.end());
  const double share = static_cast<double>(a.cosines.size()) / static_cast<double>(both.cosines.size());
  both.top1_equal = std::lerp(b.top1_equal, a.top1_equal, share);
  both.mean_logprob_difference = std::lerp(b.mean_logprob_difference, a.mean_logprob_difference, share);
  return both;
}

void ExpectWithinTolerance(const GoldenComparison& comparison) {
  std::vector<double> sorted = comparison.cosines;
  std::sort(sorted.begin(), sorted.end());
  const double count = static_cast<double>(sorted.size());
  const double median = sorted[sorted.size() / 2];
  const double mean = std::accumulate(sorted.begin(), sorted.end(), 0.0) / count;
  const double low =
      static_cast<double>(std::lower_bound(sorted.begin(), sorted.end(), 0.98) - sorted.begin());
  std::printf(
      "%.0f positions: cosine median %.6f mean %.6f, %.0f below 0.98, top-1 equal %.4f, logprob %.5f\n",
      count, median, mean, low, comparison.top1_equal, comparison.mean_logprob_difference);
  EXPECT_GE(median, 0.9999);
  EXPECT_GE(mean, 0.999);
  EXPECT_LE(low, 0.01 * count);
  EXPECT_GE(comparison.top1_equal, 0.995);
  EXPECT_LE(comparison.mean_logprob_difference, 0.005);
}

}  // namespace tessera::test
