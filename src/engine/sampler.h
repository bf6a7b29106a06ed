// One draw from one row of logits, and its logprobs, by numerics.md "sampling" and "logprob". Pure: the same
// row gives the same bits on every rank and instruction set. Runs where the logits are.
#pragma once

#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "model/step.h"

namespace tessera {

class Sampler {
 public:
  // `num_tokens`: ids at or above it (padding rows of the head) are -inf before anything else.
  Sampler(const kernels::Kernels& kernels, int num_tokens) : kernels_(kernels), num_tokens_(num_tokens) {}

  // `logits` [vocab_size] may be overwritten. False when a logit is not finite, before or after bias and
  // penalties, or when masks leave no token at all; `output` is then empty. One thread per object.
  bool Sample(const GroupStep& step, const LogitRow& row, std::span<float> logits, RowOutput& output);

 private:
  struct Candidate {
    float value;
    int32_t token;
  };
  struct Prefix {
    size_t size = 0;  // candidates, best first
    float total = 0;  // mass the draw is relative to
  };
  static bool IsBetter(const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.token < b.token);
  }

  void AddLogprobs(std::span<const float> x, int num_logprobs, RowOutput& output);
  int32_t Draw(const GroupStep& step, const SamplingRow& row, std::span<const float> x);
  int32_t DrawFrom(const SamplingRow& row, float max, float u);
  bool Extend(std::span<const float> v, float max);
  void FillWeights(size_t begin, float max);
  void SelectBest(std::span<const float> values, int count);

  const kernels::Kernels& kernels_;
  const int num_tokens_;
  std::vector<float> adjusted_;  // the row after masks, bias, penalties and temperature
  std::vector<float> scratch_;
  std::vector<Candidate> candidates_;  // best first up to num_sorted_
  std::vector<float> weights_;         // of the sorted candidates
  size_t num_sorted_ = 0;
  float band_bottom_ = 0;  // candidates below this value were not collected yet
};

}  // namespace tessera
