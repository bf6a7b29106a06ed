// The FFN half of a layer in named stages; each is one loop over threads.
#include "model/feed_forward.h"

#include <algorithm>
#include <atomic>
#include <numeric>

namespace tessera {

static_assert(sizeof(RoutedExpert) == 2 * sizeof(float));

namespace {

constexpr int kSegmentColumns = 128;  // or one leaf where that is more

}  // namespace

FeedForwardBlock::FeedForwardBlock(const ModelConfig& config, const Peers& peers,
                                   const kernels::Kernels& kernels, ThreadPool& threads)
    : config_(config),
      peers_(peers),
      kernels_(kernels),
      threads_(threads),
      scratch_width_(std::max({config.intermediate_size, config.moe_intermediate_size,
                               config.moe_intermediate_size * config.n_shared_experts})),
      row_floats_(config.hidden_size + 2 * config.num_experts_per_tok),
      scratch_(scratch_width_ * threads.num_threads()),
      sent_rows_(peers.topology.world()),
      num_received_(peers.topology.world()) {}

Status FeedForwardBlock::Run(int layer, const LayerWeights& weights, const Batch& batch, Slice own,
                             float* residual, RowFailures& failures) {
  const bool routed = config_.IsMoe(layer);
  const MoeMode mode = peers_.topology.mode();
  Normalise(layer, weights, own, residual, routed, failures);
  if (!routed || mode == MoeMode::kReduce) {
    Compute(weights, routed, routed ? weights.shared : weights.dense, num_rows_);
    Communicator& all = routed ? peers_.world : peers_.group;
    RETURN_IF_ERROR(all.AllReduce(sums_.Values(0, num_rows_)));
    AddResidual(layer, own, 0, residual, failures);
    return {};
  }
  if (mode == MoeMode::kGather) {
    const std::vector<int> tokens = TokensByRank(batch);
    RETURN_IF_ERROR(GatherRows(tokens));
    Compute(weights, true, weights.shared, num_rows_);
    std::vector<int64_t> counts;
    for (const int count : tokens) counts.push_back(count * sums_.stride());
    const int first_own = std::accumulate(tokens.begin(), tokens.begin() + peers_.topology.rank(), 0);
    RETURN_IF_ERROR(peers_.world.ReduceScatter(sums_.Values(0, num_rows_), counts,
                                               sums_.Values(first_own, first_own + own.size())));
    AddResidual(layer, own, first_own, residual, failures);
  } else {
    RETURN_IF_ERROR(ExchangeRows(own));
    Compute(weights, true, weights.shared, own.size());
    RETURN_IF_ERROR(ReturnExchanged());
    AddResidual(layer, own, 0, residual, failures);
  }
  return GatherResidual(own, batch.num_tokens(), residual, failures);
}

// The table's first rows: the own tokens, normalised and routed.
void FeedForwardBlock::Normalise(int layer, const LayerWeights& weights, Slice own, const float* residual,
                                 bool routed, RowFailures& failures) {
  const int hidden = config_.hidden_size;
  const int experts = config_.n_routed_experts;
  const int top_k = config_.num_experts_per_tok;
  num_rows_ = own.size();
  Grow(table_, num_rows_ * row_floats_);
  if (routed) Grow(scores_, int64_t{num_rows_} * experts);
  const int tasks =
      NumTasks(num_rows_, int64_t{num_rows_} * hidden * (routed ? 8 + 4 * experts : 8), threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(num_rows_, tasks, task);
    for (int row = begin; row < end; ++row) {
      const int token = own.begin + row;
      if (!kernels_.rms_norm(residual + int64_t{token} * hidden, weights.post_attention_norm.data(), hidden,
                             config_.rms_norm_eps, Row(row))) {
        failures.Mark(token, layer, Operation::kPostAttentionNorm);
      }
    }
    if (!routed || begin == end) return;
    float* logits = scores_.data() + int64_t{begin} * experts;
    kernels_.gemm_float(Row(begin), row_floats_, weights.router, end - begin, 0, weights.router.num_panels(),
                        logits, experts);
    kernels_.sigmoid(logits, (end - begin) * experts, logits);
    for (int row = begin; row < end; ++row) {
      Route(config_, std::span<const float>(scores_).subspan(int64_t{row} * experts, experts),
            weights.router_bias, std::span(Chosen(row), top_k));
    }
  });
}

// kGather: how many tokens each rank owns.
std::vector<int> FeedForwardBlock::TokensByRank(const Batch& batch) const {
  std::vector<int> tokens;
  for (int rank = 0; rank < peers_.world.size(); ++rank) {
    const Topology peer(peers_.topology.degrees(), rank);
    tokens.push_back(peer.Tokens(batch.group_tokens[peer.dp_rank()]).size());
  }
  return tokens;
}

// kGather: the table becomes all ranks' rows, in the order of the ranks.
Status FeedForwardBlock::GatherRows(std::span<const int> tokens_by_rank) {
  std::vector<int64_t> sizes;
  for (const int tokens : tokens_by_rank) sizes.push_back(tokens * row_bytes());
  outgoing_.assign(table_.begin(), table_.begin() + num_rows_ * row_floats_);
  num_rows_ = std::accumulate(tokens_by_rank.begin(), tokens_by_rank.end(), 0);
  Grow(table_, num_rows_ * row_floats_);
  return peers_.world.AllGather(
      std::as_bytes(std::span(outgoing_)), sizes,
      std::as_writable_bytes(std::span(table_).first(static_cast<size_t>(num_rows_ * row_floats_))));
}

// kExchange: a row travels once to each rank that holds some of its experts; own experts need no travel.
Status FeedForwardBlock::ExchangeRows(Slice own) {
  const int world = peers_.world.size();
  const int self = peers_.world.rank();
  for (std::vector<int32_t>& rows : sent_rows_) rows.clear();
  for (int row = 0; row < own.size(); ++row) {
    for (int i = 0; i < config_.num_experts_per_tok; ++i) {
      const int owner = peers_.topology.ExpertOwnerSet(Chosen(row)[i].expert, config_.n_routed_experts);
      if (owner == self || (!sent_rows_[owner].empty() && sent_rows_[owner].back() == row)) continue;
      sent_rows_[owner].push_back(row);
    }
  }
  std::vector<int32_t> num_sent(world);
  std::vector<int64_t> send_sizes(world), receive_sizes(world);
  const std::vector<int64_t> words(world, sizeof(int32_t));
  outgoing_.clear();
  for (int rank = 0; rank < world; ++rank) {
    num_sent[rank] = static_cast<int32_t>(sent_rows_[rank].size());
    send_sizes[rank] = num_sent[rank] * row_bytes();
    for (const int32_t row : sent_rows_[rank])
      outgoing_.insert(outgoing_.end(), Row(row), Row(row) + row_floats_);
  }
  RETURN_IF_ERROR(peers_.world.AllToAll(std::as_bytes(std::span(num_sent)), words,
                                        std::as_writable_bytes(std::span(num_received_)), words));
  const int64_t first_byte = num_rows_ * row_bytes();
  int64_t num_bytes = 0;
  for (int rank = 0; rank < world; ++rank) {
    receive_sizes[rank] = num_received_[rank] * row_bytes();
    num_bytes += receive_sizes[rank];
    num_rows_ += num_received_[rank];
  }
  Grow(table_, num_rows_ * row_floats_);
  const auto arriving = std::as_writable_bytes(std::span(table_)).subspan(first_byte, num_bytes);
  return peers_.world.AllToAll(std::as_bytes(std::span(outgoing_)), send_sizes, arriving, receive_sizes);
}

void FeedForwardBlock::Compute(const LayerWeights& weights, bool routed, const FeedForward& whole,
                               int num_whole) {
  if (routed) {
    SortByExpert();
  } else {
    expert_begin_.assign(1, 0);
  }
  MakeBranches(weights, whole, num_whole);
  PrepareInputs();
  GateAndUp();
  Down();
  sums_.FlagOutOfRange(Operation::kDownProjection);
}

// Assignments to the experts that are held here.
void FeedForwardBlock::SortByExpert() {
  const Slice own = peers_.topology.Experts(config_.n_routed_experts);
  const int top_k = config_.num_experts_per_tok;
  const auto local = [&](int row, int i) {  // -1: held elsewhere
    const int expert = Chosen(row)[i].expert;
    return expert >= own.begin && expert < own.end ? expert - own.begin : -1;
  };
  expert_begin_.assign(own.size() + 1, 0);
  for (int row = 0; row < num_rows_; ++row) {
    for (int i = 0; i < top_k; ++i) {
      if (const int expert = local(row, i); expert >= 0) ++expert_begin_[expert + 1];
    }
  }
  for (int e = 0; e < own.size(); ++e) expert_begin_[e + 1] += expert_begin_[e];
  assigned_tokens_.resize(expert_begin_.back());
  assigned_weights_.resize(expert_begin_.back());
  std::vector<int32_t> next(expert_begin_.begin(), expert_begin_.end() - 1);
  for (int row = 0; row < num_rows_; ++row) {
    for (int i = 0; i < top_k; ++i) {
      const int expert = local(row, i);
      if (expert < 0) continue;
      const int32_t at = next[expert]++;
      assigned_tokens_[at] = row;
      assigned_weights_[at] = Chosen(row)[i].weight;
    }
  }
}

void FeedForwardBlock::MakeBranches(const LayerWeights& weights, const FeedForward& whole, int num_whole) {
  branches_.clear();
  missing_.clear();
  int64_t hidden_at = 0;
  const auto add = [&](Branch branch) {
    if (branch.count == 0 || branch.weights->empty()) return;
    branch.hidden_at = hidden_at;
    hidden_at += int64_t{branch.count} * branch.width();
    const int leaf_columns = branch.weights->down.k / branch.weights->down.num_leaves;
    branch.segment_leaves = std::max(1, kSegmentColumns / leaf_columns);
    branch.segment_columns = branch.segment_leaves * leaf_columns;
    branch.first_segment = static_cast<int>(missing_.size());
    for (int column = 0; column < branch.width(); column += branch.segment_columns)
      missing_.push_back(2 * std::min(branch.segment_columns, branch.width() - column));
    branches_.push_back(branch);
  };
  for (size_t e = 0; e + 1 < expert_begin_.size(); ++e) {
    const int first = expert_begin_[e];
    add({.weights = &weights.experts[e],
         .count = expert_begin_[e + 1] - first,
         .first = first,
         .tokens = assigned_tokens_.data() + first,
         .row_weights = assigned_weights_.data() + first,
         .inputs = &routed_inputs_,
         .down = &routed_down_});
  }
  const bool shared = !branches_.empty() && ShareInputs(whole.gate, branches_.front().weights->gate);
  add({.weights = &whole,
       .count = num_whole,
       .inputs = shared ? &routed_inputs_ : &whole_inputs_,
       .down = &whole_down_});
  Grow(gate_out_, hidden_at);
  Grow(up_out_, hidden_at);
  for (const Branch& branch : branches_) {  // same shape for all branches of one Inputs: the last call stands
    const int rows = branch.tokens == nullptr ? num_rows_ : static_cast<int>(assigned_tokens_.size());
    branch.inputs->gate.Reshape(branch.weights->gate, branch.per_row_inputs() ? rows : num_rows_);
    if (branch.per_row_inputs()) branch.inputs->up.Reshape(branch.weights->up, rows);
    branch.down->Reshape(branch.weights->down, rows);
  }
}

void FeedForwardBlock::PrepareInputs() {
  const int tasks = NumTasks(num_rows_, int64_t{num_rows_} * config_.hidden_size * 8, threads_);
  // One row per token, written once: any branch of the same Inputs stands for all.
  const Linear* routed_form = nullptr;
  const Linear* whole_form = nullptr;
  for (const Branch& branch : branches_) {
    if (branch.per_row_inputs()) continue;
    (branch.inputs == &routed_inputs_ ? routed_form : whole_form) = &branch.weights->gate;
  }
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(num_rows_, tasks, task);
    for (int row = begin; row < end; ++row) {
      if (routed_form != nullptr) routed_inputs_.gate.Set(row, *routed_form, Row(row), kernels_);
      if (whole_form != nullptr) whole_inputs_.gate.Set(row, *whole_form, Row(row), kernels_);
    }
  });
  threads_.ParallelFor(static_cast<int>(branches_.size()), [&](int task, int) {
    const Branch& branch = branches_[task];
    if (!branch.per_row_inputs()) return;
    for (int i = 0; i < branch.count; ++i) {
      const float* x = Row(branch.tokens == nullptr ? i : branch.tokens[i]);
      branch.inputs->gate.Set(branch.first + i, branch.weights->gate, x, kernels_);
      branch.inputs->up.Set(branch.first + i, branch.weights->up, x, kernels_);
    }
  });
}

// Units of work: one panel of gate or up of one branch, branches in order. Experts have few or many rows, so
// tasks are cut by cost: reading a panel takes as long as multiplying it with kReadRows rows or so. Whoever
// completes a segment activates and quantises it at once, while it is in a cache.
void FeedForwardBlock::GateAndUp() {
  constexpr int64_t kReadRows = 8;
  struct Part {  // gate or up of a branch
    const Branch* branch;
    bool gate;
    int panels;
    int64_t panel_cost, first_cost;
    const Linear& linear() const { return gate ? branch->weights->gate : branch->weights->up; }
    int PanelAt(int64_t cost) const {
      return static_cast<int>(std::clamp<int64_t>((cost - first_cost) / panel_cost, 0, panels));
    }
  };
  std::vector<Part> parts;
  int64_t cost = 0;
  int64_t macs = 0;
  int units = 0;
  for (const Branch& branch : branches_) {
    for (const bool gate : {true, false}) {
      Part part{&branch, gate, 0, kReadRows + branch.count, cost};
      part.panels = part.linear().num_panels();
      parts.push_back(part);
      units += part.panels;
      cost += part.panels * part.panel_cost;
      macs += int64_t{branch.count} * part.linear().num_outputs * part.linear().k;
    }
  }
  const int tasks = NumTasks(units, macs, threads_);
  threads_.ParallelFor(tasks, [&](int task, int thread) {
    const int64_t begin = cost * task / tasks;
    const int64_t end = cost * (task + 1) / tasks;
    for (const Part& part : parts) {
      const int from = part.PanelAt(begin);
      const int until = part.PanelAt(end);
      if (from == until) continue;
      const Branch& branch = *part.branch;
      const bool per_row = branch.per_row_inputs();
      const LinearInput& input = per_row && !part.gate ? branch.inputs->up : branch.inputs->gate;
      const kernels::RowMap rows{.count = branch.count, .in_rows = per_row ? nullptr : branch.tokens};
      ColumnParallel(part.linear(), input, per_row ? branch.first : 0, rows, from, until,
                     (part.gate ? gate_out_ : up_out_).data() + branch.hidden_at, branch.width(), kernels_);
      const int panel = part.linear().panel_columns();
      Finish(branch, {from * panel, std::min(until * panel, branch.width())}, thread);
    }
  });
}

// Gate or up has these columns now: they may be the last of a segment, or of several.
void FeedForwardBlock::Finish(const Branch& branch, Slice columns, int thread) {
  const int step = branch.segment_columns;
  for (int segment = columns.begin / step; segment * step < columns.end; ++segment) {
    const int count = std::min(columns.end, (segment + 1) * step) - std::max(columns.begin, segment * step);
    std::atomic_ref missing(missing_[branch.first_segment + segment]);
    if (missing.fetch_sub(count, std::memory_order_acq_rel) == count) Activate(branch, segment, thread);
  }
}

void FeedForwardBlock::Activate(const Branch& branch, int segment, int thread) {
  const Linear& down = branch.weights->down;
  const int first_leaf = segment * branch.segment_leaves;
  const Slice leaves = {first_leaf, std::min(first_leaf + branch.segment_leaves, down.num_leaves)};
  const int first_column = segment * branch.segment_columns;
  const int columns = std::min(branch.segment_columns, branch.width() - first_column);
  float* activated = Scratch(thread);
  int64_t at = branch.hidden_at + first_column;
  for (int row = 0; row < branch.count; ++row, at += branch.width()) {
    kernels_.silu_mul(&gate_out_[at], &up_out_[at], columns, activated);
    branch.down->SetLeaves(branch.first + row, leaves, down, activated, kernels_);
  }
}

// Threads share output columns, so that experts may add to the same token without a lock.
void FeedForwardBlock::Down() {
  sums_.Clear(num_rows_, config_.hidden_size, threads_.num_threads());
  if (branches_.empty()) return;
  int64_t macs = 0;
  int max_panels = 0;
  for (const Branch& branch : branches_) {
    macs += int64_t{branch.count} * branch.width() * config_.hidden_size;
    max_panels = std::max(max_panels, branch.weights->down.num_panels());
  }
  const int tasks = NumTasks(max_panels, macs, threads_);
  threads_.ParallelFor(tasks, [&](int task, int thread) {
    const auto [column_begin, column_end] = SliceOf((config_.hidden_size + 31) / 32, tasks, task);
    for (const Branch& branch : branches_) {
      const Linear& down = branch.weights->down;
      const int per_column_unit = 32 / down.panel_columns();
      const int begin = std::min(column_begin * per_column_unit, down.num_panels());
      const int end = std::min(column_end * per_column_unit, down.num_panels());
      const kernels::RowMap rows{.count = branch.count, .out_rows = branch.tokens};
      RowParallel(down, *branch.down, branch.first, branch.row_weights, rows, begin, end, sums_.Rows(thread),
                  kernels_);
    }
  });
}

// kExchange: sums of rows that came from elsewhere go back, and those of the own rows are added.
Status FeedForwardBlock::ReturnExchanged() {
  const int world = peers_.world.size();
  const int64_t sum_bytes = sums_.stride() * int64_t{sizeof(int64_t)};
  std::vector<int64_t> send_sizes(world), receive_sizes(world);
  int num_sent = 0;
  int num_guests = 0;
  for (int rank = 0; rank < world; ++rank) {
    send_sizes[rank] = num_received_[rank] * sum_bytes;
    receive_sizes[rank] = static_cast<int64_t>(sent_rows_[rank].size()) * sum_bytes;
    num_guests += num_received_[rank];
    num_sent += static_cast<int>(sent_rows_[rank].size());
  }
  Grow(returned_, num_sent * sums_.stride());
  const std::span<int64_t> returned(returned_.data(), static_cast<size_t>(num_sent * sums_.stride()));
  RETURN_IF_ERROR(peers_.world.AllToAll(std::as_bytes(sums_.Values(num_rows_ - num_guests, num_rows_)),
                                        send_sizes, std::as_writable_bytes(returned), receive_sizes));
  const int64_t* values = returned.data();
  for (const std::vector<int32_t>& rows : sent_rows_) {
    for (const int32_t row : rows) {
      sums_.AddRow(row, values);
      values += sums_.stride();
    }
  }
  return {};
}

// The own tokens' sums lie in rows first_row ...
void FeedForwardBlock::AddResidual(int layer, Slice own, int first_row, float* residual,
                                   RowFailures& failures) {
  const int tasks = NumTasks(own.size(), int64_t{own.size()} * config_.hidden_size * 8, threads_);
  threads_.ParallelFor(tasks, [&](int task, int) {
    const auto [begin, end] = SliceOf(own.size(), tasks, task);
    for (int i = begin; i < end; ++i) {
      sums_.AddTo(first_row + i, residual, own.begin + i, layer, kernels_, failures);
    }
  });
}

// Every rank of the group gets all of the group's residual rows, and what failed in them.
Status FeedForwardBlock::GatherResidual(Slice own, int num_tokens, float* residual, RowFailures& failures) {
  const int members = peers_.group.size();
  if (members == 1) return {};
  const int hidden = config_.hidden_size;
  std::vector<int64_t> row_sizes(members), code_sizes(members);
  for (int member = 0; member < members; ++member) {
    const int tokens = SliceOf(num_tokens, members, member).size();
    row_sizes[member] = int64_t{tokens} * hidden * int64_t{sizeof(float)};
    code_sizes[member] = int64_t{tokens} * int64_t{sizeof(int32_t)};
  }
  const std::span<float> rows(residual, static_cast<size_t>(num_tokens) * hidden);
  RETURN_IF_ERROR(peers_.group.AllGather(
      std::as_bytes(rows.subspan(int64_t{own.begin} * hidden, int64_t{own.size()} * hidden)), row_sizes,
      std::as_writable_bytes(rows)));
  std::vector<int32_t> codes(num_tokens);
  for (int t = own.begin; t < own.end; ++t) codes[t] = failures.Code(t);
  RETURN_IF_ERROR(peers_.group.AllGather(std::as_bytes(std::span(codes).subspan(own.begin, own.size())),
                                         code_sizes, std::as_writable_bytes(std::span(codes))));
  for (int t = 0; t < num_tokens; ++t) failures.Adopt(t, codes[t]);
  return {};
}

}  // namespace tessera
