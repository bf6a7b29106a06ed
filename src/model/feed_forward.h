// The second half of a layer: x += FFN(norm(x)), dense or mixture of experts, for all tokens of a batch.
// Internal to model/. One thread calls Run.
//
// Every rank works on a table of rows: the normalised tokens that it computes something for, with the experts
// that each of them goes to. Who fills the table and where the sums go is the layout's mode
// (docs/parallel.md):
//   dense, kReduce   the group's tokens, which every rank has; sums of all ranks are added
//   kGather          all tokens of the world, gathered; sums return to the tokens' owners
//   kExchange        own tokens, then those that other ranks sent here; sums return likewise
// Over these rows run branches (experts, the shared expert, the one dense FFN), each over some of them, whose
// fixed-point terms are added.
#pragma once

#include <span>
#include <vector>

#include "model/batch.h"
#include "model/config.h"
#include "model/linear.h"
#include "model/peers.h"
#include "model/router.h"
#include "model/weights.h"

namespace tessera {

class FeedForwardBlock {
 public:
  FeedForwardBlock(const ModelConfig& config, const Peers& peers, const kernels::Kernels& kernels,
                   ThreadPool& threads);

  // Updates residual [token][hidden] of all tokens of the batch, on every rank of the group. `own` are the
  // tokens whose residual is current: topology.Tokens in a routed layer of several groups, else all.
  Status Run(int layer, const LayerWeights& weights, const Batch& batch, Slice own, float* residual,
             RowFailures& failures);

 private:
  // The inputs of gate and up: one row per token where the form does not depend on the expert (dynamic,
  // bf16); one per row of the branch where it does (static scales).
  struct Inputs {
    LinearInput gate, up;
  };
  struct Branch {
    const FeedForward* weights = nullptr;
    int count = 0;                       // rows
    int first = 0;                       // where they lie in inputs of one row per branch row, and in `down`
    const int32_t* tokens = nullptr;     // [count] rows of the table; null: row i is row i of it
    const float* row_weights = nullptr;  // [count]; null: 1
    Inputs* inputs = nullptr;
    LinearInput* down = nullptr;
    int64_t hidden_at = 0;  // where its rows start in gate_out_ and up_out_
    // A segment is some leaves of `down`: activated and quantised as soon as gate and up have its columns.
    int first_segment = 0;  // in missing_
    int segment_leaves = 0;
    int segment_columns = 0;
    int width() const { return weights->gate.num_outputs; }
    bool per_row_inputs() const { return weights->gate.scheme == Scheme::kInt8Static; }
  };

  // -- Filling the table
  void Normalise(int layer, const LayerWeights& weights, Slice own, const float* residual, bool routed,
                 RowFailures& failures);
  std::vector<int> TokensByRank(const Batch& batch) const;
  Status GatherRows(std::span<const int> tokens_by_rank);
  Status ExchangeRows(Slice own);
  // -- Computing it: `whole` is the FFN that the first num_whole rows all go to.
  void Compute(const LayerWeights& weights, bool routed, const FeedForward& whole, int num_whole);
  void SortByExpert();
  void MakeBranches(const LayerWeights& weights, const FeedForward& whole, int num_whole);
  void PrepareInputs();
  void GateAndUp();
  void Finish(const Branch& branch, Slice columns, int thread);
  void Activate(const Branch& branch, int segment, int thread);
  void Down();
  // -- Bringing the sums home
  Status ReturnExchanged();
  void AddResidual(int layer, Slice own, int first_row, float* residual, RowFailures& failures);
  Status GatherResidual(Slice own, int num_tokens, float* residual, RowFailures& failures);
  float* Scratch(int thread) { return scratch_.data() + static_cast<size_t>(thread) * scratch_width_; }
  int64_t row_bytes() const { return row_floats_ * int64_t{sizeof(float)}; }
  float* Row(int row) { return table_.data() + row * row_floats_; }
  // The experts of a row; those with index -1 are none.
  RoutedExpert* Chosen(int row) { return reinterpret_cast<RoutedExpert*>(Row(row) + config_.hidden_size); }

  const ModelConfig& config_;
  const Peers& peers_;
  const kernels::Kernels& kernels_;
  ThreadPool& threads_;
  const size_t scratch_width_;
  const int64_t row_floats_;  // hidden, then top_k pairs of expert and weight

  int num_rows_ = 0;
  std::vector<float> table_;              // [row][row_floats_]
  std::vector<float> scores_;             // [token][expert]
  std::vector<int32_t> expert_begin_;     // [own expert + 1] into the sorted assignments
  std::vector<int32_t> assigned_tokens_;  // sorted by expert, then row
  std::vector<float> assigned_weights_;
  std::vector<Branch> branches_;
  Inputs routed_inputs_, whole_inputs_;
  LinearInput routed_down_, whole_down_;
  std::vector<kernels::Bf16> gate_out_, up_out_;
  std::vector<int32_t> missing_;  // of each segment: columns of gate and up; by several threads at once
  FixedSums sums_;
  std::vector<float> scratch_;
  // kExchange: which rows went to each rank, and how many came from it.
  std::vector<std::vector<int32_t>> sent_rows_;
  std::vector<int32_t> num_received_;
  std::vector<float> outgoing_;
  std::vector<int64_t> returned_;
};

}  // namespace tessera
