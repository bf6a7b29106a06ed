// The weights that one rank holds of the main model, packed for the kernels. One Arena holds all large
// arrays; only the rank's slices are read, and nothing else of the checkpoint stays. Immutable after Load;
// any thread.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "base/threads.h"
#include "kernels/kernels.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/share.h"

namespace tessera {

// This rank's part of one linear, y = x W^T, in the scheme its checkpoint uses. Column-parallel linears are
// cut by outputs and have one leaf; row-parallel ones (o_proj, every down_proj) are cut by leaves, of which a
// whole one has kernels::kNumLeaves. A part may be empty.
struct Linear {
  Scheme scheme = Scheme::kBf16;
  int num_outputs = 0;
  int k = 0;  // of this part
  int num_leaves = 1;
  kernels::PackedBf16 bf16;          // kBf16
  kernels::PackedInt8 int8;          // kInt8Static, kInt8Dynamic
  std::vector<float> weight_scale;   // kInt8Dynamic [num_outputs]
  std::vector<int32_t> quant_bias;   // kInt8Static [num_outputs]; zeros where another rank holds leaf 0
  std::vector<float> deq_scale;      // kInt8Static [num_outputs]
  std::vector<float> inverse_scale;  // kInt8Static: fp32(1 / input_scale), 1 value or [k]
  float zero_point = 0;              // kInt8Static
  std::vector<float> beta;           // kInt8Static [k], or empty: added to the input before quantising
  bool empty() const { return num_outputs == 0 || k == 0; }
  int num_panels() const { return scheme == Scheme::kBf16 ? bf16.num_panels() : int8.num_panels(); }
  int panel_columns() const { return scheme == Scheme::kBf16 ? kernels::kFloatPanel : kernels::kInt8Panel; }
};

struct FeedForward {
  Linear gate, up, down;
  bool empty() const { return gate.empty(); }
};

struct LayerWeights {
  std::vector<float> input_norm, q_a_norm, kv_a_norm, post_attention_norm;
  Linear q_a, q_b, kv_a, o;
  std::vector<kernels::PackedBf16> key_up;         // per own head: Wk^T, R outputs over n inputs
  std::vector<kernels::PackedBf16> key_of_latent;  // per own head: Wk, n outputs over R inputs
  std::vector<kernels::PackedBf16> value_up;       // per own head: Wv, v outputs over R inputs
  FeedForward dense;                               // layers below first_k_dense_replace
  kernels::PackedFloat router;                     // the others: whole on every rank
  std::vector<float> router_bias;                  // [n_routed_experts]
  std::vector<FeedForward> experts;                // [share.experts.size()]
  FeedForward shared;  // n_shared_experts times moe_intermediate_size wide, before it is cut
};

struct Weights {
  RankShare share;
  Arena arena;
  const kernels::Bf16* embedding = nullptr;  // [share.embedding.size()][hidden_size]
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;
  kernels::PackedBf16 lm_head;  // share.head.size() outputs
  uint64_t size_bytes = 0;      // of everything above

  // Reads, checks (finite, bounds of quant_bias) and packs. `progress` gets (bytes done, bytes in all) from
  // one thread. Errors name the tensor and the file.
  static Result<Weights> Load(const Checkpoint& checkpoint, const ModelConfig& config, const RankShare& share,
                              ThreadPool& threads,
                              const std::function<void(uint64_t done, uint64_t total)>& progress);
};

// What Load would hold, without a checkpoint: name, the part of it, and its bytes once packed.
struct HeldTensor {
  std::string name;
  Slice rows, columns;
  uint64_t bytes = 0;
};
std::vector<HeldTensor> ListHeldTensors(const ModelConfig& config, const RankShare& share,
                                        const std::function<Scheme(std::string_view linear)>& scheme_of);

}  // namespace tessera
