// Large memory: page-aligned, zeroed, touched lazily, huge pages asked for. And how much of it there is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>

#include "base/error.h"

namespace tessera {

// The least multiple of `unit` that is not below n >= 0.
template <typename T>
constexpr T RoundUp(T n, std::type_identity_t<T> unit) {
  return (n + unit - 1) / unit * unit;
}

// Owns one anonymous mapping. Its bytes read as zero until written and cost nothing until touched. Movable.
class Arena {
 public:
  Arena() = default;
  // kExhausted with the size when the system refuses. `size` may be 0.
  static Result<Arena> Allocate(size_t size_bytes);
  // The same for working memory that was counted before: CHECKs.
  static Arena AllocateOrDie(size_t size_bytes);
  Arena(Arena&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)),
        size_(std::exchange(other.size_, 0)),
        taken_(std::exchange(other.taken_, 0)) {}
  Arena& operator=(Arena&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(size_, other.size_);
    std::swap(taken_, other.taken_);
    return *this;
  }
  ~Arena();

  std::byte* data() const { return base_; }
  size_t size_bytes() const { return size_; }
  // Bump allocation, 64-byte aligned; CHECKs that it fits. One thread.
  std::byte* Take(size_t size_bytes);
  template <typename T>
  std::span<T> TakeArray(size_t count) {
    return {reinterpret_cast<T*>(Take(count * sizeof(T))), count};
  }

 private:
  std::byte* base_ = nullptr;
  size_t size_ = 0;
  size_t taken_ = 0;
};

// Bytes of RAM this process may use: the machine's, or the smallest limit of its cgroups (v1 and v2).
uint64_t MemoryLimitBytes();
// Bytes of it that are free now for a new allocation (available memory, capped by the cgroup's headroom).
uint64_t MemoryAvailableBytes();
// Resident bytes of this process.
uint64_t ResidentBytes();

}  // namespace tessera
