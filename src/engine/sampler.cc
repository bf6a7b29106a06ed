// The canonical draw. This is a specification: every rank computes exactly these expressions, in fp32,
// without fused operations, flush-to-zero set. n = min(num_tokens, row width); ids at or beyond n do not
// exist here.
//
//  raw       x[i], i < n; all finite, or the row fails.
//            logprob(i) = (x[i] - M) - log(L), M = max x + 0 (never -0: which zero a maximum finds is open),
//            L = 64-lane sum over ids of exp(x[i] - M).
//  order     "better": the greater value; among equal ones (-0 equals +0) the lower id. Top lists: best by x.
//  masks     y = x. Not in the allowed list: -inf. Forbidden: -inf. Then y[i] = y[i] + bias, in list order.
//            Grammar mask bit clear: -inf.
//  penalties Per counted token, repetition r if it occurs in prompt or output: y > 0 ? y / r : y * r. Then
//            y - frequency * float(count in output). Then y - presence if it occurs in the output.
//  A row whose y is NaN or +inf somewhere, or -inf everywhere, fails.
//  greedy    temperature 0: the best by y.
//  softmax   v[i] = y[i] / temperature; m = max v; p[i] = exp(v[i] - m): not normalised, the best has p = 1.
//  min-p     if min_p > 0: v[i] = -inf and p[i] = +0 where p[i] < min(min_p, 1).
//  top-k     if 0 < top_k < n: the top_k best by v stay, as long as v > -inf.
//            T = plain sum of their p, best first. Without top-k: T = 64-lane sum of p over ids, after min-p.
//  top-p     if top_p < 1: in order, best first by v, with running sum C from +0 by plain adds, the shortest
//            prefix with C >= top_p * T stays, and T = its C. (All stay where the sum never gets there.)
//  draw      u = 24 bits of word 0 of Philox4x32-10(key = seed, counter = (position, choice, 0, 0)). In the
//            same order with the same running sum: the first candidate with C > u * T. Rounding may keep C
//            from getting there: then the last candidate with p > 0.
//
// Whole rows are never sorted: the running sum needs the best candidates only, so they are taken in bands of
// falling value, each band sorted by (value, id) as far as needed. Bands are disjoint value intervals, so
// that their concatenation is the sorted row.
#include "engine/sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "base/random.h"

namespace tessera {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// The first band reaches down to exp(-kBandDepth) of the likeliest token; it usually holds the draw.
constexpr float kBandDepth = 8;
constexpr size_t kFirstSorted = 64;

bool AllFinite(std::span<const float> values) {
  // Sixteen accumulators, so that the compiler keeps them in vectors.
  int32_t bad[16] = {};
  const auto is_bad = [](float value) {
    return -static_cast<int32_t>((std::bit_cast<uint32_t>(value) & 0x7fffffff) >= kernels::kInfinityBits);
  };
  size_t i = 0;
  for (; i + 16 <= values.size(); i += 16) {
    for (size_t lane = 0; lane < 16; ++lane) bad[lane] |= is_bad(values[i + lane]);
  }
  for (; i < values.size(); ++i) bad[0] |= is_bad(values[i]);
  return std::ranges::all_of(bad, [](int32_t lane) { return lane == 0; });
}

void Divide(std::span<float> values, float divisor) {
  size_t i = 0;
  for (; i + 16 <= values.size(); i += 16) {
    for (size_t lane = 0; lane < 16; ++lane) values[i + lane] /= divisor;
  }
  for (; i < values.size(); ++i) values[i] /= divisor;
}

// Ids are foreign here: those beyond the vocabulary are passed over.
float* At(std::span<float> values, int32_t id) {
  return static_cast<uint32_t>(id) < values.size() ? &values[id] : nullptr;
}

bool HasAdjustment(const SamplingRow& row) {
  return row.counts_begin < row.counts_end || row.bias_begin < row.bias_end ||
         row.forbidden_begin < row.forbidden_end || row.allowed_begin >= 0 || row.mask_begin >= 0;
}

void ApplyMasks(const GroupStep& step, const SamplingRow& row, std::span<float> y, std::vector<float>& kept) {
  if (row.allowed_begin >= 0) {
    const std::span allowed(step.token_lists.begin() + row.allowed_begin,
                            step.token_lists.begin() + row.allowed_end);
    kept.clear();
    for (const int32_t id : allowed) {
      const float* value = At(y, id);
      kept.push_back(value == nullptr ? kMinusInfinity : *value);
    }
    std::ranges::fill(y, kMinusInfinity);
    for (size_t i = 0; i < allowed.size(); ++i) {
      if (float* value = At(y, allowed[i])) *value = kept[i];
    }
  }
  for (int32_t i = row.forbidden_begin; i < row.forbidden_end; ++i) {
    if (float* value = At(y, step.token_lists[i])) *value = kMinusInfinity;
  }
  for (int32_t i = row.bias_begin; i < row.bias_end; ++i) {
    if (float* value = At(y, step.biases[i].token)) *value = *value + step.biases[i].bias;
  }
  if (row.mask_begin >= 0) {
    for (size_t id = 0; id < y.size(); ++id) {
      const uint32_t word = step.masks[row.mask_begin + id / 32];
      if ((word >> (id % 32) & 1) == 0) y[id] = kMinusInfinity;
    }
  }
}

void ApplyPenalties(const GroupStep& step, const SamplingRow& row, std::span<float> y) {
  for (int32_t i = row.counts_begin; i < row.counts_end; ++i) {
    const TokenCount& count = step.counts[i];
    float* value = At(y, count.token);
    if (value == nullptr) continue;
    if (row.repetition_penalty != 1 && (count.in_prompt > 0 || count.in_output > 0)) {
      *value = *value > 0 ? *value / row.repetition_penalty : *value * row.repetition_penalty;
    }
    if (count.in_output > 0) {
      const float by_count = row.frequency_penalty * static_cast<float>(count.in_output);
      *value = *value - by_count;
      *value = *value - row.presence_penalty;
    }
  }
}

}  // namespace

bool Sampler::Sample(const GroupStep& step, const LogitRow& row, std::span<float> logits, RowOutput& output) {
  output = {};
  const std::span<const float> x = logits.first(std::min<size_t>(logits.size(), num_tokens_));
  if (x.empty() || !AllFinite(x)) return false;
  RowOutput answer;
  answer.token = row.target;
  if (row.sampling >= 0) {
    answer.token = Draw(step, step.sampling[row.sampling], x);
    if (answer.token < 0) return false;
  }
  if (row.num_logprobs >= 0) AddLogprobs(x, row.num_logprobs, answer);
  output = std::move(answer);
  return true;
}

void Sampler::AddLogprobs(std::span<const float> x, int num_logprobs, RowOutput& output) {
  const int n = static_cast<int>(x.size());
  const float max = kernels_.max(x.data(), n, nullptr) + 0.0f;
  const float log_sum = kernels_.log(kernels_.exp_sum(x.data(), n, max, nullptr));
  const auto logprob = [&](int32_t id) { return (x[id] - max) - log_sum; };
  if (output.token >= 0 && output.token < n) output.logprob = logprob(output.token);
  if (num_logprobs == 0) return;
  SelectBest(x, std::min(num_logprobs, n));
  for (const Candidate& candidate : candidates_) {
    output.top.push_back({.token = candidate.token, .logprob = logprob(candidate.token)});
  }
}

// The token drawn, or -1 if the row fails.
int32_t Sampler::Draw(const GroupStep& step, const SamplingRow& row, std::span<const float> x) {
  const int n = static_cast<int>(x.size());
  const bool greedy = row.temperature == 0;
  std::span<const float> y = x;
  if (!greedy || HasAdjustment(row)) {
    adjusted_.assign(x.begin(), x.end());
    ApplyMasks(step, row, adjusted_, scratch_);
    ApplyPenalties(step, row, adjusted_);
    if (!greedy) Divide(adjusted_, row.temperature);
    y = adjusted_;
  }
  bool finite = true;
  const float max = kernels_.max(y.data(), n, &finite);
  if (!finite || max == kMinusInfinity) return -1;
  if (greedy) return static_cast<int32_t>(std::ranges::find(y, max) - y.begin());
  const float u = UnitFloat(Philox4x32(row.seed, {row.position, row.choice, 0, 0})[0]);
  return DrawFrom(row, max, u);
}

// From adjusted_, which holds the values after the division by the temperature.
int32_t Sampler::DrawFrom(const SamplingRow& row, float max, float u) {
  const std::span<float> v = adjusted_;
  const int n = static_cast<int>(v.size());
  if (row.min_p > 0) {
    scratch_.resize(n);
    kernels_.exp_sum(v.data(), n, max, scratch_.data());
    const float least = std::min(row.min_p, 1.0f);
    for (int i = 0; i < n; ++i) {
      if (scratch_[i] < least) v[i] = kMinusInfinity;
    }
  }
  Prefix prefix;
  if (row.top_k > 0 && row.top_k < n) {
    SelectBest(v, row.top_k);
    while (candidates_.back().value == kMinusInfinity) candidates_.pop_back();
    num_sorted_ = candidates_.size();
    band_bottom_ = kMinusInfinity;
    FillWeights(0, max);
    float sum = 0;
    for (const float weight : weights_) sum = sum + weight;
    prefix.total = sum;
  } else {
    prefix.total = kernels_.exp_sum(v.data(), n, max, nullptr);
    candidates_.clear();
    weights_.clear();
    num_sorted_ = 0;
    band_bottom_ = std::numeric_limits<float>::infinity();
  }
  prefix.size = std::numeric_limits<size_t>::max();
  if (row.top_p < 1) {
    const float limit = row.top_p * prefix.total;
    float sum = 0;
    size_t size = 0;
    while ((size < num_sorted_ || Extend(v, max)) && size < num_sorted_) {
      sum = sum + weights_[size++];
      if (sum >= limit) break;
    }
    prefix = {.size = size, .total = sum};
  }
  const float limit = u * prefix.total;
  float sum = 0;
  int32_t last = -1;
  for (size_t i = 0; i < prefix.size && (i < num_sorted_ || Extend(v, max)); ++i) {
    sum = sum + weights_[i];
    if (weights_[i] > 0) last = candidates_[i].token;
    if (sum > limit) break;
  }
  return last;
}

// Sorts more candidates behind the first num_sorted_, with their weights. False when there are no more.
bool Sampler::Extend(std::span<const float> v, float max) {
  if (num_sorted_ == candidates_.size()) {
    if (band_bottom_ == kMinusInfinity) return false;
    // Values in [bottom, band_bottom_), the first band with the maximum; then all that is left above -inf.
    const bool is_first = candidates_.empty();
    const float bottom = is_first ? max - kBandDepth : std::numeric_limits<float>::lowest();
    for (size_t id = 0; id < v.size(); ++id) {
      if (v[id] >= bottom && v[id] < band_bottom_) candidates_.push_back({v[id], static_cast<int32_t>(id)});
    }
    band_bottom_ = is_first ? bottom : kMinusInfinity;
    if (num_sorted_ == candidates_.size()) return false;
  }
  const size_t count = std::min(std::max(kFirstSorted, 3 * num_sorted_), candidates_.size() - num_sorted_);
  const auto begin = candidates_.begin() + static_cast<ptrdiff_t>(num_sorted_);
  const auto end = begin + static_cast<ptrdiff_t>(count);
  if (end != candidates_.end()) std::nth_element(begin, end, candidates_.end(), IsBetter);
  std::sort(begin, end, IsBetter);
  num_sorted_ += count;
  FillWeights(num_sorted_ - count, max);
  return true;
}

// weights_[i] = exp(value - max) for the sorted candidates from `begin` on.
void Sampler::FillWeights(size_t begin, float max) {
  weights_.resize(num_sorted_);
  scratch_.clear();
  for (size_t i = begin; i < num_sorted_; ++i) scratch_.push_back(candidates_[i].value);
  kernels_.exp_sum(scratch_.data(), static_cast<int>(scratch_.size()), max, weights_.data() + begin);
}

// candidates_ = the `count` best of `values`, best first. One pass with a heap whose front is the worst kept.
void Sampler::SelectBest(std::span<const float> values, int count) {
  candidates_.clear();
  for (int32_t id = 0; id < count; ++id) candidates_.push_back({values[id], id});
  std::ranges::make_heap(candidates_, IsBetter);
  float worst = candidates_.front().value;
  for (size_t id = count; id < values.size(); ++id) {
    // An equal value has a higher id than all kept: not better.
    if (!(values[id] > worst)) continue;
    std::ranges::pop_heap(candidates_, IsBetter);
    candidates_.back() = {values[id], static_cast<int32_t>(id)};
    std::ranges::push_heap(candidates_, IsBetter);
    worst = candidates_.front().value;
  }
  std::ranges::sort(candidates_, IsBetter);
}

}  // namespace tessera
