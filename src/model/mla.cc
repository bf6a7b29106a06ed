// The attention half of a layer in named stages; each is one loop over threads.
#include "model/mla.h"

namespace tessera {
namespace {

// Tokens whose absorbed queries, or whose fixed-point sums, are held at a time: 38 and 15 MB for R1.
constexpr int kTokenBlock = 256;

// Consecutive tokens of one form, as many as are worked on at a time. In the expanded form they are of one
// sequence.
struct FormRun {
  bool expanded;
  int count;
};

FormRun NextRun(const Batch& batch, int first) {
  FormRun run = {.expanded = batch.expanded(first), .count = 1};
  const int most = run.expanded ? ExpandedAttention::kMostTokens : kTokenBlock;
  while (run.count < most && first + run.count < batch.num_tokens()) {
    const int next = first + run.count;
    if (batch.expanded(next) != run.expanded) break;
    if (run.expanded && batch.sequence[next] != batch.sequence[first]) break;
    ++run.count;
  }
  return run;
}

}  // namespace

Mla::Mla(const ModelConfig& config, const Peers& peers, const RotaryTables& rotary,
         const kernels::Kernels& kernels, ThreadPool& threads)
    : config_(config),
      peers_(peers),
      heads_(peers.topology.Heads(config.num_heads).size()),
      rotary_(rotary),
      kernels_(kernels),
      threads_(threads),
      scratch_width_(2 * std::max({config.hidden_size, config.q_lora_rank, config.kv_lora_rank,
                                   heads_ * config.v_head_dim})),
      absorbed_(config, heads_, rotary.softmax_scale, kernels, threads),
      expanded_(config, heads_, rotary.softmax_scale, kernels, threads),
      scratch_(scratch_width_ * threads.num_threads()) {}

Status Mla::Run(int layer, const LayerWeights& weights, const Batch& batch, bool scatter, KvCache& cache,
                float* residual, RowFailures& failures) {
  ProjectInputs(layer, weights, batch.num_tokens(), residual, failures);
  WriteCache(layer, weights, batch, cache, failures);
  for (int first = 0; first < batch.num_tokens();) {
    const auto [expanded, count] = NextRun(batch, first);
    ProjectQueries(weights, first, count);
    const std::vector<int> bad_scores = expanded ? AttendExpanded(layer, weights, batch, cache, first, count)
                                                 : AttendAbsorbed(layer, weights, batch, cache, first, count);
    for (const int t : bad_scores) failures.Mark(first + t, layer, Operation::kAttentionScore);
    for (int begin = 0; begin < count; begin += kTokenBlock) {
      const Slice tokens = {begin, std::min(begin + kTokenBlock, count)};
      ProjectOutputs(weights, tokens, bad_scores);
      RETURN_IF_ERROR(AddOutputs(layer, batch, scatter, first + begin, tokens.size(), residual, failures));
    }
    first += count;
  }
  return {};
}

// q_a and kv_a of the normalised residual.
void Mla::ProjectInputs(int layer, const LayerWeights& weights, int num_tokens, const float* residual,
                        RowFailures& failures) {
  const int hidden = config_.hidden_size;
  q_a_input_.Reshape(weights.q_a, num_tokens);
  kv_a_input_.Reshape(weights.kv_a, num_tokens);
  const int row_tasks = NumTasks(num_tokens, int64_t{num_tokens} * hidden * 16, threads_);
  threads_.ParallelFor(row_tasks, [&](int task, int thread) {
    const auto [begin, end] = SliceOf(num_tokens, row_tasks, task);
    float* normed = Scratch(thread);
    for (int t = begin; t < end; ++t) {
      if (!kernels_.rms_norm(residual + int64_t{t} * hidden, weights.input_norm.data(), hidden,
                             config_.rms_norm_eps, normed)) {
        failures.Mark(t, layer, Operation::kInputNorm);
      }
      q_a_input_.Set(t, weights.q_a, normed, kernels_);
      kv_a_input_.Set(t, weights.kv_a, normed, kernels_);
    }
  });

  Grow(q_a_, int64_t{num_tokens} * weights.q_a.num_outputs);
  Grow(kv_a_, int64_t{num_tokens} * weights.kv_a.num_outputs);
  const int q_panels = weights.q_a.num_panels();
  const int panels = q_panels + weights.kv_a.num_panels();
  const int64_t macs = int64_t{num_tokens} * hidden * (weights.q_a.num_outputs + weights.kv_a.num_outputs);
  const int tasks = NumTasks(panels, macs, threads_);
  const kernels::RowMap rows{.count = num_tokens};
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(panels, tasks, task);
    if (begin < q_panels) {
      ColumnParallel(weights.q_a, q_a_input_, 0, rows, begin, std::min(end, q_panels), q_a_.data(),
                     weights.q_a.num_outputs, kernels_);
    }
    if (end > q_panels) {
      ColumnParallel(weights.kv_a, kv_a_input_, 0, rows, std::max(begin, q_panels) - q_panels, end - q_panels,
                     kv_a_.data(), weights.kv_a.num_outputs, kernels_);
    }
  });
}

// The latent and the rotated key of every token into its cache row; the input of q_b.
void Mla::WriteCache(int layer, const LayerWeights& weights, const Batch& batch, KvCache& cache,
                     RowFailures& failures) {
  const int num_tokens = batch.num_tokens();
  const int rank = config_.q_lora_rank;
  const int latent = config_.kv_lora_rank;
  const int rope = config_.qk_rope_head_dim;
  q_b_input_.Reshape(weights.q_b, num_tokens);
  const int tasks = NumTasks(num_tokens, int64_t{num_tokens} * (rank + latent) * 16, threads_);
  threads_.ParallelFor(tasks, [&](int task, int thread) {
    const auto [begin, end] = SliceOf(num_tokens, tasks, task);
    float* wide = Scratch(thread);
    float* normed = wide + scratch_width_ / 2;
    for (int t = begin; t < end; ++t) {
      const SequenceSlice& slice = batch.step.sequences[batch.sequence[t]];
      const int position = batch.position[t];
      const int32_t block = batch.BlockIds(slice)[position / cache.block_size()];
      kernels::Bf16* row = cache.Row(layer, block, position % cache.block_size());
      const kernels::Bf16* kv = kv_a_.data() + int64_t{t} * weights.kv_a.num_outputs;
      kernels_.to_float(kv, latent, wide);
      if (!kernels_.rms_norm(wide, weights.kv_a_norm.data(), latent, config_.rms_norm_eps, normed)) {
        failures.Mark(t, layer, Operation::kKvNorm);
      }
      kernels_.to_bf16(normed, latent, row);
      kernels_.rope(kv + latent, rotary_.CosRow(position), rotary_.SinRow(position), rope, row + latent);
      // Quantised inputs hide NaN: the page says it instead, to whoever shares it.
      if (failures.failed(t)) std::fill_n(row, latent + rope, kernels::ToBf16(__builtin_nanf("")));

      kernels_.to_float(q_a_.data() + int64_t{t} * rank, rank, wide);
      if (!kernels_.rms_norm(wide, weights.q_a_norm.data(), rank, config_.rms_norm_eps, normed)) {
        failures.Mark(t, layer, Operation::kQueryNorm);
      }
      q_b_input_.Set(t, weights.q_b, normed, kernels_);
    }
  });
}

void Mla::ProjectQueries(const LayerWeights& weights, int first, int count) {
  const int64_t q_stride = int64_t{heads_} * config_.qk_head_dim();
  Grow(q_, count * q_stride);
  const kernels::RowMap rows{.count = count};
  const int panels = weights.q_b.num_panels();
  const int tasks = NumTasks(panels, count * q_stride * config_.q_lora_rank, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(panels, tasks, task);
    ColumnParallel(weights.q_b, q_b_input_, first, rows, begin, end, q_.data(), q_stride, kernels_);
  });
}

std::vector<int> Mla::AttendExpanded(int layer, const LayerWeights& weights, const Batch& batch,
                                     const KvCache& cache, int first, int count) {
  const int head_width = config_.qk_head_dim();
  const int rope = config_.qk_rope_head_dim;
  const int tasks = NumTasks(count, int64_t{count} * heads_ * rope * 8, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(count, tasks, task);
    for (int t = begin; t < end; ++t) {
      const int position = batch.position[first + t];
      kernels::Bf16* query = q_.data() + int64_t{t} * heads_ * head_width + config_.qk_nope_head_dim;
      for (int h = 0; h < heads_; ++h, query += head_width) {
        kernels_.rope(query, rotary_.CosRow(position), rotary_.SinRow(position), rope, query);
      }
    }
  });
  Grow(values_, int64_t{count} * heads_ * config_.v_head_dim);
  return expanded_.Run(layer, weights, batch, first, count, cache, q_.data(), values_.data());
}

std::vector<int> Mla::AttendAbsorbed(int layer, const LayerWeights& weights, const Batch& batch,
                                     const KvCache& cache, int first, int count) {
  AbsorbQueries(weights, batch, first, count);
  const int latent = config_.kv_lora_rank;
  const int value = config_.v_head_dim;
  const int64_t mixed_stride = int64_t{heads_} * latent;
  const int64_t value_stride = int64_t{heads_} * value;
  Grow(mixed_, count * mixed_stride);
  std::vector<int> bad_scores =
      absorbed_.Run(layer, batch, first, count, cache, queries_.data(), mixed_.data());
  Grow(values_, count * value_stride);
  const kernels::RowMap rows{.count = count};
  const int tasks = NumTasks(heads_, int64_t{count} * heads_ * latent * value * 2, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(heads_, tasks, task);
    for (int h = begin; h < end; ++h) {
      const kernels::PackedBf16& value_up = weights.value_up[h];
      kernels_.gemm_bf16({mixed_.data() + int64_t{h} * latent, mixed_stride}, value_up, rows, 0,
                         value_up.num_panels(), values_.data() + int64_t{h} * value, value_stride);
    }
  });
  return bad_scores;
}

void Mla::AbsorbQueries(const LayerWeights& weights, const Batch& batch, int first, int count) {
  const int head_width = config_.qk_head_dim();
  const int width = config_.latent_width();
  const int nope = config_.qk_nope_head_dim;
  const int64_t q_stride = int64_t{heads_} * head_width;
  const int64_t query_stride = int64_t{heads_} * width;
  Grow(queries_, count * query_stride);
  const kernels::RowMap rows{.count = count};
  const int64_t macs =
      int64_t{count} * heads_ * nope * config_.kv_lora_rank * 2;  // bf16 runs at half the rate
  const int tasks = NumTasks(heads_, macs, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(heads_, tasks, task);
    for (int h = begin; h < end; ++h) {
      const kernels::Bf16* in = q_.data() + int64_t{h} * head_width;
      kernels::Bf16* out = queries_.data() + int64_t{h} * width;
      const kernels::PackedBf16& key_up = weights.key_up[h];
      kernels_.gemm_bf16({in, q_stride}, key_up, rows, 0, key_up.num_panels(), out, query_stride);
      for (int t = 0; t < count; ++t) {
        const int position = batch.position[first + t];
        kernels_.rope(in + t * q_stride + nope, rotary_.CosRow(position), rotary_.SinRow(position),
                      config_.qk_rope_head_dim, out + t * query_stride + config_.kv_lora_rank);
      }
    }
  });
}

// Of tokens of the run, whose values are there, into sums_.
void Mla::ProjectOutputs(const LayerWeights& weights, Slice tokens, const std::vector<int>& bad_scores) {
  const int count = tokens.size();
  const int64_t value_stride = int64_t{heads_} * config_.v_head_dim;
  sums_.Clear(count, config_.hidden_size, threads_.num_threads());
  for (const int t : bad_scores) {
    if (t >= tokens.begin && t < tokens.end) sums_.Flag(t - tokens.begin, Operation::kAttentionScore);
  }
  o_input_.Reshape(weights.o, count);
  const int row_tasks = NumTasks(count, count * value_stride * 8, threads_);
  threads_.ParallelFor(row_tasks, [&](int task, int thread) {
    const auto [begin, end] = SliceOf(count, row_tasks, task);
    float* wide = Scratch(thread);
    for (int t = begin; t < end; ++t) {
      kernels_.to_float(values_.data() + (tokens.begin + t) * value_stride, static_cast<int>(value_stride),
                        wide);
      o_input_.Set(t, weights.o, wide, kernels_);
    }
  });

  const kernels::RowMap rows{.count = count};
  const int panels = weights.o.num_panels();
  const int tasks = NumTasks(panels, count * value_stride * config_.hidden_size, threads_);
  threads_.ParallelFor(tasks, [&](int task, int thread) {
    const auto [begin, end] = SliceOf(panels, tasks, task);
    RowParallel(weights.o, o_input_, 0, nullptr, rows, begin, end, sums_.Rows(thread), kernels_);
  });
  sums_.FlagOutOfRange(Operation::kOutputProjection);
}

// Tokens [first, first + count): adds the group's parts of o_proj.
Status Mla::AddOutputs(int layer, const Batch& batch, bool scatter, int first, int count, float* residual,
                       RowFailures& failures) {
  Slice rows = {0, count};
  if (scatter) {
    const int members = peers_.group.size();
    const auto rows_of = [&](int member) {  // of this block
      const Slice tokens = SliceOf(batch.num_tokens(), members, member);
      return Slice{std::clamp(tokens.begin - first, 0, count), std::clamp(tokens.end - first, 0, count)};
    };
    std::vector<int64_t> counts(members);
    for (int member = 0; member < members; ++member) counts[member] = rows_of(member).size() * sums_.stride();
    rows = rows_of(peers_.group.rank());
    RETURN_IF_ERROR(
        peers_.group.ReduceScatter(sums_.Values(0, count), counts, sums_.Values(rows.begin, rows.end)));
  } else {
    RETURN_IF_ERROR(peers_.group.AllReduce(sums_.Values(0, count)));
  }
  const int tasks = NumTasks(rows.size(), int64_t{rows.size()} * config_.hidden_size * 8, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(rows.size(), tasks, task);
    for (int t = rows.begin + begin; t < rows.begin + end; ++t) {
      sums_.AddTo(t, residual, first + t, layer, kernels_, failures);
    }
  });
  return {};
}

}  // namespace tessera
