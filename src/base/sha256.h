// SHA-256, for cache keys, key comparison and test hashes, and what proves a shared secret. OpenSSL stays in
// sha256.cc.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace tessera {

using Sha256 = std::array<uint8_t, 32>;

Sha256 HashSha256(std::span<const std::byte> bytes);
Sha256 HmacSha256(std::span<const std::byte> key, std::span<const std::byte> bytes);
// From the system's source of secrets; at most INT_MAX bytes.
void FillRandom(std::span<std::byte> bytes);
std::string Hex(std::span<const uint8_t> bytes);
// Same time for any two digests.
bool EqualConstantTime(const Sha256& a, const Sha256& b);

}  // namespace tessera
