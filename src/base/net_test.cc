// Endpoints, deadlines, closed peers and the proof of a secret, over real sockets of this host.
#include "base/net.h"

#include <gtest/gtest.h>

#include <array>
#include <thread>
#include <vector>

#include "base/sha256.h"

namespace tessera {
namespace {

using std::chrono::milliseconds;

std::span<const std::byte> Bytes(std::string_view text) {
  return std::as_bytes(std::span(text));
}

struct Pair {
  Socket client, server;
};
Pair MakePair() {
  const Socket listener = Listen({"127.0.0.1", 0}).value();
  const Endpoint endpoint = LocalEndpoint(listener).value();
  Socket client = Connect(endpoint, After(milliseconds(2000))).value();
  Socket server = Accept(listener, After(milliseconds(2000))).value();
  return {std::move(client), std::move(server)};
}

TEST(Net, EndpointsAreReadAndWritten) {
  for (const char* text : {"10.0.0.1:8000", "[::1]:8000", "host.name:0", "[fe80::1]:65535"}) {
    const auto endpoint = ParseEndpoint(text);
    ASSERT_TRUE(endpoint) << text;
    EXPECT_EQ(endpoint->Text(), text);
  }
  for (const char* text : {"", ":", "10.0.0.1", "10.0.0.1:", ":80", "::1:80", "[10.0.0.1]:80", "a:65536",
                           "a:-1", "a:8x", "[]:1"})
    EXPECT_FALSE(ParseEndpoint(text)) << text;
}

TEST(Net, NobodyListensOnEveryInterface) {
  for (const char* address : {"0.0.0.0", "::", "::ffff:0.0.0.0", "0"}) {
    const auto socket = Listen({address, 0});
    ASSERT_FALSE(socket) << address;
    EXPECT_NE(socket.error().message.find("every interface"), std::string::npos) << socket.error().message;
  }
}

TEST(Net, ALargeMessageGoesThroughInBothDirectionsAtOnce) {
  Pair pair = MakePair();
  std::vector<std::byte> there(5'000'000, std::byte{1}), back(4'000'000, std::byte{2});
  std::vector<std::byte> seen_there(there.size()), seen_back(back.size());
  std::thread writer([&] { EXPECT_TRUE(WriteAll(pair.client, there, After(milliseconds(5000)))); });
  std::thread other([&] { EXPECT_TRUE(WriteAll(pair.server, back, After(milliseconds(5000)))); });
  std::thread reader([&] { EXPECT_TRUE(ReadAll(pair.client, seen_back, After(milliseconds(5000)))); });
  EXPECT_TRUE(ReadAll(pair.server, seen_there, After(milliseconds(5000))));
  writer.join();
  other.join();
  reader.join();
  EXPECT_EQ(seen_there, there);
  EXPECT_EQ(seen_back, back);
}

TEST(Net, WaitsEndAtTheirDeadline) {
  Pair pair = MakePair();
  std::array<std::byte, 8> bytes{};
  EXPECT_EQ(ReadAll(pair.server, bytes, After(milliseconds(20))).error().kind, ErrorKind::kDeadline);
  const std::vector<std::byte> much(64 << 20);
  EXPECT_EQ(WriteAll(pair.client, much, After(milliseconds(20))).error().kind, ErrorKind::kDeadline);
  const Socket listener = Listen({"127.0.0.1", 0}).value();
  EXPECT_EQ(Accept(listener, After(milliseconds(20))).error().kind, ErrorKind::kDeadline);
}

TEST(Net, AClosedPeerIsUnavailableAndNamed) {
  Pair pair = MakePair();
  const std::string peer = PeerEndpoint(pair.client)->Text();
  ASSERT_TRUE(WriteAll(pair.server, Bytes("abc"), After(milliseconds(1000))));
  pair.server = Socket();
  std::array<std::byte, 8> bytes{};
  const auto read = ReadAll(pair.client, bytes, After(milliseconds(1000)));
  EXPECT_EQ(read.error().kind, ErrorKind::kUnavailable);
  EXPECT_NE(read.error().message.find(peer), std::string::npos) << read.error().message;
  const std::vector<std::byte> much(64 << 20);
  EXPECT_EQ(WriteAll(pair.client, much, After(milliseconds(1000))).error().kind, ErrorKind::kUnavailable);
}

TEST(Net, ShutdownWakesAReader) {
  Pair pair = MakePair();
  std::thread waker([&] { pair.client.Shutdown(); });
  std::array<std::byte, 8> bytes{};
  EXPECT_EQ(ReadAll(pair.client, bytes, After(milliseconds(5000))).error().kind, ErrorKind::kUnavailable);
  waker.join();
}

TEST(Net, ARefusedConnectionNamesTheEndpoint) {
  Endpoint endpoint;
  {
    const Socket listener = Listen({"127.0.0.1", 0}).value();
    endpoint = LocalEndpoint(listener).value();
  }
  const auto socket = Connect(endpoint, After(milliseconds(1000)));
  ASSERT_FALSE(socket);
  EXPECT_EQ(socket.error().kind, ErrorKind::kUnavailable);
  EXPECT_NE(socket.error().message.find(endpoint.Text()), std::string::npos) << socket.error().message;
}

TEST(Net, TheSourceAddressCanBeChosen) {
  const Socket listener = Listen({"127.0.0.1", 0}).value();
  const Socket client =
      Connect(LocalEndpoint(listener).value(), After(milliseconds(1000)), "127.0.0.2").value();
  const Socket server = Accept(listener, After(milliseconds(1000))).value();
  EXPECT_EQ(PeerEndpoint(server)->address, "127.0.0.2");
}

TEST(Net, InterfacesAndLoopback) {
  EXPECT_EQ(InterfaceAddress("lo").value(), "127.0.0.1");
  const auto none = InterfaceAddress("no-such-nic");
  ASSERT_FALSE(none);
  EXPECT_NE(none.error().message.find("no-such-nic"), std::string::npos);
  EXPECT_NE(none.error().message.find("lo"), std::string::npos);
  for (const char* address : {"127.0.0.1", "127.9.9.9", "::1", "localhost"}) EXPECT_TRUE(IsLoopback(address));
  for (const char* address : {"10.0.0.1", "128.0.0.1", "::", "host"}) EXPECT_FALSE(IsLoopback(address));
}

// What both sides say of secrets `a` and `b`, and roles.
std::pair<Status, Status> Meet(std::string_view a, std::string_view b, int role_a = 0, int role_b = 1) {
  Pair pair = MakePair();
  Status first;
  std::thread thread([&] { first = Authenticate(pair.client, role_a, a, After(milliseconds(1000))); });
  Status second = Authenticate(pair.server, role_b, b, After(milliseconds(1000)));
  thread.join();
  return {first, second};
}

TEST(Net, EqualSecretsMeet) {
  for (const std::string_view secret : {"", "one", "a longer secret of many words"}) {
    const auto [first, second] = Meet(secret, secret);
    EXPECT_TRUE(first && second) << secret;
  }
}

TEST(Net, OtherSecretsAreRefusedOnBothSides) {
  for (const auto& [a, b] : {std::pair("one", "two"), {"", "x"}, {"x", ""}}) {
    const auto [first, second] = Meet(a, b);
    ASSERT_FALSE(first || second);
    EXPECT_EQ(first.error().kind, ErrorKind::kUnavailable);
    EXPECT_EQ(second.error().kind, ErrorKind::kUnavailable);
  }
}

TEST(Net, AnAnswerSentBackIsNone) {
  const auto [first, second] = Meet("one", "one", 1, 1);
  EXPECT_FALSE(first || second);
  // A mirror of all bytes shows this side its own role.
  Pair pair = MakePair();
  std::thread mirror([&] {
    std::array<std::byte, 48> bytes{};
    if (ReadAll(pair.client, bytes, After(milliseconds(1000))))
      (void)WriteAll(pair.client, bytes, After(milliseconds(1000)));
  });
  EXPECT_FALSE(Authenticate(pair.server, 0, "one", After(milliseconds(1000))));
  mirror.join();
}

TEST(Net, HmacHasItsPublishedValue) {  // RFC 4231, case 2
  EXPECT_EQ(Hex(HmacSha256(Bytes("Jefe"), Bytes("what do ya want for nothing?"))),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST(Net, AnInheritedPairTalks) {
  auto pair = SocketPair().value();
  ASSERT_TRUE(WriteAll(pair.first, Bytes("hello"), After(milliseconds(1000))));
  std::array<char, 5> text{};
  ASSERT_TRUE(ReadAll(pair.second, std::as_writable_bytes(std::span(text)), After(milliseconds(1000))));
  EXPECT_EQ(std::string(text.data(), text.size()), "hello");
}

}  // namespace
}  // namespace tessera
