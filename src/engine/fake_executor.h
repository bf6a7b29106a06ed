// For tests of the engine: hands without arithmetic. Each group has a cache that really stores one token id
// per position, and the context of a draw is read back through the block table, so that a wrong table, a
// stale page, a missing zero or a wrong penalty list gives another token. What is drawn is a pure function of
// that context and of everything in the SamplingRow. Like the model, it writes all rows of a step before it
// reads any.
#pragma once

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "engine/executor.h"

namespace tessera::test {

struct FakeExecutorOptions {
  int num_groups = 1;
  int num_blocks = 16;
  int block_size = 4;
  int vocab_size = 50;
  int poison_token = -1;  // a sequence that computes this token fails in that step
};

class FakeExecutor : public Executor {
 public:
  explicit FakeExecutor(const FakeExecutorOptions& options)
      : options_(options),
        pages_(options.num_groups,
               std::vector<int32_t>(static_cast<size_t>(options.num_blocks) * options.block_size, kFresh)) {}

  Result<StepOutput> Run(const Step& step) override {
    StepOutput output;
    output.groups.resize(step.groups.size());
    if (step.groups.size() != pages_.size()) Complain("the number of groups is wrong");
    for (size_t group = 0; group < step.groups.size(); ++group) {
      RunGroup(step.groups[group], pages_[group], output.groups[group]);
    }
    return output;
  }

  // What no step may ever ask for: empty when all was well.
  const std::vector<std::string>& complaints() const { return complaints_; }

 private:
  static constexpr int32_t kFresh = -1;    // never written, or cleared
  static constexpr int32_t kGarbage = -2;  // left by a failed sequence: to be cleared before the page is used

  void Complain(std::string what) { complaints_.push_back(std::move(what)); }

  int32_t& Slot(std::vector<int32_t>& pages, const GroupStep& step, const SequenceSlice& slice,
                int position) {
    const int32_t block = step.block_ids[slice.first_block + position / options_.block_size];
    return pages[static_cast<size_t>(block) * options_.block_size + position % options_.block_size];
  }

  void RunGroup(const GroupStep& step, std::vector<int32_t>& pages, GroupOutput& output) {
    for (const int32_t block : step.zero_blocks) {
      std::fill_n(pages.begin() + static_cast<ptrdiff_t>(block) * options_.block_size, options_.block_size,
                  kFresh);
    }
    output.failures.resize(step.sequences.size());
    std::set<const int32_t*> written;
    for (size_t i = 0; i < step.sequences.size(); ++i) {
      const SequenceSlice& slice = step.sequences[i];
      const int end = slice.num_computed + slice.num_tokens;
      if (slice.num_blocks * options_.block_size < end) Complain("a block table is too short");
      for (int position = end; position < slice.num_blocks * options_.block_size; ++position) {
        if (Slot(pages, step, slice, position) == kGarbage) Complain("a page with garbage was not cleared");
      }
      bool failed = false;
      for (int j = 0; j < slice.num_tokens; ++j) {
        const int32_t token = step.tokens[slice.first_token + j];
        failed |= token == options_.poison_token;
        int32_t& slot = Slot(pages, step, slice, slice.num_computed + j);
        if (!written.insert(&slot).second) Complain("two sequences write to one slot");
        slot = failed ? kGarbage : token;
      }
      if (failed) output.failures[i] = "poison in layer 1";
    }
    output.rows.resize(step.rows.size());
    size_t i = 0;
    for (size_t row = 0; row < step.rows.size(); ++row) {
      const int32_t token = step.rows[row].token;
      if (row > 0 && token <= step.rows[row - 1].token) Complain("rows do not ascend");
      while (token >= step.sequences[i].first_token + step.sequences[i].num_tokens) ++i;
      if (!output.failures[i].empty()) continue;
      Answer(step, step.sequences[i], step.rows[row], pages, output.rows[row]);
    }
  }

  static uint64_t Mix(uint64_t hash, uint64_t value) {
    hash = (hash ^ value) * 0x9E3779B97F4A7C15;
    return hash ^ hash >> 29;
  }

  void Answer(const GroupStep& step, const SequenceSlice& slice, const LogitRow& row,
              std::vector<int32_t>& pages, RowOutput& output) {
    const int last = slice.num_computed + row.token - slice.first_token;
    uint64_t hash = 1;
    for (int position = 0; position <= last; ++position) {
      // Garbage is read like anything else: the scheduler must see to it that nobody believes the result.
      const int32_t token = Slot(pages, step, slice, position);
      if (token == kFresh) Complain("a position was read before it was written");
      hash = Mix(hash, static_cast<uint64_t>(token));
    }
    output.token = row.target;
    if (row.sampling >= 0) output.token = Draw(step, step.sampling[row.sampling], hash, last);
    if (row.num_logprobs < 0) return;
    output.logprob = -static_cast<float>(Mix(hash, static_cast<uint64_t>(output.token)) >> 40);
    for (int k = 0; k < row.num_logprobs; ++k) {
      output.top.push_back(
          {static_cast<int32_t>(Mix(hash, k) % options_.vocab_size), -static_cast<float>(k)});
    }
  }

  int32_t Draw(const GroupStep& step, const SamplingRow& row, uint64_t hash, int last) {
    if (row.position != static_cast<uint32_t>(last) + 1) Complain("a draw has the wrong position");
    hash = Mix(Mix(Mix(hash, row.seed), row.position), row.choice);
    for (int i = row.counts_begin; i < row.counts_end; ++i) {
      const TokenCount& count = step.counts[i];
      hash = Mix(Mix(Mix(hash, count.token), count.in_output), count.in_prompt);
    }
    for (int i = row.bias_begin; i < row.bias_end; ++i) hash = Mix(hash, step.biases[i].token);
    const auto is_in = [&](int begin, int end, int32_t id) {
      return std::find(step.token_lists.begin() + begin, step.token_lists.begin() + end, id) !=
             step.token_lists.begin() + end;
    };
    int32_t token = static_cast<int32_t>(hash % options_.vocab_size);
    for (int tries = 0; tries < options_.vocab_size; ++tries, token = (token + 1) % options_.vocab_size) {
      if (is_in(row.forbidden_begin, row.forbidden_end, token)) continue;
      if (row.allowed_begin >= 0 && !is_in(row.allowed_begin, row.allowed_end, token)) continue;
      return token;
    }
    Complain("no token is allowed");
    return 0;
  }

  const FakeExecutorOptions options_;
  std::vector<std::vector<int32_t>> pages_;
  std::vector<std::string> complaints_;
};

}  // namespace tessera::test
