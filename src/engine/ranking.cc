// Candidates are collected in bands of falling value, a band is split into buckets of falling value, and
// buckets are sorted one by one when their turn comes. Bands and buckets are disjoint intervals of v, so that
// their concatenation is the sorted row; equal values always lie in the same bucket.
//
// How deep a band reaches is a guess, which costs time only when it is wrong. The first takes what is likely
// in a peaked row, or begins at a value that half of all groups of four blocks surpass: enough for most draws
// of a trained model. Where it is not enough the row is flat, and a sample of it says where the mass lies.
#include "engine/ranking.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <numeric>

namespace tessera {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr size_t kSampleSize = 512;
constexpr size_t kSampleStep = 8;   // sampled values by which a further band is deeper than guessed
constexpr size_t kSmallRow = 2048;  // a row so short is one band
constexpr size_t kGroup = 4;        // blocks whose maximum stands for them in the first guess
constexpr float kPeakDepth = 8;     // in v: what lies lower weighs less than 1 / 2,980 of the best
constexpr size_t kBucketSize = 8;   // candidates per bucket, about
constexpr size_t kMaxBuckets = 16384;
constexpr size_t kSortedAtOnce = 64;

// The next float towards +inf (up) or -inf; x is not zero, and far from the ends.
float Neighbour(float x, bool up) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) + ((x > 0) == up ? 1 : -1));
}

}  // namespace

Ranking::Key Ranking::KeyOf(float value, int32_t token) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);  // -0 equals +0
  const uint32_t order = (bits >> 31) != 0 ? bits : bits ^ 0x7fffffff;
  return Key{order} << 32 | static_cast<uint32_t>(token);
}

float Ranking::ValueOf(Key key) {
  const auto order = static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>((order >> 31) != 0 ? order : order ^ 0x7fffffff);
}

void Ranking::Begin(std::span<const float> y, std::span<const float> block_maxima, float temperature,
                    float max) {
  y_ = y;
  block_maxima_ = block_maxima;
  temperature_ = temperature;
  max_ = max;
  band_bottom_ = std::numeric_limits<float>::infinity();
  is_exhausted_ = false;
  candidates_.clear();
  bucket_ends_.clear();
  next_bucket_ = 0;
  weights_.clear();
  sample_.clear();
  sample_place_ = 0;
}

float Ranking::KeepAtLeast(float least) {
  // exp is right within an ulp, v - max within half of one of max: what lies below weighs less than `least`.
  const float depth = kernels_.log(1 / least);
  const float bottom = max_ - (depth + 1e-3f * (1 + depth)) - std::abs(max_) * 0x1p-20f;
  TakeBand(std::max(bottom, kLowest));
  is_exhausted_ = true;
  const size_t size = candidates_.size();
  values_.resize(size);
  for (size_t i = 0; i < size; ++i) values_[i] = ValueOf(candidates_[i]);
  sample_weights_.resize(size);
  kernels_.exp_sum(values_.data(), static_cast<int>(size), 1, max_, sample_weights_.data());
  float lanes[64] = {};
  size_t kept = 0;
  for (size_t i = 0; i < size; ++i) {
    if (sample_weights_[i] < least) continue;
    float& lane = lanes[TokenOf(candidates_[i]) % 64];
    lane = lane + sample_weights_[i];
    candidates_[kept++] = candidates_[i];
  }
  candidates_.resize(kept);
  for (int apart = 32; apart > 0; apart /= 2) {
    for (int lane = 0; lane < apart; ++lane) lanes[lane] = lanes[lane] + lanes[lane + apart];
  }
  SplitBand(0);
  return lanes[0];
}

bool Ranking::Extend(float share, int64_t count) {
  while (next_bucket_ == bucket_ends_.size()) {
    if (is_exhausted_) return false;
    const size_t begin = candidates_.size();
    TakeBand(begin == 0 && sample_.empty() ? FirstBottom(count) : NextBottom(share, count));
    SplitBand(begin);
  }
  SortBuckets();
  return true;
}

// The least y with y / temperature >= v, or one that every finite y reaches.
float Ranking::LeastDividend(float v) const {
  if (temperature_ == 1) return v;
  float y = v * temperature_;
  if (!(std::abs(v) > 1e-6f && std::abs(y) > 1e-20f && std::abs(y) < 1e30f)) return kLowest;
  // The product is within some ulps of it.
  for (int step = 0; step < 16; ++step) {
    if (y / temperature_ < v) {
      y = Neighbour(y, true);
      continue;
    }
    const float below = Neighbour(y, false);
    if (below / temperature_ < v) return y;
    y = below;
  }
  return kLowest;
}

// In v. Where no number of tokens is wanted, what a peaked row has; else, and in a flat one, at least
// min(count, half of the groups of blocks) tokens lie there or above.
float Ranking::FirstBottom(int64_t count) {
  if (y_.size() <= kSmallRow) return kLowest;
  values_.clear();
  for (size_t begin = 0; begin < block_maxima_.size(); begin += kGroup) {
    const size_t size = std::min(kGroup, block_maxima_.size() - begin);
    values_.push_back(std::ranges::max(block_maxima_.subspan(begin, size)));
  }
  const float peak_bottom = max_ - kPeakDepth;
  const auto in_peak =
      std::ranges::count_if(values_, [&](float y) { return y >= peak_bottom * temperature_; });
  const int64_t half = static_cast<int64_t>(values_.size()) / 2;
  if (count == kAnyCount && in_peak < half) return peak_bottom;
  const int64_t wanted = std::min(count, half);
  const auto place = std::max<int64_t>(wanted, 1) - 1;
  std::nth_element(values_.begin(), values_.begin() + place, values_.end(), std::greater());
  return values_[place] / temperature_;
}

float Ranking::NextBottom(float share, int64_t count) {
  if (y_.size() <= kSmallRow) return kLowest;
  if (sample_.empty()) DrawSample();
  const float last = band_bottom_ / temperature_;
  while (sample_place_ < sample_.size() && sample_[sample_place_] >= last) ++sample_place_;
  const float mass = std::accumulate(sample_weights_.begin() + sample_place_, sample_weights_.end(), 0.0f);
  const float wanted = share * mass;
  const float stands_for = static_cast<float>(y_.size()) / static_cast<float>(sample_.size());
  const auto most = static_cast<size_t>(std::min(static_cast<float>(count) / stands_for, 1e6f));
  const size_t begin = sample_place_;
  float sum = 0;
  while (sample_place_ < sample_.size() && sum < wanted && sample_place_ - begin < most)
    sum += sample_weights_[sample_place_++];
  sample_place_ += kSampleStep;  // guess deep rather than shallow
  return sample_place_ < sample_.size() ? sample_[sample_place_] : kLowest;
}

void Ranking::DrawSample() {
  const size_t size = std::min(kSampleSize, y_.size());
  sample_.resize(size);
  sample_weights_.resize(size);
  for (size_t i = 0; i < size; ++i) sample_[i] = y_[i * y_.size() / size] / temperature_;
  std::ranges::sort(sample_, std::greater());
  kernels_.exp_sum(sample_.data(), static_cast<int>(size), 1, max_, sample_weights_.data());
}

// Appends all candidates from `bottom` (in v) up to the last band, by ascending id.
void Ranking::TakeBand(float bottom) {
  const float low = std::max(bottom == kLowest ? kLowest : LeastDividend(bottom), kLowest);
  ids_.resize(y_.size() + 16);
  int count = 0;
  for (size_t block = 0; block < block_maxima_.size(); ++block) {
    if (block_maxima_[block] < low) continue;
    const size_t begin = block * kernels::kMaxBlock;
    const size_t size = std::min<size_t>(kernels::kMaxBlock, y_.size() - begin);
    count += kernels_.select(y_.data() + begin, static_cast<int>(size), low, band_bottom_,
                             static_cast<int32_t>(begin), ids_.data() + count);
  }
  const size_t size = candidates_.size();
  candidates_.resize(size + count);
  size_t end = size;
  for (int i = 0; i < count; ++i) {
    const float value = y_[ids_[i]] / temperature_;
    candidates_[end] = KeyOf(value, ids_[i]);
    end += static_cast<size_t>(value >= kLowest);
  }
  candidates_.resize(end);
  band_bottom_ = low;
  is_exhausted_ = low == kLowest;
}

// Candidates from `begin` on become buckets of falling value, each by ascending id.
void Ranking::SplitBand(size_t begin) {
  band_begin_ = begin;
  next_bucket_ = 0;
  bucket_ends_.clear();
  const size_t size = candidates_.size() - begin;
  if (size == 0) return;
  const std::span<Key> band = std::span(candidates_).subspan(begin);
  const auto [best, worst] = std::ranges::minmax(band);
  const size_t num_buckets = std::min(std::bit_ceil(size / kBucketSize + 1), kMaxBuckets);
  const float top = ValueOf(best);
  const float scale = static_cast<float>(num_buckets) / (top - ValueOf(worst));
  if (size <= kSortedAtOnce || !(scale > 0 && scale < 1e30f)) {
    bucket_ends_.push_back(static_cast<uint32_t>(size));
    return;
  }
  bucket_ends_.assign(num_buckets + 1, 0);
  bucket_of_.resize(size);
  for (size_t i = 0; i < size; ++i) {
    const auto bucket = static_cast<int32_t>((top - ValueOf(band[i])) * scale);
    bucket_of_[i] = std::min<uint32_t>(bucket, static_cast<uint32_t>(num_buckets - 1));
    ++bucket_ends_[bucket_of_[i] + 1];
  }
  for (size_t i = 1; i <= num_buckets; ++i) bucket_ends_[i] += bucket_ends_[i - 1];
  // Here bucket_ends_[i] is where bucket i begins; each placement moves it, in the end to where i ends.
  unsplit_.assign(band.begin(), band.end());
  for (size_t i = 0; i < size; ++i) band[bucket_ends_[bucket_of_[i]]++] = unsplit_[i];
  bucket_ends_.pop_back();
}

void Ranking::SortBuckets() {
  const size_t begin = weights_.size();
  size_t end = begin;
  while (next_bucket_ < bucket_ends_.size() && end - begin < kSortedAtOnce) {
    const auto first = candidates_.begin() + static_cast<ptrdiff_t>(end);
    end = band_begin_ + bucket_ends_[next_bucket_++];
    const auto last = candidates_.begin() + static_cast<ptrdiff_t>(end);
    // Equal values lie in order already, however many there are.
    if (!std::is_sorted(first, last)) std::sort(first, last);
  }
  values_.resize(end - begin);
  for (size_t i = begin; i < end; ++i) values_[i - begin] = ValueOf(candidates_[i]);
  weights_.resize(end);
  kernels_.exp_sum(values_.data(), static_cast<int>(end - begin), 1, max_, weights_.data() + begin);
}

}  // namespace tessera
