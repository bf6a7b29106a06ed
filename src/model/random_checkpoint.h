// Seeded random checkpoints of any dimensions: test models and the comparison shape of the benchmarks. Writes
// a folder that can be loaded and served. Called by `tessera make-random` and by tests.
//
// Every element is a function of (seed, tensor name, index) alone, so bf16 and W8A8 folders of one seed are
// the same model, and nothing large is held in memory. No libm is used: the bytes are equal on every machine.
//
// W8A8 folders hold no number that GGUF's Q8_0 with one scale per row cannot: an int8 row's scale fits fp16,
// and the matrices that stay bf16 (embedding, kv_b, lm_head) are int8 codes times one power of two. So the
// same weights can be written for llama.cpp too, and the two engines compared.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "model/config.h"

namespace tessera {

// kW8a8: the ModelSlim layout of models/tiny-r1: static attention (with beta, offset, quant_bias), dynamic
// FFN, two indexes, description, MTP layer in bf16.
enum class RandomFormat { kBf16, kW8a8 };

struct RandomCheckpointOptions {
  ModelConfig config;  // every dimension; quant_method is ignored
  RandomFormat format = RandomFormat::kBf16;
  uint64_t seed = 0;
  bool noise = true;  // norm weights 1 + N(0, 0.1) instead of 1
  double embedding_deviation = 0.02;
  std::string tokenizer_folder;  // its tokenizer is copied; empty: a byte-level one is written
  uint64_t max_shard_bytes = uint64_t{4} << 30;
  std::string gguf;  // path of a GGUF file of the same main layers (gguf_model.h); empty: none. kW8a8 only
};

// "toy" (24 M parameters), "odd" (dimensions that no vector width divides, embedding std 2;
// the model of the bf16 goldens) or "r1-slice"
// (five layers at R1's widths, 7.4 G parameters; norms are 1; W8A8, the others bf16).
Result<RandomCheckpointOptions> RandomPreset(std::string_view name);

// The table behind the flags: one entry for every dimension, named as a flag is ("hidden-size").
struct RandomDimension {
  std::string_view name;
  std::string_view help;
  bool integral = true;
  double (*get)(const ModelConfig& config) = nullptr;
  void (*set)(ModelConfig& config, double value) = nullptr;
};
std::span<const RandomDimension> RandomDimensions();
// Sets one of them. kInvalid names an unknown dimension, or a fraction where a whole number is wanted.
Status SetDimension(RandomCheckpointOptions& options, std::string_view name, double value);

struct RandomCheckpointSize {
  uint64_t num_parameters = 0;  // of the main layers, before quantisation
  uint64_t num_bytes = 0;       // of all tensors in the folder
  uint64_t num_gguf_bytes = 0;
};
// `folder` is created, or must be empty. kInvalid as ParseModelConfig is for dimensions that no model may
// have, when the vocabulary is smaller than the tokenizer, and as GgufModel::Create. `progress` gets (bytes
// done, bytes in all) from the calling thread; it may be empty.
Result<RandomCheckpointSize> WriteRandomCheckpoint(const std::string& folder,
                                                   const RandomCheckpointOptions& options,
                                                   const std::function<void(uint64_t, uint64_t)>& progress);

}  // namespace tessera
