// One draw from one row of logits, and its logprobs, by numerics.md "sampling" and "logprob". Pure: the same row
// gives the same bits on every rank and instruction set. Runs where the logits are.
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

  // `logits` [vocab_size] may be overwritten. False when a logit is not finite; `output` is then empty.
  // One thread per object.
  bool Sample(const GroupStep& step, const LogitRow& row, std::span<float> logits, RowOutput& output);

 private:
  struct Candidate {
    float value;
    int32_t token;
  };
  const kernels::Kernels& kernels_;
  const int num_tokens_;
  std::vector<Candidate> candidates_;
  std::vector<float> scratch_;
};

}  // namespace tessera
