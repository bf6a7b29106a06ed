// The main layers of a W8A8 model as the GGUF file that llama.cpp loads: architecture `deepseek2`, in the
// form with separate attn_k_b and attn_v_b, without tokenizer and MTP layers. Linears, embedding and lm_head
// are Q8_0 with one scale per row, norms and router fp32. Rows come from random_checkpoint.cc as they are
// made.
#pragma once

#include <map>
#include <optional>
#include <span>
#include <string>

#include "base/error.h"
#include "model/config.h"
#include "model/gguf_writer.h"

namespace tessera {

class GgufModel {
 public:
  // Creates the file. kInvalid names a dimension that Q8_0 cannot hold (a K axis that 32 does not divide),
  // rope scaling that the format has no words for, or the path that cannot be created.
  static Result<GgufModel> Create(const std::string& path, const ModelConfig& config);

  // The next three take the checkpoint's name of a tensor (tensor_table.h) and are thread-safe.
  bool Has(const std::string& tensor) const { return places_.contains(tensor); }
  // Of a norm, a router or its bias.
  Status WriteFloats(const std::string& tensor, int64_t first, std::span<const float> values) const;
  // Of any other: rows [count, K] and a scale for each. Of kv_b: whole heads, with one scale for all rows.
  Status WriteRows(const std::string& tensor, int64_t first_row, std::span<const int8_t> codes,
                   std::span<const float> scales) const;

  uint64_t num_bytes() const { return writer_.num_bytes(); }

 private:
  struct Place {
    std::string tensor;     // its name in the file; for kv_b the prefix of attn_k_b and attn_v_b
    int64_t first_row = 0;  // experts lie one after the other in one tensor
    bool is_kv_b = false;
  };
  explicit GgufModel(const ModelConfig& config) : config_(config) {}
  void AddMetadata();
  void AddTensors();
  Status WriteHeads(const std::string& prefix, int64_t first_head, std::span<const int8_t> codes,
                    float scale) const;

  ModelConfig config_;
  GgufWriter writer_;
  std::map<std::string, Place> places_;
};

}  // namespace tessera
