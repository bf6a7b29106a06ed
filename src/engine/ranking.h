// The tokens of one row of logits, best first, as many as somebody asks for: rows are never sorted as a
// whole. It knows the order of numerics.md ("sampling"), not what is done with it; the sampler does that.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/kernels.h"

namespace tessera {

// One thread per object. Ranks values v = y / temperature, by (value descending, id ascending); -inf is not
// ranked. A weight is exp(v - the greatest v).
class Ranking {
 public:
  static constexpr int64_t kAnyCount = std::numeric_limits<int64_t>::max();

  explicit Ranking(const kernels::Kernels& kernels) : kernels_(kernels) {}

  // `y` and `block_maxima` (of Kernels::range of y) are read until the next Begin: they outlive it,
  // unchanged. REQUIRES: every y finite or -inf; temperature > 0; max = (greatest y / temperature) + 0,
  // finite.
  void Begin(std::span<const float> y, std::span<const float> block_maxima, float temperature, float max);
  // Right after Begin: ranks only tokens whose weight is at least `least`, in (0, 1]. Gives the 64-lane sum
  // of their weights over ids.
  float KeepAtLeast(float least);

  // Ranks at least one more token; false when there is none. How many is guessed from what is wanted next:
  // this share (0 to 1) of the weights that are not ranked yet, or this many tokens, whichever is less. A
  // wrong guess costs time only.
  bool Extend(float share, int64_t count);

  // What is ranked so far, in order.
  size_t size() const { return weights_.size(); }
  int32_t token(size_t place) const { return TokenOf(candidates_[place]); }
  float weight(size_t place) const { return weights_[place]; }

 private:
  // Ascending keys are the order: value descending, id ascending.
  using Key = uint64_t;
  static Key KeyOf(float value, int32_t token);
  static float ValueOf(Key key);
  static int32_t TokenOf(Key key) { return static_cast<int32_t>(key & 0xffffffff); }

  float LeastDividend(float v) const;
  float FirstBottom(int64_t count);
  float NextBottom(float share, int64_t count);
  void DrawSample();
  void TakeBand(float bottom);
  void SplitBand(size_t begin);
  void SortBuckets();

  const kernels::Kernels& kernels_;
  std::span<const float> y_;
  std::span<const float> block_maxima_;
  float temperature_ = 1;
  float max_ = 0;
  float band_bottom_ = 0;  // in y; what lies below was not collected yet
  bool is_exhausted_ = false;
  std::vector<int32_t> ids_;
  std::vector<Key> candidates_;  // ranked ones, then the rest of the band in its buckets
  std::vector<Key> unsplit_;
  std::vector<uint32_t> bucket_ends_;  // of the band, relative to band_begin_
  std::vector<uint32_t> bucket_of_;
  size_t band_begin_ = 0;
  size_t next_bucket_ = 0;
  std::vector<float> values_;  // scratch
  std::vector<float> weights_;
  std::vector<float> sample_;  // values of v, the greatest first
  std::vector<float> sample_weights_;
  size_t sample_place_ = 0;
};

}  // namespace tessera
