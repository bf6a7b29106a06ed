// The second half of a layer: x += FFN(norm(x)), dense or mixture of experts, for all tokens of a batch.
// Both are the same thing here: some branches (experts, the shared expert, the one dense FFN), each over some
// rows, whose fixed-point terms are added. Internal to model/. One thread calls Run.
#pragma once

#include <vector>

#include "model/batch.h"
#include "model/config.h"
#include "model/linear.h"
#include "model/router.h"
#include "model/weights.h"

namespace tessera {

class FeedForwardBlock {
 public:
  FeedForwardBlock(const ModelConfig& config, const kernels::Kernels& kernels, ThreadPool& threads);

  // Updates residual [num_tokens][hidden].
  void Run(int layer, const LayerWeights& weights, int num_tokens, float* residual, RowFailures& failures);
  static int64_t WorkspaceBytes(const ModelConfig& config, int num_tokens);

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
    const int32_t* tokens = nullptr;     // [count]; null: row i is token i
    const float* row_weights = nullptr;  // [count]; null: 1
    Inputs* inputs = nullptr;
    LinearInput* down = nullptr;
    int64_t hidden_at = 0;  // where its rows start in gate_out_ and up_out_
    int width() const { return weights->gate.num_outputs; }
    bool per_row_inputs() const { return weights->gate.scheme == Scheme::kInt8Static; }
  };

  void Normalise(int layer, const LayerWeights& weights, int num_tokens, const float* residual, bool routed,
                 RowFailures& failures);
  void SortByExpert(int num_tokens);
  void MakeBranches(const LayerWeights& weights, int num_tokens, bool routed);
  void PrepareInputs(int num_tokens);
  void GateAndUp();
  void Activate();
  void Down(int num_tokens);
  void AddResidual(int layer, int num_tokens, float* residual, RowFailures& failures);
  float* Scratch(int thread) { return scratch_.data() + static_cast<size_t>(thread) * scratch_width_; }

  const ModelConfig& config_;
  const kernels::Kernels& kernels_;
  ThreadPool& threads_;
  const size_t scratch_width_;

  std::vector<float> normed_;             // [token][hidden]
  std::vector<float> scores_;             // [token][expert]
  std::vector<RoutedExpert> chosen_;      // [token][top_k]
  std::vector<int32_t> expert_begin_;     // [expert + 1] into the sorted assignments
  std::vector<int32_t> assigned_tokens_;  // sorted by expert, then token
  std::vector<float> assigned_weights_;
  std::vector<Branch> branches_;
  Inputs routed_inputs_, whole_inputs_;
  LinearInput routed_down_, whole_down_;
  std::vector<kernels::Bf16> gate_out_, up_out_;
  FixedSums sums_;
  std::vector<float> scratch_;
};

}  // namespace tessera
