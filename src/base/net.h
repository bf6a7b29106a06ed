// Stream sockets whose every wait has a deadline. No protocol.
#pragma once

#include <chrono>
#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "base/error.h"

namespace tessera {

using Deadline = std::chrono::steady_clock::time_point;
inline Deadline After(std::chrono::milliseconds time) {
  return std::chrono::steady_clock::now() + time;
}

// Owns a descriptor, non-blocking and close-on-exec. Movable.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int descriptor) : descriptor_(descriptor) {}
  Socket(Socket&& other) noexcept : descriptor_(std::exchange(other.descriptor_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(descriptor_, other.descriptor_);
    return *this;
  }
  ~Socket();

  int descriptor() const { return descriptor_; }
  bool open() const { return descriptor_ >= 0; }
  // Both directions: whoever waits on it, here or there, sees the end. Any thread.
  void Shutdown() const;

 private:
  int descriptor_ = -1;
};

// "10.0.0.1:8000" or "[::1]:8000".
struct Endpoint {
  std::string address;
  int port = 0;
  std::string Text() const;
};
Result<Endpoint> ParseEndpoint(const std::string& text);

// Listens on one address, never on all interfaces: 0.0.0.0 and :: are refused. Port 0: any free one.
Result<Socket> Listen(const Endpoint& endpoint);
Result<Endpoint> LocalEndpoint(const Socket& socket);
Result<Endpoint> PeerEndpoint(const Socket& socket);
// kDeadline when nobody came.
Result<Socket> Accept(const Socket& listener, Deadline deadline);
// One try; kUnavailable names the endpoint and the reason. `source` (may be empty): local address to come
// from.
Result<Socket> Connect(const Endpoint& endpoint, Deadline deadline, const std::string& source = {});
// A connected pair for a child process: the second end is inherited (not close-on-exec).
Result<std::pair<Socket, Socket>> SocketPair();

// kUnavailable when the other side closed, kDeadline when the time ran out.
Status WriteAll(const Socket& socket, std::span<const std::byte> bytes, Deadline deadline);
Status ReadAll(const Socket& socket, std::span<std::byte> bytes, Deadline deadline);

// The IPv4 address of a network interface; kInvalid names it and those that exist.
Result<std::string> InterfaceAddress(const std::string& interface);
bool IsLoopback(const std::string& address);
std::string HostName();  // for messages; never tells hosts apart

// Both ends know the same secret, without sending it: each answers the other's random challenge by
// HMAC-SHA256. Both sides of a connection call this; an empty secret is a secret like any other. kUnavailable
// when the secrets differ. `role`: 0 or 1, one of each; an answer cannot be reflected.
Status Authenticate(const Socket& socket, int role, std::string_view secret, Deadline deadline);

}  // namespace tessera
