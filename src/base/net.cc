// Sockets, names and interfaces of the operating system, behind net.h. Every wait is a poll with what is left
// of its deadline; a signal or an early wake only repeats it.
#include "base/net.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <map>
#include <memory>

#include "base/sha256.h"

namespace tessera {
namespace {

// A peer that vanished without a word is given up after about this long.
constexpr int kKeepAliveSeconds = 1;
constexpr int kKeepAliveProbes = 3;
constexpr int kUserTimeoutMs = 3000;
constexpr int kBacklog = 128;

std::string Reason(int error) {
  std::array<char, 128> text{};
  return strerror_r(error, text.data(), text.size());  // the GNU one: returns the text
}

struct Address {
  sockaddr_storage storage{};
  socklen_t length = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

Endpoint EndpointOf(const Address& address) {
  std::array<char, INET6_ADDRSTRLEN> text{};
  if (address.storage.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address.storage);
    inet_ntop(AF_INET6, &v6.sin6_addr, text.data(), text.size());
    return {text.data(), ntohs(v6.sin6_port)};
  }
  const auto& v4 = reinterpret_cast<const sockaddr_in&>(address.storage);
  inet_ntop(AF_INET, &v4.sin_addr, text.data(), text.size());
  return {text.data(), ntohs(v4.sin_port)};
}

Result<Address> Resolve(const Endpoint& endpoint) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error =
      getaddrinfo(endpoint.address.c_str(), std::to_string(endpoint.port).c_str(), &hints, &found);
  if (error != 0) return Invalid("address '{}': {}", endpoint.address, gai_strerror(error));
  const std::unique_ptr<addrinfo, void (*)(addrinfo*)> owner(found, freeaddrinfo);
  Address address;
  address.length = found->ai_addrlen;
  std::memcpy(&address.storage, found->ai_addr, found->ai_addrlen);
  return address;
}

bool IsAny(const Address& address) {
  if (address.storage.ss_family == AF_INET6) {
    const auto& v6 = reinterpret_cast<const sockaddr_in6&>(address.storage).sin6_addr;
    // ::ffff:0.0.0.0 is every interface, too.
    return IN6_IS_ADDR_UNSPECIFIED(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr32[3] == 0);
  }
  return reinterpret_cast<const sockaddr_in&>(address.storage).sin_addr.s_addr == INADDR_ANY;
}

void Set(const Socket& socket, int level, int option, int value) {
  setsockopt(socket.descriptor(), level, option, &value, sizeof(value));
}

// No delay for small frames; a dead host is noticed although it cannot say so.
void Tune(const Socket& socket) {
  Set(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  Set(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  Set(socket, IPPROTO_TCP, TCP_KEEPIDLE, kKeepAliveSeconds);
  Set(socket, IPPROTO_TCP, TCP_KEEPINTVL, kKeepAliveSeconds);
  Set(socket, IPPROTO_TCP, TCP_KEEPCNT, kKeepAliveProbes);
  Set(socket, IPPROTO_TCP, TCP_USER_TIMEOUT, kUserTimeoutMs);
}

// False when the time ran out. Errors of the socket count as ready: the call that follows reports them.
bool WaitFor(const Socket& socket, short events, Deadline deadline) {
  while (true) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Deadline::clock::now()).count();
    pollfd entry{socket.descriptor(), events, 0};
    const int timeout_ms = static_cast<int>(std::clamp<int64_t>(left, 0, 60'000));
    if (poll(&entry, 1, timeout_ms) > 0) return true;
    if (left <= 0) return false;
  }
}

// Who is on the other side, for messages.
std::string PeerText(const Socket& socket) {
  const auto peer = PeerEndpoint(socket);
  return peer && peer->port != 0 ? peer->Text() : "the other side";
}

}  // namespace

Socket::~Socket() {
  if (open()) close(descriptor_);
}

void Socket::Shutdown() const {
  if (open()) shutdown(descriptor_, SHUT_RDWR);
}

std::string Endpoint::Text() const {
  return address.find(':') == std::string::npos ? Format("{}:{}", address, port)
                                                : Format("[{}]:{}", address, port);
}

Result<Endpoint> ParseEndpoint(const std::string& text) {
  const size_t colon = text.rfind(':');
  std::string address = text.substr(0, colon == std::string::npos ? 0 : colon);
  const bool bracketed = address.size() > 2 && address.front() == '[' && address.back() == ']';
  if (bracketed) address = address.substr(1, address.size() - 2);
  const bool six = address.find(':') != std::string::npos;
  int port = -1;
  if (colon != std::string::npos) {
    const auto [end, error] = std::from_chars(text.data() + colon + 1, text.data() + text.size(), port);
    if (error != std::errc() || end != text.data() + text.size()) port = -1;
  }
  if (address.empty() || address.find_first_of("[]") != std::string::npos || six != bracketed || port < 0 ||
      port > 65535)
    return Invalid("'{}' is not an endpoint: wanted ADDRESS:PORT, like 10.0.0.1:8000 or [::1]:8000", text);
  return Endpoint{address, port};
}

Result<Socket> Listen(const Endpoint& endpoint) {
  ASSIGN_OR_RETURN(Address address, Resolve(endpoint));
  if (IsAny(address))
    return Invalid("will not listen on {}: that is every interface; name the address of one",
                   endpoint.Text());
  Socket socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.open()) return Fail(ErrorKind::kUnavailable, "socket: {}", Reason(errno));
  Set(socket, SOL_SOCKET, SO_REUSEADDR, 1);
  if (bind(socket.descriptor(), address.get(), address.length) != 0 ||
      listen(socket.descriptor(), kBacklog) != 0)
    return Fail(ErrorKind::kUnavailable, "cannot listen on {}: {}", endpoint.Text(), Reason(errno));
  return socket;
}

Result<Endpoint> LocalEndpoint(const Socket& socket) {
  Address address;
  address.length = sizeof(address.storage);
  if (getsockname(socket.descriptor(), address.get(), &address.length) != 0)
    return Fail(ErrorKind::kUnavailable, "own address of a socket: {}", Reason(errno));
  return EndpointOf(address);
}

Result<Endpoint> PeerEndpoint(const Socket& socket) {
  Address address;
  address.length = sizeof(address.storage);
  if (getpeername(socket.descriptor(), address.get(), &address.length) != 0)
    return Fail(ErrorKind::kUnavailable, "peer of a socket: {}", Reason(errno));
  return EndpointOf(address);
}

Result<Socket> Accept(const Socket& listener, Deadline deadline) {
  while (true) {
    const int descriptor = accept4(listener.descriptor(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (descriptor >= 0) {
      Socket socket(descriptor);
      Tune(socket);
      return socket;
    }
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno != EAGAIN && errno != EWOULDBLOCK)
      return Fail(ErrorKind::kUnavailable, "cannot accept a connection: {}", Reason(errno));
    if (!WaitFor(listener, POLLIN, deadline)) {
      const auto own = LocalEndpoint(listener);
      return Fail(ErrorKind::kDeadline, "nobody connected to {} in time", own ? own->Text() : "the listener");
    }
  }
}

Result<Socket> Connect(const Endpoint& endpoint, Deadline deadline, const std::string& source) {
  ASSIGN_OR_RETURN(Address address, Resolve(endpoint));
  Socket socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.open()) return Fail(ErrorKind::kUnavailable, "socket: {}", Reason(errno));
  if (!source.empty()) {
    ASSIGN_OR_RETURN(Address from, Resolve({source, 0}));
    if (bind(socket.descriptor(), from.get(), from.length) != 0)
      return Fail(ErrorKind::kUnavailable, "cannot connect from {}: {}", source, Reason(errno));
  }
  Tune(socket);
  int error = connect(socket.descriptor(), address.get(), address.length) == 0 ? 0 : errno;
  // An interrupted connect goes on by itself, like one in progress.
  if (error == EINPROGRESS || error == EINTR) {
    if (!WaitFor(socket, POLLOUT, deadline))
      return Fail(ErrorKind::kUnavailable, "cannot connect to {}: no answer in time", endpoint.Text());
    socklen_t size = sizeof(error);
    getsockopt(socket.descriptor(), SOL_SOCKET, SO_ERROR, &error, &size);
  }
  if (error != 0)
    return Fail(ErrorKind::kUnavailable, "cannot connect to {}: {}", endpoint.Text(), Reason(error));
  // A connect to a free local port may meet itself (simultaneous open); that is nobody.
  const auto own = LocalEndpoint(socket), peer = PeerEndpoint(socket);
  if (own && peer && own->Text() == peer->Text())
    return Fail(ErrorKind::kUnavailable, "cannot connect to {}: nobody listens there", endpoint.Text());
  return socket;
}

Result<std::pair<Socket, Socket>> SocketPair() {
  std::array<int, 2> ends{};
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends.data()) != 0)
    return Fail(ErrorKind::kUnavailable, "socketpair: {}", Reason(errno));
  std::pair<Socket, Socket> pair{Socket(ends[0]), Socket(ends[1])};
  if (fcntl(ends[1], F_SETFD, 0) != 0) return Fail(ErrorKind::kUnavailable, "socketpair: {}", Reason(errno));
  return pair;
}

Status WriteAll(const Socket& socket, std::span<const std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t sent = send(socket.descriptor(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent >= 0) {
      bytes = bytes.subspan(static_cast<size_t>(sent));
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!WaitFor(socket, POLLOUT, deadline))
        return Fail(ErrorKind::kDeadline, "{} did not take {} bytes in time", PeerText(socket), bytes.size());
    } else if (errno != EINTR) {
      return Fail(ErrorKind::kUnavailable, "{} is gone: {}", PeerText(socket), Reason(errno));
    }
  }
  return {};
}

Status ReadAll(const Socket& socket, std::span<std::byte> bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t got = recv(socket.descriptor(), bytes.data(), bytes.size(), 0);
    if (got > 0) {
      bytes = bytes.subspan(static_cast<size_t>(got));
    } else if (got == 0) {
      return Fail(ErrorKind::kUnavailable, "{} closed the connection; {} bytes were still expected",
                  PeerText(socket), bytes.size());
    } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
      if (!WaitFor(socket, POLLIN, deadline))
        return Fail(ErrorKind::kDeadline, "{} did not send {} bytes in time", PeerText(socket), bytes.size());
    } else if (errno != EINTR) {
      return Fail(ErrorKind::kUnavailable, "{} is gone: {}", PeerText(socket), Reason(errno));
    }
  }
  return {};
}

Result<std::string> InterfaceAddress(const std::string& interface) {
  ifaddrs* found = nullptr;
  if (getifaddrs(&found) != 0)
    return Fail(ErrorKind::kUnavailable, "cannot list the network interfaces: {}", Reason(errno));
  const std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(found, freeifaddrs);
  std::map<std::string, std::string> addresses;  // the first IPv4 of each, "" without one
  for (const ifaddrs* entry = found; entry != nullptr; entry = entry->ifa_next) {
    std::string& address = addresses[entry->ifa_name];
    if (entry->ifa_addr == nullptr || entry->ifa_addr->sa_family != AF_INET || !address.empty()) continue;
    std::array<char, INET_ADDRSTRLEN> text{};
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(entry->ifa_addr);
    address = inet_ntop(AF_INET, &v4->sin_addr, text.data(), text.size());
  }
  const auto it = addresses.find(interface);
  if (it != addresses.end() && !it->second.empty()) return it->second;
  std::string names;
  for (const auto& [name, address] : addresses)
    if (!address.empty()) names += (names.empty() ? "" : ", ") + name;
  return Invalid("network interface '{}' {}; those with one: {}", interface,
                 it == addresses.end() ? "does not exist" : "has no IPv4 address", names);
}

std::string HostName() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

bool IsLoopback(const std::string& address) {
  in_addr v4{};
  in6_addr v6{};
  if (inet_pton(AF_INET, address.c_str(), &v4) == 1) return (ntohl(v4.s_addr) >> 24) == 127;
  if (inet_pton(AF_INET6, address.c_str(), &v6) == 1)
    return IN6_IS_ADDR_LOOPBACK(&v6) || (IN6_IS_ADDR_V4MAPPED(&v6) && v6.s6_addr[12] == 127);
  return address == "localhost";
}

namespace {

// What each side says first: who it is in the exchange, and what the other shall sign.
struct Challenge {
  std::array<char, 8> magic = {'t', 's', 'r', '-', 'a', 'u', 't', 'h'};
  uint32_t version = 1;
  uint32_t role = 0;
  std::array<std::byte, 32> nonce{};
};
static_assert(sizeof(Challenge) == 48);

Sha256 Answer(std::string_view secret, const Challenge& signer, const Challenge& other) {
  std::array<std::byte, 2 * sizeof(Challenge)> text{};
  std::memcpy(text.data(), &signer, sizeof(Challenge));
  std::memcpy(text.data() + sizeof(Challenge), &other, sizeof(Challenge));
  return HmacSha256(std::as_bytes(std::span(secret)), text);
}

}  // namespace

Status Authenticate(const Socket& socket, int role, std::string_view secret, Deadline deadline) {
  Challenge own, peer;
  own.role = static_cast<uint32_t>(role);
  FillRandom(own.nonce);
  RETURN_IF_ERROR(WriteAll(socket, std::as_bytes(std::span(&own, 1)), deadline));
  RETURN_IF_ERROR(ReadAll(socket, std::as_writable_bytes(std::span(&peer, 1)), deadline));
  if (peer.magic != own.magic)
    return Fail(ErrorKind::kUnavailable, "{} does not speak Tessera's protocol", PeerText(socket));
  if (peer.version != own.version)
    return Fail(ErrorKind::kUnavailable, "{} authenticates by version {}, this side by {}", PeerText(socket),
                peer.version, own.version);
  if (peer.role != 1 - own.role)
    return Fail(ErrorKind::kUnavailable, "{} takes role {} of a connection, as this side does",
                PeerText(socket), peer.role);
  // The signer's challenge comes first and holds its role: an answer sent back proves nothing.
  const Sha256 answer = Answer(secret, own, peer);
  RETURN_IF_ERROR(WriteAll(socket, std::as_bytes(std::span(answer)), deadline));
  Sha256 seen{};
  const Status read = ReadAll(socket, std::as_writable_bytes(std::span(seen)), deadline);
  // Who finds our answer wrong may close before its own is out.
  if ((!read && read.error().kind == ErrorKind::kUnavailable) ||
      (read && !EqualConstantTime(seen, Answer(secret, peer, own))))
    return Fail(ErrorKind::kUnavailable, "{} has another cluster secret", PeerText(socket));
  return read;
}

}  // namespace tessera
