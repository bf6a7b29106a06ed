// Values to bytes and back, little-endian, for frames between processes. The reader never reads beyond its
// span: it fails once and for all, and says so at the end.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "base/error.h"

namespace tessera {

static_assert(std::endian::native == std::endian::little);

template <typename T>
concept Plain = std::is_trivially_copyable_v<T> && !std::is_pointer_v<T>;

class ByteWriter {
 public:
  template <Plain T>
  void Write(const T& value) {
    const auto* from = reinterpret_cast<const std::byte*>(&value);
    bytes_.insert(bytes_.end(), from, from + sizeof(T));
  }
  // Length, then the elements.
  template <Plain T>
  void WriteArray(std::span<const T> values) {
    Write(static_cast<uint64_t>(values.size()));
    const auto from = std::as_bytes(values);
    bytes_.insert(bytes_.end(), from.begin(), from.end());
  }
  template <Plain T>
  void WriteArray(const std::vector<T>& values) {
    WriteArray(std::span<const T>(values));
  }
  void WriteText(std::string_view text) { WriteArray(std::span<const char>(text)); }

  const std::vector<std::byte>& bytes() const { return bytes_; }
  std::vector<std::byte> Take() { return std::move(bytes_); }

 private:
  std::vector<std::byte> bytes_;
};

class ByteReader {
 public:
  explicit ByteReader(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <Plain T>
  T Read() {
    T value{};
    if (Has(1, sizeof(T))) {
      std::memcpy(&value, rest_.data(), sizeof(T));
      rest_ = rest_.subspan(sizeof(T));
    }
    return value;
  }
  // The length is checked against what is left before anything is allocated.
  template <Plain T>
  std::vector<T> ReadArray() {
    const auto count = Read<uint64_t>();
    std::vector<T> values;
    if (Has(count, sizeof(T)) && count > 0) {
      values.resize(count);
      std::memcpy(values.data(), rest_.data(), count * sizeof(T));
      rest_ = rest_.subspan(count * sizeof(T));
    }
    return values;
  }
  std::string ReadText() {
    const std::vector<char> text = ReadArray<char>();
    return {text.begin(), text.end()};
  }
  // A count of things that take at least `min_bytes` each: 0 and failed when they cannot be there.
  uint64_t ReadCount(size_t min_bytes) {
    const auto count = Read<uint64_t>();
    return Has(count, min_bytes) ? count : 0;
  }

  bool ok() const { return ok_; }
  // Everything was there, and nothing is left; `what` names the message.
  Status Finish(std::string_view what) const {
    if (!ok_) return Invalid("{} ends too early", what);
    if (!rest_.empty()) return Invalid("{} has {} bytes too many", what, rest_.size());
    return {};
  }

 private:
  bool Has(uint64_t count, size_t each) {
    if (ok_ && count > rest_.size() / each) ok_ = false;
    return ok_;
  }
  std::span<const std::byte> rest_;
  bool ok_ = true;
};

}  // namespace tessera
