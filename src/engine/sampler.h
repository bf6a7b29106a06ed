// One draw from one row of logits, and its logprobs, by numerics.md "sampling" and "logprob". Pure: the same
// row gives the same bits on every rank and instruction set. Runs where the logits are.
#pragma once

#include <span>
#include <vector>

#include "engine/ranking.h"
#include "kernels/kernels.h"
#include "model/step.h"

namespace tessera {

class Sampler {
 public:
  // `num_tokens`: ids at or above it (padding rows of the head) are -inf before anything else.
  Sampler(const kernels::Kernels& kernels, int num_tokens)
      : kernels_(kernels), num_tokens_(num_tokens), ranking_(kernels) {}

  // `logits` [vocab_size] may be overwritten. False when a logit is not finite, before or after bias and
  // penalties, or when masks leave no token at all; `output` is then empty. One thread per object.
  bool Sample(const GroupStep& step, const LogitRow& row, std::span<float> logits, RowOutput& output);

 private:
  struct Logprobs {
    float max = 0, sum = 0, log_sum = 0;
  };
  struct RawLogit {
    int32_t token;
    float value;
  };

  Logprobs AddTop(std::span<const float> x, float max, int num_logprobs, RowOutput& output);
  int32_t Draw(const GroupStep& step, const SamplingRow& row, std::span<float> x, float x_max, float x_sum);
  float NearTotal(std::span<const float> y, float temperature, float max) const;
  size_t Prefix(float limit, float total, bool beyond, size_t most);
  void Adjust(const GroupStep& step, const SamplingRow& row, std::span<float> y);
  float RawValue(std::span<const float> y, int32_t token) const;

  const kernels::Kernels& kernels_;
  const int num_tokens_;
  Ranking ranking_;
  std::vector<float> maxima_;  // of the row's blocks
  std::vector<RawLogit> raw_;  // what bias and penalties changed, in order
  std::vector<float> kept_;
  std::vector<float> sums_;  // running sums of the ranked weights
};

}  // namespace tessera
