// The FFN half of a layer in named stages; each is one loop over threads.
#include "model/feed_forward.h"

namespace tessera {
FeedForwardBlock::FeedForwardBlock(const ModelConfig& config, const kernels::Kernels& kernels,
                                   ThreadPool& threads)
    : config_(config),
      kernels_(kernels),
      threads_(threads),
      scratch_width_(std::max({config.intermediate_size, config.moe_intermediate_size,
                               config.moe_intermediate_size * config.n_shared_experts})),
      scratch_(scratch_width_ * threads.num_threads()) {}

int64_t FeedForwardBlock::WorkspaceBytes(const ModelConfig& c, int num_tokens) {
  const int64_t moe_width = int64_t{c.moe_intermediate_size} * (c.num_experts_per_tok + c.n_shared_experts);
  const int64_t width = std::max<int64_t>(c.intermediate_size, moe_width);
  return num_tokens * (int64_t{c.hidden_size} * (4 + 1 + 8) + 4 * c.n_routed_experts + 5 * width);
}

void FeedForwardBlock::Run(int layer, const LayerWeights& weights, int num_tokens, float* residual,
                           RowFailures& failures) {
  const bool routed = config_.IsMoe(layer);
  Normalise(layer, weights, num_tokens, residual, routed, failures);
  if (routed) SortByExpert(num_tokens);
  MakeBranches(weights, num_tokens, routed);
  PrepareInputs(num_tokens);
  GateAndUp();
  Activate();
  Down(num_tokens);
  AddResidual(layer, num_tokens, residual, failures);
}

void FeedForwardBlock::Normalise(int layer, const LayerWeights& weights, int num_tokens,
                                 const float* residual, bool routed, RowFailures& failures) {
  const int hidden = config_.hidden_size;
  const int experts = config_.n_routed_experts;
  const int top_k = config_.num_experts_per_tok;
  Grow(normed_, int64_t{num_tokens} * hidden);
  if (routed) {
    Grow(scores_, int64_t{num_tokens} * experts);
    chosen_.resize(static_cast<size_t>(num_tokens) * top_k);
  }
  const int tasks =
      NumTasks(num_tokens, int64_t{num_tokens} * hidden * (routed ? 8 + 4 * experts : 8), threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = ShareOf(num_tokens, tasks, task);
    for (int t = begin; t < end; ++t) {
      if (!kernels_.rms_norm(residual + int64_t{t} * hidden, weights.post_attention_norm.data(), hidden,
                             config_.rms_norm_eps, normed_.data() + int64_t{t} * hidden)) {
        failures.Mark(t, layer, "post_attention_layernorm");
      }
    }
    if (!routed || begin == end) return;
    float* logits = scores_.data() + int64_t{begin} * experts;
    kernels_.gemm_float(normed_.data() + int64_t{begin} * hidden, hidden, weights.router, end - begin, 0,
                        weights.router.num_panels(), logits, experts);
    kernels_.sigmoid(logits, (end - begin) * experts, logits);
    for (int t = begin; t < end; ++t) {
      Route(config_, std::span<const float>(scores_).subspan(int64_t{t} * experts, experts),
            weights.router_bias, std::span(chosen_).subspan(int64_t{t} * top_k, top_k));
    }
  });
}

void FeedForwardBlock::SortByExpert(int num_tokens) {
  const int top_k = config_.num_experts_per_tok;
  expert_begin_.assign(config_.n_routed_experts + 1, 0);
  for (const RoutedExpert& slot : chosen_) ++expert_begin_[slot.expert + 1];
  for (int e = 0; e < config_.n_routed_experts; ++e) expert_begin_[e + 1] += expert_begin_[e];
  assigned_tokens_.resize(chosen_.size());
  assigned_weights_.resize(chosen_.size());
  std::vector<int32_t> next(expert_begin_.begin(), expert_begin_.end() - 1);
  for (int t = 0; t < num_tokens; ++t) {
    for (int i = 0; i < top_k; ++i) {
      const RoutedExpert& slot = chosen_[int64_t{t} * top_k + i];
      const int32_t at = next[slot.expert]++;
      assigned_tokens_[at] = t;
      assigned_weights_[at] = slot.weight;
    }
  }
}

void FeedForwardBlock::MakeBranches(const LayerWeights& weights, int num_tokens, bool routed) {
  branches_.clear();
  int64_t hidden_at = 0;
  const auto add = [&](Branch branch) {
    branch.hidden_at = hidden_at;
    hidden_at += int64_t{branch.count} * branch.width();
    branches_.push_back(branch);
  };
  if (routed) {
    for (int e = 0; e < config_.n_routed_experts; ++e) {
      const int first = expert_begin_[e];
      const int count = expert_begin_[e + 1] - first;
      if (count == 0) continue;
      add({.weights = &weights.experts[e],
           .count = count,
           .first = first,
           .tokens = assigned_tokens_.data() + first,
           .row_weights = assigned_weights_.data() + first,
           .inputs = &routed_inputs_,
           .down = &routed_down_});
    }
  }
  const FeedForward* whole = routed ? &weights.shared : &weights.dense;
  if (whole->gate.num_outputs > 0) {
    const bool shared = !branches_.empty() && ShareInputs(whole->gate, branches_.front().weights->gate);
    add({.weights = whole,
         .count = num_tokens,
         .inputs = shared ? &routed_inputs_ : &whole_inputs_,
         .down = &whole_down_});
  }
  Grow(gate_out_, hidden_at);
  Grow(up_out_, hidden_at);
  for (const Branch& branch : branches_) {  // same shape for all branches of one Inputs: the last call stands
    const int rows = branch.tokens == nullptr ? num_tokens : static_cast<int>(assigned_tokens_.size());
    branch.inputs->gate.Reshape(branch.weights->gate, branch.per_row_inputs() ? rows : num_tokens);
    if (branch.per_row_inputs()) branch.inputs->up.Reshape(branch.weights->up, rows);
    branch.down->Reshape(branch.weights->down, rows);
  }
}

void FeedForwardBlock::PrepareInputs(int num_tokens) {
  const int hidden = config_.hidden_size;
  const auto normed = [&](int token) { return normed_.data() + int64_t{token} * hidden; };
  const int tasks = NumTasks(num_tokens, int64_t{num_tokens} * hidden * 8, threads_);
  // One row per token, written once: any branch of the same Inputs stands for all.
  const Linear* routed_form = nullptr;
  const Linear* whole_form = nullptr;
  for (const Branch& branch : branches_) {
    if (branch.per_row_inputs()) continue;
    (branch.inputs == &routed_inputs_ ? routed_form : whole_form) = &branch.weights->gate;
  }
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = ShareOf(num_tokens, tasks, task);
    for (int t = begin; t < end; ++t) {
      if (routed_form != nullptr) routed_inputs_.gate.Set(t, *routed_form, normed(t), kernels_);
      if (whole_form != nullptr) whole_inputs_.gate.Set(t, *whole_form, normed(t), kernels_);
    }
  });
  threads_.ParallelFor(static_cast<int>(branches_.size()), [&](int task, int) {
    const Branch& branch = branches_[task];
    if (!branch.per_row_inputs()) return;
    for (int i = 0; i < branch.count; ++i) {
      const float* x = normed(branch.tokens == nullptr ? i : branch.tokens[i]);
      branch.inputs->gate.Set(branch.first + i, branch.weights->gate, x, kernels_);
      branch.inputs->up.Set(branch.first + i, branch.weights->up, x, kernels_);
    }
  });
}

// Units of work: one panel of gate or up of one branch, branches in order.
void FeedForwardBlock::GateAndUp() {
  std::vector<int> unit_begin(2 * branches_.size() + 1, 0);
  int64_t macs = 0;
  for (size_t i = 0; i < 2 * branches_.size(); ++i) {
    const Branch& branch = branches_[i / 2];
    const Linear& linear = i % 2 == 0 ? branch.weights->gate : branch.weights->up;
    unit_begin[i + 1] = unit_begin[i] + linear.num_panels();
    macs += int64_t{branch.count} * linear.num_outputs * linear.k;
  }
  const int units = unit_begin.back();
  const int tasks = NumTasks(units, macs, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = ShareOf(units, tasks, task);
    size_t i = std::upper_bound(unit_begin.begin(), unit_begin.end(), begin) - unit_begin.begin() - 1;
    for (int unit = begin; unit < end; ++i) {
      const Branch& branch = branches_[i / 2];
      const bool gate = i % 2 == 0;
      const int until = std::min(end, unit_begin[i + 1]);
      const bool per_row = branch.per_row_inputs();
      const LinearInput& input = per_row && !gate ? branch.inputs->up : branch.inputs->gate;
      const kernels::RowMap rows{.count = branch.count, .in_rows = per_row ? nullptr : branch.tokens};
      ColumnParallel(gate ? branch.weights->gate : branch.weights->up, input, per_row ? branch.first : 0,
                     rows, unit - unit_begin[i], until - unit_begin[i],
                     (gate ? gate_out_ : up_out_).data() + branch.hidden_at, branch.width(), kernels_);
      unit = until;
    }
  });
}

void FeedForwardBlock::Activate() {
  std::vector<int> row_begin(branches_.size() + 1, 0);
  int64_t work = 0;
  for (size_t i = 0; i < branches_.size(); ++i) {
    row_begin[i + 1] = row_begin[i] + branches_[i].count;
    work += int64_t{branches_[i].count} * branches_[i].width() * 32;
  }
  const int rows = row_begin.back();
  const int tasks = NumTasks(rows, work, threads_);
  threads_.ParallelFor(tasks, [&](int task, int thread) {
    const auto [begin, end] = ShareOf(rows, tasks, task);
    size_t i = std::upper_bound(row_begin.begin(), row_begin.end(), begin) - row_begin.begin() - 1;
    float* activated = Scratch(thread);
    for (int row = begin; row < end; ++row) {
      while (row >= row_begin[i + 1]) ++i;
      const Branch& branch = branches_[i];
      const int at = row - row_begin[i];
      const int64_t hidden_at = branch.hidden_at + int64_t{at} * branch.width();
      kernels_.silu_mul(gate_out_.data() + hidden_at, up_out_.data() + hidden_at, branch.width(), activated);
      branch.down->Set(branch.first + at, branch.weights->down, activated, kernels_);
    }
  });
}

// Threads share output columns, so that experts may add to the same token without a lock.
void FeedForwardBlock::Down(int num_tokens) {
  sums_.Clear(num_tokens, config_.hidden_size, threads_.num_threads());
  if (branches_.empty()) return;
  int64_t macs = 0;
  int max_panels = 0;
  for (const Branch& branch : branches_) {
    macs += int64_t{branch.count} * branch.width() * config_.hidden_size;
    max_panels = std::max(max_panels, branch.weights->down.num_panels());
  }
  const int tasks = NumTasks(max_panels, macs, threads_);
  threads_.ParallelFor(tasks, [&](int task, int thread) {
    const auto [column_begin, column_end] = ShareOf((config_.hidden_size + 31) / 32, tasks, task);
    for (const Branch& branch : branches_) {
      const Linear& down = branch.weights->down;
      const int per_column_unit =
          down.scheme == Scheme::kBf16 ? 32 / kernels::kFloatPanel : 32 / kernels::kInt8Panel;
      const int begin = std::min(column_begin * per_column_unit, down.num_panels());
      const int end = std::min(column_end * per_column_unit, down.num_panels());
      const kernels::RowMap rows{.count = branch.count, .out_rows = branch.tokens};
      RowParallel(down, *branch.down, branch.first, branch.row_weights, rows, begin, end, sums_.Rows(thread),
                  kernels_);
    }
  });
}

void FeedForwardBlock::AddResidual(int layer, int num_tokens, float* residual, RowFailures& failures) {
  const int tasks = NumTasks(num_tokens, int64_t{num_tokens} * config_.hidden_size * 8, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = ShareOf(num_tokens, tasks, task);
    for (int t = begin; t < end; ++t) {
      sums_.AddTo(t, residual, t, layer, "down_proj", kernels_, failures);
    }
  });
}

}  // namespace tessera
