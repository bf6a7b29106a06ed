// One linear on the kernels: its input brought into the form that its scheme wants, then the product, split
// over threads by output panels. Knows the four combinations of scheme and leaf layout, so that mla and moe
// do not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "base/threads.h"
#include "comm/topology.h"
#include "kernels/kernels.h"
#include "model/weights.h"

namespace tessera {

// Work buffers grow, never shrink.
template <typename T>
void Grow(std::vector<T>& values, int64_t size) {
  if (static_cast<int64_t>(values.size()) < size) values.resize(size);
}

// Whether one LinearInput serves both: the form of a row depends on the row alone, not on scales of the
// linear.
inline bool ShareInputs(const Linear& a, const Linear& b) {
  return a.scheme == b.scheme && a.scheme != Scheme::kInt8Static && a.k == b.k &&
         a.num_leaves == b.num_leaves;
}

// Input rows of one linear (or of several of one scheme and width). Grows, never shrinks.
class LinearInput {
 public:
  // Makes room for `num_rows` rows in the form of `linear`. Contents are then undefined.
  void Reshape(const Linear& linear, int num_rows);
  // Quantises or rounds x [linear.k] into a row. Different rows may be set by different threads.
  void Set(int row, const Linear& linear, const float* x, const kernels::Kernels& kernels) {
    SetLeaves(row, {0, num_leaves_}, linear, x, kernels);
  }
  // The same for some leaves of a row, whose values x holds; so may different leaves.
  void SetLeaves(int row, Slice leaves, const Linear& linear, const float* x,
                 const kernels::Kernels& kernels);

  kernels::Int8Rows Int8(int first_row) const;
  kernels::Bf16Rows Bf16(int first_row) const;

 private:
  int64_t stride_ = 0;
  int num_leaves_ = 1;
  std::vector<int8_t> int8_;
  std::vector<float> scales_;
  std::vector<int32_t> sums_;
  std::vector<kernels::Bf16> bf16_;
};

// Output panels [begin, end) of y = x W^T, rounded to bf16. `first_row` is where the map's input row 0 lies.
void ColumnParallel(const Linear& linear, const LinearInput& input, int first_row,
                    const kernels::RowMap& rows, int panel_begin, int panel_end, kernels::Bf16* out,
                    int64_t out_stride, const kernels::Kernels& kernels);
// The same for a row-parallel linear: fixed-point terms are added to `out`. row_weight may be null.
void RowParallel(const Linear& linear, const LinearInput& input, int first_row, const float* row_weight,
                 const kernels::RowMap& rows, int panel_begin, int panel_end, const kernels::FixedRows& out,
                 const kernels::Kernels& kernels);

// How many tasks to cut `units` into (SliceOf is the share of one), given the multiply-accumulates of them
// all: 1 when a thread's share would not pay for waking it (about a microsecond of int8 work).
inline int NumTasks(int units, int64_t macs, const ThreadPool& threads) {
  constexpr int64_t kMacsPerTask = 200'000;
  const int64_t worthwhile = std::max<int64_t>(1, macs / kMacsPerTask);
  return static_cast<int>(std::min<int64_t>({units, worthwhile, int64_t{threads.num_active()} * 4}));
}

}  // namespace tessera
