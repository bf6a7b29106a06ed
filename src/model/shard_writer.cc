// In a file, tensors lie by falling size of their dtype, then by name, so that each is aligned to its dtype.
#include "model/shard_writer.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "base/check.h"
#include "base/file.h"

namespace tessera {

void ShardWriter::Add(std::string name, Dtype dtype, std::vector<int64_t> shape) {
  auto num_bytes = static_cast<uint64_t>(DtypeBytes(dtype));
  for (const int64_t size : shape) num_bytes *= static_cast<uint64_t>(size);
  num_bytes_ += num_bytes;
  tensors_.push_back({std::move(name), dtype, std::move(shape), num_bytes});
}

Status ShardWriter::Create(const std::string& folder, const std::string& stem, const std::string& index_name,
                           uint64_t max_shard_bytes) {
  std::vector<std::span<const Tensor>> shards;
  for (size_t begin = 0; begin < tensors_.size();) {
    size_t end = begin;
    uint64_t bytes = 0;
    while (end < tensors_.size() && (end == begin || bytes + tensors_[end].num_bytes <= max_shard_bytes)) {
      bytes += tensors_[end++].num_bytes;
    }
    shards.push_back(std::span<const Tensor>(tensors_).subspan(begin, end - begin));
    begin = end;
  }
  std::string map;
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1
                                 ? stem + ".safetensors"
                                 : Format("{}-{:05}-of-{:05}.safetensors", stem, i + 1, shards.size());
    RETURN_IF_ERROR(CreateFile(folder + "/" + name, shards[i]));
    for (const Tensor& tensor : shards[i]) {
      map += Format("{}  \"{}\": \"{}\"", map.empty() ? "" : ",\n", tensor.name, name);
    }
  }
  return WriteFile(folder + "/" + index_name,
                   Format("{{\n \"metadata\": {{\"total_size\": {}}},\n \"weight_map\": {{\n{}\n }}\n}}\n",
                          num_bytes_, map));
}

Status ShardWriter::CreateFile(const std::string& path, std::span<const Tensor> tensors) {
  std::vector<const Tensor*> order;
  for (const Tensor& tensor : tensors) order.push_back(&tensor);
  std::ranges::sort(order, {}, [](const Tensor* tensor) {
    return std::tuple(-DtypeBytes(tensor->dtype), std::string_view(tensor->name));
  });
  std::string header = R"({"__metadata__": {"format": "pt"})";
  uint64_t at = 0;
  for (const Tensor* tensor : order) {
    header += Format(R"(, "{}": {{"dtype": "{}", "shape": [{}], "data_offsets": [{}, {}]}})", tensor->name,
                     DtypeName(tensor->dtype), fmt::join(tensor->shape, ", "), at, at + tensor->num_bytes);
    at += tensor->num_bytes;
  }
  header += '}';
  header.append((8 - header.size() % 8) % 8, ' ');
  const uint64_t length = header.size();
  std::string head(8, '\0');
  for (size_t i = 0; i < 8; ++i) head[i] = static_cast<char>(length >> (8 * i));
  head += header;

  ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create(path, head.size() + at));
  uint64_t begin = head.size();
  for (const Tensor* tensor : order) {
    const bool added = places_.emplace(tensor->name, Place{files_.size(), begin, tensor->num_bytes}).second;
    CHECK(added);
    begin += tensor->num_bytes;
  }
  files_.push_back(std::move(file));
  return files_.back().Write(0, std::as_bytes(std::span(head)));
}

Status ShardWriter::Write(std::string_view name, uint64_t offset, std::span<const std::byte> bytes) const {
  const auto at = places_.find(name);
  CHECK(at != places_.end());
  CHECK_LE(offset + bytes.size(), at->second.num_bytes);
  return files_[at->second.file].Write(at->second.begin + offset, bytes);
}

}  // namespace tessera
