// Chooses the kernel for a linear by its scheme; the arithmetic is in kernels/.
#include "model/linear.h"

namespace tessera {

void LinearInput::Reshape(const Linear& linear, int num_rows) {
  num_leaves_ = linear.num_leaves;
  const int64_t rows = num_rows;
  if (linear.scheme == Scheme::kBf16) {
    stride_ = int64_t{linear.bf16.leaf_pad()} * num_leaves_;
    Grow(bf16_, rows * stride_);
    return;
  }
  stride_ = int64_t{linear.int8.leaf_pad()} * num_leaves_;
  Grow(int8_, rows * stride_);
  Grow(sums_, rows * num_leaves_);
  if (linear.scheme == Scheme::kInt8Dynamic) Grow(scales_, rows * num_leaves_);
}

void LinearInput::SetLeaves(int row, Slice leaves, const Linear& linear, const float* x,
                            const kernels::Kernels& kernels) {
  const int leaf_k = linear.k / num_leaves_;
  const int count = leaves.size() * leaf_k;
  const int64_t leaf_at = int64_t{row} * num_leaves_ + leaves.begin;
  const int64_t at = leaf_at * (stride_ / num_leaves_);
  switch (linear.scheme) {
    case Scheme::kBf16: {
      const int leaf_pad = linear.bf16.leaf_pad();
      for (int leaf = 0; leaf < leaves.size(); ++leaf) {
        kernels::Bf16* target = bf16_.data() + at + int64_t{leaf} * leaf_pad;
        kernels.to_bf16(x + int64_t{leaf} * leaf_k, leaf_k, target);
        if (leaf_pad > leaf_k) target[leaf_k] = {};
      }
      return;
    }
    case Scheme::kInt8Static: {
      const bool per_channel = linear.inverse_scale.size() > 1;
      const int channel = leaves.begin * leaf_k;
      kernels.quantize_static(x, linear.beta.empty() ? nullptr : linear.beta.data() + channel,
                              linear.inverse_scale.data() + (per_channel ? channel : 0), per_channel,
                              linear.zero_point, count, leaves.size(), int8_.data() + at,
                              sums_.data() + leaf_at);
      return;
    }
    case Scheme::kInt8Dynamic:
      kernels.quantize_dynamic(x, count, leaves.size(), int8_.data() + at, scales_.data() + leaf_at,
                               sums_.data() + leaf_at);
      return;
  }
}

kernels::Int8Rows LinearInput::Int8(int first_row) const {
  const int64_t leaf_at = int64_t{first_row} * num_leaves_;
  return {.data = int8_.data() + first_row * stride_,
          .stride = stride_,
          .scales = scales_.empty() ? nullptr : scales_.data() + leaf_at,
          .sums = sums_.data() + leaf_at};
}

kernels::Bf16Rows LinearInput::Bf16(int first_row) const {
  return {.data = bf16_.data() + first_row * stride_, .stride = stride_};
}

void ColumnParallel(const Linear& linear, const LinearInput& input, int first_row,
                    const kernels::RowMap& rows, int panel_begin, int panel_end, kernels::Bf16* out,
                    int64_t out_stride, const kernels::Kernels& kernels) {
  switch (linear.scheme) {
    case Scheme::kBf16:
      kernels.gemm_bf16(input.Bf16(first_row), linear.bf16, rows, panel_begin, panel_end, out, out_stride);
      return;
    case Scheme::kInt8Static:
      kernels.gemm_int8_static(input.Int8(first_row), linear.int8,
                               {linear.quant_bias.data(), linear.deq_scale.data()}, rows, panel_begin,
                               panel_end, out, out_stride);
      return;
    case Scheme::kInt8Dynamic:
      kernels.gemm_int8_dynamic(input.Int8(first_row), linear.int8, linear.weight_scale.data(), rows,
                                panel_begin, panel_end, out, out_stride);
      return;
  }
}

void RowParallel(const Linear& linear, const LinearInput& input, int first_row, const float* row_weight,
                 const kernels::RowMap& rows, int panel_begin, int panel_end, const kernels::FixedRows& out,
                 const kernels::Kernels& kernels) {
  switch (linear.scheme) {
    case Scheme::kBf16:
      kernels.gemm_bf16_fixed(input.Bf16(first_row), linear.bf16, row_weight, rows, panel_begin, panel_end,
                              out);
      return;
    case Scheme::kInt8Static:
      kernels.gemm_int8_static_fixed(input.Int8(first_row), linear.int8,
                                     {linear.quant_bias.data(), linear.deq_scale.data()}, row_weight, rows,
                                     panel_begin, panel_end, out);
      return;
    case Scheme::kInt8Dynamic:
      kernels.gemm_int8_dynamic_fixed(input.Int8(first_row), linear.int8, linear.weight_scale.data(),
                                      row_weight, rows, panel_begin, panel_end, out);
      return;
  }
}

}  // namespace tessera
