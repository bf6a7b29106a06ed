// One step on one rank: forward pass, then logits in pieces, then the draws, each on its own thread.
#include "cluster/rank.h"

#include <algorithm>

#include "base/check.h"

namespace tessera {
namespace {

// Rows whose logits are held at a time: 33 MB for R1's vocabulary.
constexpr int kLogitRows = 64;

}  // namespace

Result<std::unique_ptr<Rank>> Rank::Create(const ModelConfig& config, const Weights& weights,
                                           const RankOptions& options, const kernels::Kernels& kernels,
                                           ThreadPool& threads) {
  ASSIGN_OR_RETURN(KvCache cache, KvCache::Allocate(config, options.num_blocks, options.block_size));
  return std::unique_ptr<Rank>(new Rank(config, weights, options, kernels, threads, std::move(cache)));
}

Rank::Rank(const ModelConfig& config, const Weights& weights, const RankOptions& options,
           const kernels::Kernels& kernels, ThreadPool& threads, KvCache cache)
    : config_(config),
      threads_(threads),
      model_(config, weights, options.max_model_len, kernels, threads),
      cache_(std::move(cache)) {
  const int num_tokens = std::min(options.num_tokens, config.vocab_size);
  for (int thread = 0; thread < threads.num_threads(); ++thread) samplers_.emplace_back(kernels, num_tokens);
}

void Rank::CheckStep(const GroupStep& step) const {
  for (const int32_t token : step.tokens) CHECK(token >= 0 && token < config_.vocab_size);
  for (const int32_t block : step.block_ids) CHECK(block >= 0 && block < cache_.num_blocks());
  int32_t next = 0;
  for (const SequenceSlice& slice : step.sequences) {
    CHECK_EQ(slice.first_token, next);
    CHECK_GE(slice.num_tokens, 1);
    next += slice.num_tokens;
    CHECK_LE(int64_t{slice.num_computed} + slice.num_tokens, int64_t{slice.num_blocks} * cache_.block_size());
    CHECK_LE(static_cast<size_t>(slice.first_block) + slice.num_blocks, step.block_ids.size());
  }
  CHECK_EQ(static_cast<size_t>(next), step.tokens.size());
}

GroupOutput Rank::Run(const GroupStep& step) {
  GroupOutput output;
  if (step.tokens.empty()) return output;
  CheckStep(step);
  output.failures = model_.Forward(step, cache_);

  const int num_rows = static_cast<int>(step.rows.size());
  const size_t vocab = static_cast<size_t>(config_.vocab_size);
  output.rows.resize(num_rows);
  std::vector<char> finite(num_rows, 1);
  logits_.resize(std::min(num_rows, kLogitRows) * vocab);
  for (int first = 0; first < num_rows; first += kLogitRows) {
    const int count = std::min(kLogitRows, num_rows - first);
    model_.Logits(first, count, logits_.data());
    threads_.ParallelFor(count, [&](int i, int thread) {
      const int row = first + i;
      finite[row] = samplers_[thread].Sample(step, step.rows[row],
                                             std::span(logits_).subspan(i * vocab, vocab), output.rows[row]);
    });
  }

  // Rows and sequences both ascend by token.
  std::vector<int> sequence_of(num_rows);
  for (int row = 0, sequence = 0; row < num_rows; ++row) {
    const auto end = [&](int s) { return step.sequences[s].first_token + step.sequences[s].num_tokens; };
    while (step.rows[row].token >= end(sequence)) ++sequence;
    sequence_of[row] = sequence;
    std::string& failure = output.failures[sequence];
    if (!finite[row] && failure.empty()) failure = "a logit is not finite";
  }
  for (int row = 0; row < num_rows; ++row) {
    if (!output.failures[sequence_of[row]].empty()) output.rows[row] = {};
  }
  return output;
}

}  // namespace tessera
