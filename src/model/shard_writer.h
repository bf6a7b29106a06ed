// Writes safetensors shards and their index: first all names, dtypes and shapes, then bytes in any order from
// any thread. Holds no tensor in memory. The reading side is safetensors.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "model/output_file.h"
#include "model/safetensors.h"

namespace tessera {

class ShardWriter {
 public:
  // Before Create. A name is added once.
  void Add(std::string name, Dtype dtype, std::vector<int64_t> shape);
  bool empty() const { return tensors_.empty(); }
  uint64_t num_bytes() const { return num_bytes_; }

  // Cuts the tensors, in the order in which they were added, into files of at most `max_shard_bytes` (a
  // larger tensor has its own): STEM.safetensors, or STEM-00001-of-00003.safetensors and so on. Writes their
  // headers and the index; all tensors then read as zero. kInvalid names the file that cannot be written.
  Status Create(const std::string& folder, const std::string& stem, const std::string& index_name,
                uint64_t max_shard_bytes);
  // Bytes of a tensor from `offset` on. Thread-safe. REQUIRES: they lie in the tensor.
  Status Write(std::string_view name, uint64_t offset, std::span<const std::byte> bytes) const;

 private:
  struct Tensor {
    std::string name;
    Dtype dtype = Dtype::kBf16;
    std::vector<int64_t> shape;
    uint64_t num_bytes = 0;
  };
  struct Place {
    size_t file = 0;
    uint64_t begin = 0;  // in the file
    uint64_t num_bytes = 0;
  };

  Status CreateFile(const std::string& path, std::span<const Tensor> tensors);

  std::vector<Tensor> tensors_;
  uint64_t num_bytes_ = 0;
  std::vector<OutputFile> files_;
  std::map<std::string, Place, std::less<>> places_;
};

}  // namespace tessera
