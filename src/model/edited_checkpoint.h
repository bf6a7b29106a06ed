// For tests: a small random checkpoint in a folder of its own, whose tensors and texts can be changed one by
// one.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/file.h"
#include "model/checkpoint.h"
#include "model/random_checkpoint.h"
#include "model/shard_writer.h"

namespace tessera {

class EditedCheckpoint {
 public:
  struct Tensor {
    Dtype dtype = Dtype::kBf16;
    std::vector<int64_t> shape;
    std::vector<std::byte> bytes;
  };

  static constexpr const char* kDescription = "quant_model_description.json";
  static constexpr const char* kQuantIndex = "quant_model_weight_w8a8_dynamic.index.json";
  static constexpr const char* kPlainIndex = "model.safetensors.index.json";

  explicit EditedCheckpoint(RandomFormat format) {
    std::string pattern = ::testing::TempDir() + "edited_XXXXXX";
    root_ = mkdtemp(pattern.data());
    folder_ = root_ + "/model";
    RandomCheckpointOptions options = RandomPreset("odd").value();
    options.format = format;
    EXPECT_TRUE(WriteRandomCheckpoint(folder_, options, {}));
    if (format == RandomFormat::kW8a8) {
      main_stem_ = "quant_model_weight_w8a8_dynamic";
      main = ReadFileTensors("quant_model_weight_w8a8_dynamic");
      mtp = ReadFileTensors("mtp");
    } else {
      main = ReadFileTensors("model");
    }
  }
  ~EditedCheckpoint() { std::filesystem::remove_all(root_); }
  EditedCheckpoint(const EditedCheckpoint&) = delete;
  EditedCheckpoint& operator=(const EditedCheckpoint&) = delete;

  const std::string& folder() const { return folder_; }

  // Writes the tensors of `main` and `mtp` as they are now, with their indexes.
  void Save() const {
    const bool plain = main_stem_ == "model";
    WriteTensors(main, main_stem_, plain ? kPlainIndex : kQuantIndex);
    if (!plain) WriteTensors(mtp, "mtp", kPlainIndex);
  }
  std::string Text(const std::string& name) const { return ReadFile(folder_ + "/" + name).value(); }
  void SetText(const std::string& name, const std::string& text) const {
    EXPECT_TRUE(WriteFile(folder_ + "/" + name, text));
  }
  void Replace(const std::string& name, const std::string& from, const std::string& to) const {
    std::string text = Text(name);
    const size_t at = text.find(from);
    ASSERT_NE(at, std::string::npos) << from;
    SetText(name, text.replace(at, from.size(), to));
  }
  // Forgets that the description ever named tensors that begin so.
  void Undescribe(const std::string& prefix) const {
    std::string text = Text(kDescription);
    for (size_t at; (at = text.find("\"" + prefix)) != std::string::npos;) {
      size_t begin = text.rfind(',', at);
      text.erase(begin, text.find_first_of(",}", at) - begin);
    }
    SetText(kDescription, text);
  }

  Result<Checkpoint> Open(std::string_view quantization = "") const {
    auto config = LoadModelConfig(folder_);
    if (!config) return std::unexpected(config.error());
    return Checkpoint::Open(folder_, *config, quantization);
  }
  // The message of the refusal, or "".
  std::string Refusal(std::string_view quantization = "") const {
    const auto checkpoint = Open(quantization);
    return checkpoint ? "" : checkpoint.error().message;
  }

  template <typename T>
  static void Set(Tensor& tensor, size_t index, T value) {
    ASSERT_LE((index + 1) * sizeof(T), tensor.bytes.size());
    std::memcpy(&tensor.bytes[index * sizeof(T)], &value, sizeof(T));
  }
  template <typename T>
  static Tensor Make(Dtype dtype, std::vector<int64_t> shape, const std::vector<T>& values) {
    Tensor tensor{dtype, std::move(shape), std::vector<std::byte>(values.size() * sizeof(T))};
    std::memcpy(tensor.bytes.data(), values.data(), tensor.bytes.size());
    return tensor;
  }

  std::map<std::string, Tensor> main, mtp;

 private:
  std::map<std::string, Tensor> ReadFileTensors(const std::string& stem) const {
    const auto file = SafetensorsFile::Open(folder_ + "/" + stem + ".safetensors");
    EXPECT_TRUE(file) << file.error().message;
    std::map<std::string, Tensor> tensors;
    for (const auto& [name, entry] : file->tensors()) {
      Tensor& tensor = tensors[name];
      tensor = {entry.dtype, entry.shape, std::vector<std::byte>(entry.end - entry.begin)};
      EXPECT_TRUE(file->Read(entry, tensor.bytes));
    }
    return tensors;
  }
  void WriteTensors(const std::map<std::string, Tensor>& tensors, const std::string& stem,
                    const std::string& index) const {
    std::filesystem::remove(folder_ + "/" + stem + ".safetensors");
    ShardWriter writer;
    for (const auto& [name, tensor] : tensors) writer.Add(name, tensor.dtype, tensor.shape);
    EXPECT_TRUE(writer.Create(folder_, stem, index, UINT64_MAX));
    for (const auto& [name, tensor] : tensors) EXPECT_TRUE(writer.Write(name, 0, tensor.bytes));
  }

  std::string root_;
  std::string folder_;
  std::string main_stem_ = "model";
};

}  // namespace tessera
