// One step on one rank: forward pass, then logits in pieces, then the draws, each on its own thread.
#include "cluster/rank.h"

#include <algorithm>

#include "base/check.h"

namespace tessera {
namespace {

// Rows whose logits are held at a time: 33 MB for R1's vocabulary.
constexpr int kLogitRows = 64;
// New tokens of one sequence in a step that only generates, at most.
constexpr int kDecodeTokens = 4;

// A layer with fewer multiplications is a matter of microseconds: threads would wait for each other longer,
// and take cores from whoever serves the answers.
constexpr int64_t kLeastMacsToShare = 2'500'000;

bool OnlyGenerates(const Step& step) {
  return std::ranges::all_of(step.groups, [](const GroupStep& group) {
    return std::ranges::all_of(group.sequences,
                               [](const SequenceSlice& slice) { return slice.num_tokens <= kDecodeTokens; });
  });
}

}  // namespace

Result<std::unique_ptr<Rank>> Rank::Create(const ModelConfig& config, const Weights& weights,
                                           const Peers& peers, const RankOptions& options,
                                           const kernels::Kernels& kernels, ThreadPool& threads) {
  ASSIGN_OR_RETURN(KvCache cache, KvCache::Allocate(config, options.num_blocks, options.block_size));
  ASSIGN_OR_RETURN(std::unique_ptr<Model> model,
                   Model::Create(config, weights, options.max_model_len, peers, kernels, threads));
  return std::unique_ptr<Rank>(
      new Rank(config, peers.topology, options, kernels, threads, std::move(cache), std::move(model)));
}

Rank::Rank(const ModelConfig& config, const Topology& topology, const RankOptions& options,
           const kernels::Kernels& kernels, ThreadPool& threads, KvCache cache, std::unique_ptr<Model> model)
    : config_(config),
      topology_(topology),
      decode_threads_(options.decode_threads > 0 ? options.decode_threads : threads.num_threads()),
      threads_(threads),
      cache_(std::move(cache)),
      model_(std::move(model)) {
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

int Rank::NumThreads(const Step& step) const {
  int64_t macs = 0;  // of all groups: their tokens may come to experts of this rank
  for (const GroupStep& group : step.groups) macs += model_->LayerMacs(group);
  if (macs < kLeastMacsToShare) return 1;
  return OnlyGenerates(step) ? decode_threads_ : threads_.num_threads();
}

Result<RankOutput> Rank::Run(const Step& step) {
  CHECK_EQ(step.groups.size(), static_cast<size_t>(topology_.degrees().dp));
  const GroupStep& group = step.groups[topology_.dp_rank()];
  CheckStep(group);
  threads_.Use(NumThreads(step));
  RankOutput output;
  ASSIGN_OR_RETURN(output.failures, model_->Forward(step, cache_));

  const int num_rows = static_cast<int>(group.rows.size());
  const std::vector<int32_t> sequences = SequencesOfRows(group);
  const auto vocab = static_cast<size_t>(config_.vocab_size);
  for (int first = 0; first < num_rows; first += kLogitRows) {
    const int count = std::min(kLogitRows, num_rows - first);
    const Slice share = model_->LogitShare(count);
    logits_.resize(std::max(logits_.size(), share.size() * vocab));
    RETURN_IF_ERROR(model_->Logits(first, count, logits_.data()));
    const size_t begin = output.rows.size();
    output.rows.resize(begin + share.size());
    std::vector<char> finite(share.size(), 1);
    threads_.ParallelFor(share.size(), [&](int i, int thread) {
      RankOutput::Row& row = output.rows[begin + i];
      row.index = first + share.begin + i;
      finite[i] = samplers_[thread].Sample(group, group.rows[row.index],
                                           std::span(logits_).subspan(i * vocab, vocab), row.output);
    });
    for (int i = 0; i < share.size(); ++i) {
      std::string& failure = output.failures[sequences[output.rows[begin + i].index]];
      if (!finite[i] && failure.empty()) failure = "a logit is not finite";
    }
  }
  return output;
}

}  // namespace tessera
