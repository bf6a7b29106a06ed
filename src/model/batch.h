// What the layers share during one forward pass: where each token stands, which rows have failed, and the
// fixed-point sums that row-parallel linears add to. Internal to model/.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "base/format.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "model/step.h"

namespace tessera {

struct Batch {
  explicit Batch(const GroupStep& group) : step(group) {
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
  const int32_t* BlockIds(const SequenceSlice& slice) const {
    return step.block_ids.data() + slice.first_block;
  }

  const GroupStep& step;
  std::vector<int32_t> position;  // [token], absolute
  std::vector<int32_t> sequence;  // [token], index into step.sequences
};

// The first non-finite value of each row. A row is marked by the one thread that works on it.
// A failed row's residual becomes NaN, so that whoever attends to its cache page fails too.
class RowFailures {
 public:
  explicit RowFailures(int num_rows) : first_(num_rows) {}
  void Mark(int row, int layer, const char* operation) {
    if (first_[row].operation == nullptr) first_[row] = {layer, operation};
  }
  bool failed(int row) const { return first_[row].operation != nullptr; }
  // Layer -1 stands for what comes after the last layer.
  std::string Text(int row) const {
    const auto [layer, operation] = first_[row];
    if (layer < 0) return Format("{} is not finite", operation);
    return Format("layer {}: {} is not finite or out of range", layer, operation);
  }

 private:
  struct First {
    int layer = 0;
    const char* operation = nullptr;
  };
  std::vector<First> first_;
};

// Fixed-point sums of some rows (numerics.md, "Fixed point"), and the largest term of each row and thread.
class FixedSums {
 public:
  void Clear(int num_rows, int width, int num_threads) {
    num_rows_ = num_rows;
    width_ = width;
    num_threads_ = num_threads;
    const size_t size = static_cast<size_t>(num_rows) * width;
    if (sums_.size() < size) sums_.resize(size);
    std::fill_n(sums_.begin(), size, 0);
    max_bits_.assign(static_cast<size_t>(num_rows) * num_threads, 0);
  }
  kernels::FixedRows Rows(int thread) {
    return {
        .sums = sums_.data(), .stride = width_, .max_bits = max_bits_.data() + int64_t{thread} * num_rows_};
  }
  // Adds row `row` to the residual [token][width] of `token`. Marks the token when one of the terms is out of
  // range; a token that has failed, here or before, gets a NaN residual.
  void AddTo(int row, float* residual, int token, int layer, const char* operation,
             const kernels::Kernels& kernels, RowFailures& failures) const {
    float* target = residual + int64_t{token} * width_;
    if (OutOfRange(row)) failures.Mark(token, layer, operation);
    if (failures.failed(token)) {
      std::fill_n(target, width_, __builtin_nanf(""));
    } else {
      kernels.add_fixed(sums_.data() + int64_t{row} * width_, width_, target);
    }
  }

 private:
  bool OutOfRange(int row) const {
    for (int thread = 0; thread < num_threads_; ++thread) {
      if (max_bits_[int64_t{thread} * num_rows_ + row] >= kernels::kMaxTermBits) return true;
    }
    return false;
  }

  int num_rows_ = 0;
  int width_ = 0;
  int num_threads_ = 0;
  std::vector<int64_t> sums_;
  std::vector<uint32_t> max_bits_;
};

}  // namespace tessera
