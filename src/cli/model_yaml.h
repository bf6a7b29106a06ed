// The YAML that MINDFORMERS_MODEL_CONFIG names (MindSpore Transformers, research/deepseek3): what of it
// governs serving. Keys that only its original needs are accepted and not looked at.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/error.h"
#include "model/config.h"

namespace tessera::cli {

struct ModelYaml {
  std::string path;
  // parallel_config; absent where the key is.
  std::optional<int64_t> data_parallel, model_parallel, pipeline_stage, expert_parallel;
  bool vocab_emb_dp = false;
  bool is_quantized = false;       // quant_method: ptq, which is ModelSlim W8A8
  std::vector<std::string> notes;  // values that change nothing here
};

// kInvalid: not such a file; a value of another type than wanted; a quant_method that is not supported;
// sizes, eps, rope or MoE values that differ from config.json (both values are named).
Result<ModelYaml> ReadModelYaml(const std::string& path, const ModelConfig& config);

}  // namespace tessera::cli
