// What the layers share during one forward pass: where each token stands, which rows have failed, and the
// fixed-point sums that row-parallel linears add to and ranks exchange. Internal to model/.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/check.h"
#include "base/format.h"
#include "base/threads.h"
#include "comm/topology.h"
#include "kernels/kernels.h"
#include "model/step.h"

namespace tessera {

struct Batch {
  Batch(const Step& whole, const Topology& topology) : step(whole.groups[topology.dp_rank()]) {
    for (const GroupStep& group : whole.groups) group_tokens.push_back(static_cast<int>(group.tokens.size()));
    const GroupStep& group = step;
    position.reserve(group.tokens.size());
    sequence.reserve(group.tokens.size());
    for (size_t s = 0; s < group.sequences.size(); ++s) {
      const SequenceSlice& slice = group.sequences[s];
      for (int32_t i = 0; i < slice.num_tokens; ++i) {
        position.push_back(slice.num_computed + i);
        sequence.push_back(static_cast<int32_t>(s));
      }
    }
  }
  int num_tokens() const { return static_cast<int>(step.tokens.size()); }
  bool expanded(int token) const { return position[token] < step.sequences[sequence[token]].num_expanded; }
  const int32_t* BlockIds(const SequenceSlice& slice) const {
    return step.block_ids.data() + slice.first_block;
  }

  const GroupStep& step;          // of this rank's group
  std::vector<int> group_tokens;  // [group]: how many tokens each group has
  std::vector<int32_t> position;  // [token], absolute
  std::vector<int32_t> sequence;  // [token], index into step.sequences
};

// What is checked in a layer, in the order of the computation; kFinalNorm comes after the last layer.
enum class Operation : uint8_t {
  kInputNorm,
  kKvNorm,
  kQueryNorm,
  kAttentionScore,
  kOutputProjection,
  kPostAttentionNorm,
  kDownProjection,
  kFinalNorm,
};

// The first non-finite value of each row. A row is marked by the one thread that works on it.
// A failed row's residual becomes NaN, so that whoever attends to its cache page fails too.
class RowFailures {
 public:
  explicit RowFailures(int num_rows) : first_(num_rows) {}
  void Mark(int row, int layer, Operation operation) {
    if (first_[row] == 0) first_[row] = (layer << 4 | static_cast<int>(operation)) + 1;
  }
  bool failed(int row) const { return first_[row] != 0; }
  // 0, or what another rank can Adopt.
  int32_t Code(int row) const { return first_[row]; }
  void Adopt(int row, int32_t code) {
    if (first_[row] == 0) first_[row] = code;
  }
  std::string Text(int row) const {
    const int layer = (first_[row] - 1) >> 4;
    switch (static_cast<Operation>((first_[row] - 1) & 15)) {
      case Operation::kInputNorm:
        return Format("layer {}: input_layernorm is not finite or out of range", layer);
      case Operation::kKvNorm:
        return Format("layer {}: kv_a_layernorm is not finite or out of range", layer);
      case Operation::kQueryNorm:
        return Format("layer {}: q_a_layernorm is not finite or out of range", layer);
      case Operation::kAttentionScore:
        return Format("layer {}: attention score is not finite or out of range", layer);
      case Operation::kOutputProjection:
        return Format("layer {}: o_proj is not finite or out of range", layer);
      case Operation::kPostAttentionNorm:
        return Format("layer {}: post_attention_layernorm is not finite or out of range", layer);
      case Operation::kDownProjection:
        return Format("layer {}: down_proj is not finite or out of range", layer);
      case Operation::kFinalNorm:
        break;
    }
    return "the final norm is not finite";
  }

 private:
  std::vector<int32_t> first_;
};

// Fixed-point sums of some rows (numerics.md, "Fixed point"), and which of them met a term out of range.
// A row is `width` sums, then kFlags counters that say on how many ranks something of it failed: they are
// added with the sums when ranks exchange them, so that all see the same failures.
class FixedSums {
 public:
  static constexpr int kFlags = 8;  // three are used; rows stay aligned

  void Clear(int num_rows, int width, int num_threads) {
    num_rows_ = num_rows;
    width_ = width;
    num_threads_ = num_threads;
    const auto size = static_cast<size_t>(num_rows * stride());
    if (sums_.size() < size) sums_.resize(size);
    std::fill_n(sums_.begin(), size, 0);
    out_of_range_.assign(static_cast<size_t>(num_rows) * num_threads, 0);
  }
  int64_t stride() const { return width_ + kFlags; }
  kernels::FixedRows Rows(int thread) {
    return {.sums = sums_.data(),
            .stride = stride(),
            .out_of_range = out_of_range_.data() + int64_t{thread} * num_rows_};
  }
  // Rows [begin, end) as one array, flags included.
  std::span<int64_t> Values(int begin, int end) {
    return {sums_.data() + begin * stride(), static_cast<size_t>((end - begin) * stride())};
  }

  // Before an exchange: counts `operation` as failed in `row` on this rank.
  void Flag(int row, Operation operation) { sums_[row * stride() + width_ + FlagOf(operation)] += 1; }
  // The same for rows with a term out of range, in all rows.
  void FlagOutOfRange(Operation operation) {
    for (int row = 0; row < num_rows_; ++row) {
      if (OutOfRange(row)) Flag(row, operation);
    }
  }
  // Adds `values` (a row of another rank) to a row, flags included.
  void AddRow(int row, const int64_t* values) {
    int64_t* sums = sums_.data() + row * stride();
    for (int64_t i = 0; i < stride(); ++i) sums[i] += values[i];
  }
  // After it: adds row `row` to the residual [token][width] of `token`. Marks the token where flags are up; a
  // token that has failed, here or before, gets a NaN residual.
  void AddTo(int row, float* residual, int token, int layer, const kernels::Kernels& kernels,
             RowFailures& failures) const {
    const int64_t* sums = sums_.data() + row * stride();
    float* target = residual + int64_t{token} * width_;
    for (const Operation operation :
         {Operation::kAttentionScore, Operation::kOutputProjection, Operation::kDownProjection}) {
      if (sums[width_ + FlagOf(operation)] != 0) failures.Mark(token, layer, operation);
    }
    if (failures.failed(token)) {
      std::fill_n(target, width_, __builtin_nanf(""));
    } else {
      kernels.add_fixed(sums, width_, target);
    }
  }

 private:
  static int FlagOf(Operation operation) {
    switch (operation) {
      case Operation::kAttentionScore:
        return 0;
      case Operation::kOutputProjection:
        return 1;
      case Operation::kDownProjection:
        return 2;
      default:
        CHECK(!"an operation whose failures are exchanged");
    }
    return 0;
  }
  bool OutOfRange(int row) const {
    for (int thread = 0; thread < num_threads_; ++thread) {
      if (out_of_range_[int64_t{thread} * num_rows_ + row] != 0) return true;
    }
    return false;
  }

  int num_rows_ = 0;
  int width_ = 0;
  int num_threads_ = 0;
  std::vector<int64_t> sums_;
  std::vector<uint8_t> out_of_range_;  // [thread][row]
};

}  // namespace tessera
