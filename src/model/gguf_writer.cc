// See gguf_writer.h. Little-endian; tensors begin at multiples of 32 bytes, in the order in which they were
// added.
#include "model/gguf_writer.h"

#include <bit>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace tessera {
namespace {

constexpr uint32_t kVersion = 3;
constexpr uint64_t kAlignment = 32;
constexpr size_t kBlockBytes = 2 + kGgufBlock;
constexpr uint32_t kKeyUint32 = 4, kKeyFp32 = 6, kKeyBool = 7, kKeyText = 8;
constexpr float kSmallestFp16 = 0x1p-14f;
constexpr uint32_t kDroppedBits = (1u << 13) - 1;  // of an fp32 significand beyond fp16's

uint64_t Aligned(uint64_t offset) {
  return (offset + kAlignment - 1) / kAlignment * kAlignment;
}

uint16_t Fp16Bits(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  CHECK((bits & kDroppedBits) == 0 && value >= kSmallestFp16 && value <= 65504.0f);
  return static_cast<uint16_t>((bits >> 13) - ((127 - 15) << 10));
}

int64_t NumElements(const std::vector<int64_t>& shape) {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

}  // namespace

float RoundUpToFp16(float value) {
  if (value <= kSmallestFp16) return kSmallestFp16;
  return std::bit_cast<float>((std::bit_cast<uint32_t>(value) + kDroppedBits) & ~kDroppedBits);
}

void GgufWriter::AddKey(std::string_view key, uint32_t type) {
  metadata_.WriteText(key);
  metadata_.Write(type);
  ++num_keys_;
}

void GgufWriter::AddText(std::string_view key, std::string_view value) {
  AddKey(key, kKeyText);
  metadata_.WriteText(value);
}

void GgufWriter::AddUint32(std::string_view key, uint32_t value) {
  AddKey(key, kKeyUint32);
  metadata_.Write(value);
}

void GgufWriter::AddFloat(std::string_view key, float value) {
  AddKey(key, kKeyFp32);
  metadata_.Write(value);
}

void GgufWriter::AddBool(std::string_view key, bool value) {
  AddKey(key, kKeyBool);
  metadata_.Write(static_cast<uint8_t>(value));
}

void GgufWriter::AddTensor(const std::string& name, GgufType type, std::vector<int64_t> shape) {
  CHECK(type != GgufType::kQ8 || shape.back() % kGgufBlock == 0);
  const auto count = static_cast<uint64_t>(NumElements(shape));
  const uint64_t num_bytes = type == GgufType::kQ8 ? count / kGgufBlock * kBlockBytes : count * sizeof(float);
  const uint64_t begin = Aligned(num_bytes_);
  table_.WriteText(name);
  table_.Write(static_cast<uint32_t>(shape.size()));
  for (size_t i = shape.size(); i-- > 0;) table_.Write(static_cast<uint64_t>(shape[i]));
  table_.Write(type);
  table_.Write(begin);
  num_bytes_ = begin + num_bytes;
  const bool added = tensors_.emplace(name, Tensor{type, std::move(shape), begin, num_bytes}).second;
  CHECK(added);
}

Status GgufWriter::Create(const std::string& path) {
  std::string head = "GGUF";
  const auto append = [&head](const ByteWriter& part) {
    head.append(reinterpret_cast<const char*>(part.bytes().data()), part.bytes().size());
  };
  ByteWriter counts;
  counts.Write(kVersion);
  counts.Write(static_cast<uint64_t>(tensors_.size()));
  counts.Write(num_keys_);
  append(counts);
  append(metadata_);
  append(table_);
  head.resize(Aligned(head.size()), '\0');
  for (auto& [name, tensor] : tensors_) tensor.begin += head.size();
  ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create(path, head.size() + Aligned(num_bytes_)));
  file_.emplace(std::move(file));
  return file_->Write(0, std::as_bytes(std::span(head)));
}

const GgufWriter::Tensor& GgufWriter::Find(std::string_view name, GgufType type) const {
  const auto at = tensors_.find(name);
  CHECK(at != tensors_.end());
  CHECK(at->second.type == type && file_.has_value());
  return at->second;
}

Status GgufWriter::WriteFloats(std::string_view name, int64_t first, std::span<const float> values) const {
  const Tensor& tensor = Find(name, GgufType::kFp32);
  const uint64_t offset = static_cast<uint64_t>(first) * sizeof(float);
  CHECK_LE(offset + values.size_bytes(), tensor.num_bytes);
  return file_->Write(tensor.begin + offset, std::as_bytes(values));
}

Status GgufWriter::WriteRows(std::string_view name, int64_t first_row, std::span<const int8_t> codes,
                             std::span<const float> scales) const {
  const Tensor& tensor = Find(name, GgufType::kQ8);
  const auto blocks = static_cast<size_t>(tensor.shape.back()) / kGgufBlock;  // of a row
  CHECK_EQ(codes.size(), scales.size() * blocks * kGgufBlock);
  const uint64_t offset = static_cast<uint64_t>(first_row) * blocks * kBlockBytes;
  std::vector<std::byte> bytes(scales.size() * blocks * kBlockBytes);
  CHECK_LE(offset + bytes.size(), tensor.num_bytes);
  std::byte* to = bytes.data();
  const int8_t* from = codes.data();
  for (const float scale : scales) {
    const uint16_t bits = Fp16Bits(scale);
    for (size_t block = 0; block < blocks; ++block) {
      std::memcpy(to, &bits, sizeof(bits));
      std::memcpy(to + sizeof(bits), from, kGgufBlock);
      to += kBlockBytes;
      from += kGgufBlock;
    }
  }
  return file_->Write(tensor.begin + offset, bytes);
}

}  // namespace tessera
