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
// A row is read as few times as the rule allows: once for its range, once for the sum over all ids where
// there is one, and for the blocks that can hold what Ranking is asked for. A sum over all ids is first taken
// roughly: both ends of its error mostly give the same token, and where they do not, it is taken as the rule
// says. Masks and penalties are applied in place.
#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/random.h"

namespace tessera {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLeftOut = 0x1p-8f;  // weights that a sum near the total may leave out; the best one is 1
constexpr size_t kAll = std::numeric_limits<size_t>::max();

// Ids are foreign here: those beyond the vocabulary are passed over.
float* At(std::span<float> values, int32_t id) {
  return static_cast<uint32_t>(id) < values.size() ? &values[id] : nullptr;
}

bool HasAdjustment(const SamplingRow& row) {
  return row.counts_begin < row.counts_end || row.bias_begin < row.bias_end ||
         row.forbidden_begin < row.forbidden_end || row.allowed_begin >= 0 || row.mask_begin >= 0;
}

void KeepAllowed(std::span<const int32_t> allowed, std::span<float> y, std::vector<float>& kept) {
  kept.clear();
  for (const int32_t id : allowed) {
    const float* value = At(y, id);
    kept.push_back(value == nullptr ? -kInfinity : *value);
  }
  std::ranges::fill(y, -kInfinity);
  for (size_t i = 0; i < allowed.size(); ++i) {
    if (float* value = At(y, allowed[i])) *value = kept[i];
  }
}

void KeepBits(std::span<const uint32_t> words, std::span<float> y) {
  for (size_t id = 0; id < y.size(); ++id) {
    if ((words[id / 32] >> (id % 32) & 1) == 0) y[id] = -kInfinity;
  }
}

float Penalize(const SamplingRow& row, const TokenCount& count, float y) {
  if (row.repetition_penalty != 1 && (count.in_prompt > 0 || count.in_output > 0)) {
    y = y > 0 ? y / row.repetition_penalty : y * row.repetition_penalty;
  }
  if (count.in_output > 0) {
    const float by_count = row.frequency_penalty * static_cast<float>(count.in_output);
    y = y - by_count;
    y = y - row.presence_penalty;
  }
  return y;
}

// What near_exp_sum requires.
bool MayBeNear(int n, float temperature, float max) {
  return n <= 1 << 20 && temperature >= 0x1p-10f && std::abs(max) <= 1024;
}

bool IsShort(float sum, float limit, bool beyond) {
  return beyond ? !(sum > limit) : !(sum >= limit);
}

}  // namespace

bool Sampler::Sample(const GroupStep& step, const LogitRow& row, std::span<float> logits, RowOutput& output) {
  output = {};
  const std::span<float> x = logits.first(std::min<size_t>(logits.size(), num_tokens_));
  if (x.empty()) return false;
  const int n = static_cast<int>(x.size());
  maxima_.resize(kernels::NumMaxBlocks(n));
  const kernels::RowRange range = kernels_.range(x.data(), n, maxima_.data());
  if (!range.finite || range.min == -kInfinity) return false;
  raw_.clear();
  RowOutput answer;
  Logprobs logprobs;
  if (row.num_logprobs >= 0) logprobs = AddTop(x, range.max, row.num_logprobs, answer);
  answer.token = row.target;
  if (row.sampling >= 0) {
    answer.token = Draw(step, step.sampling[row.sampling], x, range.max, logprobs.sum);
    if (answer.token < 0) return false;
  }
  if (row.num_logprobs >= 0 && answer.token >= 0 && answer.token < n)
    answer.logprob = (RawValue(x, answer.token) - logprobs.max) - logprobs.log_sum;
  output = std::move(answer);
  return true;
}

Sampler::Logprobs Sampler::AddTop(std::span<const float> x, float max, int num_logprobs, RowOutput& output) {
  const int n = static_cast<int>(x.size());
  const float sum = kernels_.exp_sum(x.data(), n, 1, max, nullptr);
  const float log_sum = kernels_.log(sum);
  const auto wanted = static_cast<size_t>(std::min(num_logprobs, n));
  if (wanted > 0) {
    ranking_.Begin(x, maxima_, 1, max);
    while (ranking_.size() < wanted && ranking_.Extend(1, static_cast<int64_t>(wanted - ranking_.size()))) {
    }
  }
  for (size_t i = 0; i < wanted; ++i) {
    const int32_t token = ranking_.token(i);
    output.top.push_back({.token = token, .logprob = (x[token] - max) - log_sum});
  }
  return {.max = max, .sum = sum, .log_sum = log_sum};
}

// Applies masks, bias and penalties in place.
void Sampler::Adjust(const GroupStep& step, const SamplingRow& row, std::span<float> y) {
  if (row.allowed_begin >= 0) {
    const std::span<const int32_t> ids = step.token_lists;
    KeepAllowed(ids.subspan(row.allowed_begin, row.allowed_end - row.allowed_begin), y, kept_);
  }
  for (int32_t i = row.forbidden_begin; i < row.forbidden_end; ++i) {
    if (float* value = At(y, step.token_lists[i])) *value = -kInfinity;
  }
  const auto change = [&](int32_t id, const auto& changed) {
    float* value = At(y, id);
    if (value == nullptr) return;
    raw_.push_back({id, *value});
    *value = changed(*value);
  };
  for (int32_t i = row.bias_begin; i < row.bias_end; ++i)
    change(step.biases[i].token, [&](float value) { return value + step.biases[i].bias; });
  if (row.mask_begin >= 0) KeepBits(std::span(step.masks).subspan(row.mask_begin), y);
  for (int32_t i = row.counts_begin; i < row.counts_end; ++i)
    change(step.counts[i].token, [&](float value) { return Penalize(row, step.counts[i], value); });
}

// The logit of a token that was drawn, before Adjust. (Masked ones are never drawn.)
float Sampler::RawValue(std::span<const float> y, int32_t token) const {
  const auto changed = std::ranges::find(raw_, token, &RawLogit::token);
  return changed == raw_.end() ? y[token] : changed->value;
}

// The token drawn, or -1 if the row fails. `x_sum`: sum of exp(x - x_max), or 0 where it is not known.
int32_t Sampler::Draw(const GroupStep& step, const SamplingRow& row, std::span<float> x, float x_max,
                      float x_sum) {
  const int n = static_cast<int>(x.size());
  float y_max = x_max;
  if (HasAdjustment(row)) {
    Adjust(step, row, x);
    const kernels::RowRange range = kernels_.range(x.data(), n, maxima_.data());
    if (!range.finite) return -1;
    y_max = range.max;
    x_sum = 0;
  }
  if (y_max == -kInfinity) return -1;
  if (row.temperature == 0) {
    const auto block = std::ranges::find(maxima_, y_max) - maxima_.begin();
    return static_cast<int32_t>(std::find(x.begin() + block * kernels::kMaxBlock, x.end(), y_max) -
                                x.begin());
  }
  // The greatest quotient is that of the greatest value: rounding keeps the order.
  const float max = y_max / row.temperature + 0.0f;
  if (!(max > -kInfinity && max < kInfinity)) return -1;
  ranking_.Begin(x, maxima_, row.temperature, max);
  sums_.clear();
  const auto sum_weights = [&] { return kernels_.exp_sum(x.data(), n, row.temperature, max, nullptr); };
  const bool has_top_k = row.top_k > 0 && row.top_k < n;
  float total = 0;
  bool is_near = false;  // `total` is only near the one of the rule
  size_t most = kAll;
  if (row.min_p > 0) total = ranking_.KeepAtLeast(std::min(row.min_p, 1.0f));
  if (has_top_k) {
    most = Prefix(kInfinity, 0, false, static_cast<size_t>(row.top_k));
    total = sums_[most - 1];
  } else if (!(row.min_p > 0)) {
    const bool is_known = x_sum > 0 && row.temperature == 1;
    is_near = !is_known && MayBeNear(n, row.temperature, max);
    total = is_known ? x_sum : is_near ? NearTotal(x, row.temperature, max) : sum_weights();
  }
  const auto prefix_of_share = [&](float share, bool beyond) {
    if (is_near) {
      const size_t size = Prefix(share * (total * (1 - kernels::kNearExpSum)), total, beyond, most);
      const float greatest = share * (total * (1 + kernels::kNearExpSum) + kLeftOut);
      if (!IsShort(sums_[size - 1], greatest, beyond)) return size;
      total = sum_weights();
      is_near = false;
    }
    return Prefix(share * total, total, beyond, most);
  };
  if (row.top_p < 1) {
    most = prefix_of_share(row.top_p, false);
    total = sums_[most - 1];
    is_near = false;
  }
  const float u = UnitFloat(Philox4x32(row.seed, {row.position, row.choice, 0, 0})[0]);
  return ranking_.token(prefix_of_share(u, true) - 1);
}

// The sum of all weights, no more than kNearExpSum of it less, and no more than that and kLeftOut greater,
// than what this gives: blocks that cannot matter are not read.
float Sampler::NearTotal(std::span<const float> y, float temperature, float max) const {
  const float depth = kernels_.log(static_cast<float>(y.size()) / kLeftOut);
  const float bottom = (max - depth) * temperature;
  const auto matters = [&](size_t block) { return block < maxima_.size() && maxima_[block] >= bottom; };
  float total = 0;
  for (size_t block = 0; block < maxima_.size(); ++block) {
    const size_t begin = block * kernels::kMaxBlock;
    while (matters(block)) ++block;
    const size_t end = std::min(block * kernels::kMaxBlock, y.size());
    if (end > begin)
      total += kernels_.near_exp_sum(&y[begin], static_cast<int>(end - begin), temperature, max);
  }
  return total;
}

// The size of the shortest prefix of the ranked tokens, of at least 1 and at most `most`, whose weights sum
// to `limit`, or beyond it; all of them where none does. Tokens without weight change no sum: they count as
// none.
size_t Sampler::Prefix(float limit, float total, bool beyond, size_t most) {
  const auto is_short = [&](float sum) { return IsShort(sum, limit, beyond); };
  const auto known = std::ranges::partition_point(sums_, is_short);
  if (known != sums_.end()) return std::min<size_t>(known - sums_.begin() + 1, most);
  float sum = sums_.empty() ? 0 : sums_.back();
  while (sums_.size() < most && (sums_.empty() || is_short(sum))) {
    const size_t place = sums_.size();
    const int64_t count = most == kAll ? Ranking::kAnyCount : static_cast<int64_t>(most - place);
    const float share = total > sum ? (limit - sum) / (total - sum) : 1;
    if (place == ranking_.size() && !ranking_.Extend(share, count)) break;
    if (ranking_.weight(place) == 0) break;
    sum = sum + ranking_.weight(place);
    sums_.push_back(sum);
  }
  return sums_.size();
}

}  // namespace tessera
