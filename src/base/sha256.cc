// The bridge onto OpenSSL's libcrypto.
#include "base/sha256.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <openssl/sha.h>

#include "base/check.h"
#include "base/format.h"

namespace tessera {

Sha256 HashSha256(std::span<const std::byte> bytes) {
  Sha256 digest;
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), digest.data());
  return digest;
}

Sha256 HmacSha256(std::span<const std::byte> key, std::span<const std::byte> bytes) {
  Sha256 digest;
  unsigned size = 0;
  // OpenSSL takes a null key for "the one before".
  const unsigned char* key_bytes =
      key.empty() ? digest.data() : reinterpret_cast<const unsigned char*>(key.data());
  const auto* text = reinterpret_cast<const unsigned char*>(bytes.data());
  const bool done = HMAC(EVP_sha256(), key_bytes, static_cast<int>(key.size()), text, bytes.size(),
                         digest.data(), &size) != nullptr;
  CHECK(done && size == digest.size());
  return digest;
}

void FillRandom(std::span<std::byte> bytes) {
  CHECK_EQ(RAND_bytes(reinterpret_cast<unsigned char*>(bytes.data()), static_cast<int>(bytes.size())), 1);
}

std::string Hex(std::span<const uint8_t> bytes) {
  return Format("{:02x}", fmt::join(bytes, ""));
}

bool EqualConstantTime(const Sha256& a, const Sha256& b) {
  return CRYPTO_memcmp(a.data(), b.data(), a.size()) == 0;
}

}  // namespace tessera
