// The table of a model's tensors as Hugging Face names them, before any quantisation: name, shape, kind. One
// place for the reader's checks (checkpoint.cc) and the writer of random checkpoints. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"

namespace tessera {

enum class TensorKind {
  kNorm,        // RMSNorm weight: bf16, fp16 or fp32
  kMatrix,      // bf16 in every format: embedding, lm_head, kv_b, eh_proj
  kRouter,      // bf16 or fp32
  kRouterBias,  // fp32 (or bf16)
  kLinear,      // bf16, or int8 with its scales
};

struct ModelTensor {
  std::string name;  // "model.layers.0.self_attn.q_a_proj.weight"
  std::vector<int64_t> shape;
  TensorKind kind = TensorKind::kMatrix;
};

std::string LayerPrefix(int layer);  // "model.layers.3."

// All tensors of the main model; of one decoder layer (also part of an MTP layer, which is always MoE); and
// of one MTP layer, layer >= config.num_layers.
std::vector<ModelTensor> MainTensors(const ModelConfig& config);
std::vector<ModelTensor> LayerTensors(const ModelConfig& config, int layer);
std::vector<ModelTensor> MtpTensors(const ModelConfig& config, int layer);

}  // namespace tessera
