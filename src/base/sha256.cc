// The bridge onto OpenSSL's libcrypto.
#include "base/sha256.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include "base/format.h"

namespace tessera {

Sha256 HashSha256(std::span<const std::byte> bytes) {
  Sha256 digest;
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest.data());
  return digest;
}

std::string Hex(std::span<const uint8_t> bytes) {
  return Format("{:02x}", fmt::join(bytes, ""));
}

bool EqualConstantTime(const Sha256& a, const Sha256& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace tessera
