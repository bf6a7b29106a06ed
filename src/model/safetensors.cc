// Reads the header into checked entries. Everything in it is hostile until compared with the real file size.
#include "model/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <optional>

#include "base/check.h"
#include "base/json.h"

namespace tessera {
namespace {

using TensorMap = std::map<std::string, TensorEntry, std::less<>>;

constexpr uint64_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = uint64_t{100} << 20;  // the reference implementation's own limit
constexpr size_t kMaxDimensions = 8;
constexpr size_t kMaxNameBytes = 512;
constexpr std::string_view kMetadata = "__metadata__";

struct DtypeRow {
  std::string_view name;
  Dtype dtype;
  int bytes;
};
constexpr std::array kDtypes = {
    DtypeRow{"BF16", Dtype::kBf16, 2}, DtypeRow{"F16", Dtype::kFp16, 2},
    DtypeRow{"F32", Dtype::kFp32, 4},  DtypeRow{"I8", Dtype::kInt8, 1},
    DtypeRow{"U8", Dtype::kUint8, 1},  DtypeRow{"I32", Dtype::kInt32, 4},
    DtypeRow{"I64", Dtype::kInt64, 8}, DtypeRow{"F8_E4M3", Dtype::kFp8E4m3, 1},
};

const DtypeRow& RowOf(Dtype dtype) {
  const auto row = std::ranges::find(kDtypes, dtype, &DtypeRow::dtype);
  CHECK(row != kDtypes.end());
  return *row;
}

std::optional<uint64_t> Product(uint64_t a, uint64_t b) {
  uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

// A tensor of the header, offsets still relative to the data. `subject` begins every message.
Result<TensorEntry> ParseEntry(const JsonValue& value, const std::string& subject, uint64_t data_bytes) {
  if (!value.is_object()) return Invalid("{}: is {}, an object is wanted", subject, value.Describe());
  const JsonValue* dtype = value.Find("dtype");
  const JsonValue* shape = value.Find("shape");
  const JsonValue* offsets = value.Find("data_offsets");
  if (dtype == nullptr || shape == nullptr || offsets == nullptr || value.members().size() != 3) {
    return Invalid("{}: must have exactly dtype, shape and data_offsets", subject);
  }
  TensorEntry entry;
  const auto row = std::ranges::find(kDtypes, dtype->text(), &DtypeRow::name);
  if (!dtype->is_text() || row == kDtypes.end()) {
    return Invalid("{}: dtype {} is not supported (BF16, F16, F32, F8_E4M3, I8, U8, I32 and I64 are read)",
                   subject, dtype->Describe());
  }
  entry.dtype = row->dtype;
  if (!shape->is_array() || shape->items().size() > kMaxDimensions) {
    return Invalid("{}: shape is {}, an array of at most {} sizes is wanted", subject, shape->Describe(),
                   kMaxDimensions);
  }
  std::optional<uint64_t> bytes = static_cast<uint64_t>(row->bytes);
  for (const JsonValue& size : shape->items()) {
    if (!size.is_integer() || size.integer() < 0) {
      return Invalid("{}: shape holds {}, sizes are whole numbers from 0", subject, size.Describe());
    }
    entry.shape.push_back(size.integer());
    if (bytes) bytes = Product(*bytes, static_cast<uint64_t>(size.integer()));
  }
  if (!bytes) return Invalid("{}: shape {} overflows 64 bits", subject, entry.shape);
  if (!offsets->is_array() || offsets->items().size() != 2 || !offsets->items()[0].is_integer() ||
      !offsets->items()[1].is_integer() || offsets->items()[0].integer() < 0) {
    return Invalid("{}: data_offsets must be two whole numbers from 0", subject);
  }
  const int64_t begin = offsets->items()[0].integer();
  const int64_t end = offsets->items()[1].integer();
  if (end < begin || static_cast<uint64_t>(end) > data_bytes) {
    return Invalid("{}: data_offsets {} to {} do not lie in the file's {} bytes of data", subject, begin, end,
                   data_bytes);
  }
  if (static_cast<uint64_t>(end - begin) != *bytes) {
    return Invalid("{}: data_offsets span {} bytes, {} of shape {} takes {}", subject, end - begin, row->name,
                   entry.shape, *bytes);
  }
  entry.begin = static_cast<uint64_t>(begin);
  entry.end = static_cast<uint64_t>(end);
  return entry;
}

// Every byte of the data belongs to exactly one tensor.
Status CheckCover(const TensorMap& tensors, uint64_t data_bytes, const std::string& path) {
  std::vector<TensorMap::const_iterator> order;
  order.reserve(tensors.size());
  for (auto at = tensors.begin(); at != tensors.end(); ++at) order.push_back(at);
  std::ranges::sort(order, [](const auto& a, const auto& b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t covered = 0;
  for (const auto& at : order) {
    if (at->second.begin < covered) {
      return Invalid(
          "{}: tensor {} begins at byte {} of the data, inside the tensor before it, which ends at {}", path,
          at->first, at->second.begin, covered);
    }
    if (at->second.begin > covered) {
      return Invalid("{}: bytes {} to {} of the data, before tensor {}, belong to no tensor", path, covered,
                     at->second.begin, at->first);
    }
    covered = at->second.end;
  }
  if (covered != data_bytes) {
    return Invalid("{}: the tensors end at byte {} of the data, the file holds {}", path, covered,
                   data_bytes);
  }
  return {};
}

// Checks __metadata__ (text values only) and refuses golden-stick's packed int4: a tensor that it names.
Status CheckMetadata(const JsonValue& header, const std::string& path) {
  const JsonValue* metadata = header.Find(kMetadata);
  if (metadata == nullptr) return {};
  if (!metadata->is_object()) {
    return Invalid("{}: __metadata__ is {}, an object is wanted", path, metadata->Describe());
  }
  for (const JsonMember& member : metadata->members()) {
    if (!member.value.is_text()) {
      return Invalid("{}: __metadata__.{} is {}, text is wanted", path, Printable(member.key),
                     member.value.Describe());
    }
    if (member.key != kMetadata && header.Find(member.key) != nullptr) {
      return Invalid("{}: tensor {} is named in __metadata__, which marks packed int4: not supported", path,
                     Printable(member.key));
    }
  }
  return {};
}

bool IsPlainName(std::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes &&
         std::ranges::all_of(name, [](unsigned char c) { return c > 0x20 && c < 0x7F; });
}

// The length of the JSON, from the first 8 bytes of the file.
Result<uint64_t> HeaderBytes(std::string_view head, uint64_t file_bytes, const std::string& path) {
  if (head.size() < kLengthBytes || file_bytes < kLengthBytes) {
    return Invalid("{}: {} bytes are too few for a safetensors file", path, file_bytes);
  }
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i)
    length |= uint64_t{static_cast<unsigned char>(head[i])} << (8 * i);
  if (length > kMaxHeaderBytes) {
    return Invalid("{}: a header of {} bytes, at most {} are accepted", path, length, kMaxHeaderBytes);
  }
  if (length > file_bytes - kLengthBytes) {
    return Invalid("{}: a header of {} bytes, but the file has {}", path, length, file_bytes);
  }
  return length;
}

void CheckPart(const TensorEntry& entry, uint64_t offset, uint64_t num_bytes) {
  CHECK_LE(offset, entry.end - entry.begin);
  CHECK_LE(num_bytes, entry.end - entry.begin - offset);
}

}  // namespace

std::string_view DtypeName(Dtype dtype) {
  return RowOf(dtype).name;
}
int DtypeBytes(Dtype dtype) {
  return RowOf(dtype).bytes;
}

Result<TensorMap> ParseSafetensorsHeader(std::string_view head, uint64_t file_bytes,
                                         const std::string& path) {
  ASSIGN_OR_RETURN(const uint64_t header_bytes, HeaderBytes(head, file_bytes, path));
  if (head.size() - kLengthBytes < header_bytes) {
    return Invalid("{}: the header ends after {} of {} bytes", path, head.size() - kLengthBytes,
                   header_bytes);
  }
  const std::string_view text = head.substr(kLengthBytes, header_bytes);
  if (!text.starts_with('{')) return Invalid("{}: the header does not begin with '{{'", path);
  ASSIGN_OR_RETURN(const JsonValue header, ParseJson(text, path + ": the header", {.max_depth = 4}));
  RETURN_IF_ERROR(CheckMetadata(header, path));
  const uint64_t data_begin = kLengthBytes + header_bytes;
  const uint64_t data_bytes = file_bytes - data_begin;
  TensorMap tensors;
  for (const JsonMember& member : header.members()) {
    if (member.key == kMetadata) continue;
    if (!IsPlainName(member.key)) {
      return Invalid("{}: tensor name \"{}\": 1 to {} printable ASCII characters are wanted", path,
                     Printable(member.key), kMaxNameBytes);
    }
    ASSIGN_OR_RETURN(TensorEntry entry,
                     ParseEntry(member.value, path + ": tensor " + member.key, data_bytes));
    entry.file = path;
    tensors.emplace_hint(tensors.end(), member.key, std::move(entry));
  }
  RETURN_IF_ERROR(CheckCover(tensors, data_bytes, path));
  for (auto& [name, entry] : tensors) {
    entry.begin += data_begin;
    entry.end += data_begin;
  }
  return tensors;
}

Result<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  ASSIGN_OR_RETURN(RandomAccessFile file, RandomAccessFile::Open(path));
  std::string head(std::min(kLengthBytes, file.size_bytes()), '\0');
  RETURN_IF_ERROR(file.Read(0, std::as_writable_bytes(std::span(head))));
  ASSIGN_OR_RETURN(const uint64_t header_bytes, HeaderBytes(head, file.size_bytes(), path));
  head.resize(kLengthBytes + header_bytes);
  RETURN_IF_ERROR(file.Read(kLengthBytes, std::as_writable_bytes(std::span(head)).subspan(kLengthBytes)));
  ASSIGN_OR_RETURN(TensorMap tensors, ParseSafetensorsHeader(head, file.size_bytes(), path));
  return SafetensorsFile(std::move(file), std::move(tensors));
}

Status SafetensorsFile::Read(const TensorEntry& entry, std::span<std::byte> target) const {
  CHECK_EQ(target.size(), entry.end - entry.begin);
  return file_.Read(entry.begin, target);
}

Status SafetensorsFile::ReadPart(const TensorEntry& entry, uint64_t offset,
                                 std::span<std::byte> target) const {
  CheckPart(entry, offset, target.size());
  return file_.Read(entry.begin + offset, target);
}

void SafetensorsFile::Prefetch(const TensorEntry& entry, uint64_t offset, uint64_t num_bytes) const {
  CheckPart(entry, offset, num_bytes);
  file_.Prefetch(entry.begin + offset, num_bytes);
}

}  // namespace tessera
