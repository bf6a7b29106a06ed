// Are these the tensors of this model? Compares what the files hold with the table of tensor_table.h and with
// the quantisation description. Pure: no file is touched. Called by checkpoint.cc alone.
#pragma once

#include <map>
#include <string>

#include "base/error.h"
#include "model/checkpoint.h"
#include "model/config.h"
#include "model/safetensors.h"

namespace tessera {

using TensorMap = std::map<std::string, TensorEntry, std::less<>>;

// A description JSON: tensor -> "FLOAT", "W8A8", "W8A8_DYNAMIC". `path` is empty where the folder has none.
struct QuantDescription {
  std::string path;
  std::map<std::string, std::string, std::less<>> kinds;
};

struct CheckedTensors {
  std::map<std::string, Scheme, std::less<>>
      schemes;              // every linear of the main layers, named without ".weight"
  uint64_t main_bytes = 0;  // of the main layers' tensors
  bool has_mtp = false;
  bool quantised = false;  // some linear is int8
};

// kInvalid names the tensor and the file (the folder, for a missing one): missing, surplus, wrong dtype or
// shape, in contradiction to the description or to its packed siblings, or of a format that is not supported.
Result<CheckedTensors> CheckTensors(const TensorMap& tensors, const QuantDescription& description,
                                    const ModelConfig& config, const std::string& folder);

}  // namespace tessera
