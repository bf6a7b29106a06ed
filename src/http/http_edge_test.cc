// The HTTP edge without sockets: honest requests in any cut, and everything that must be refused.
#include "http/http1.h"

#include <gtest/gtest.h>

#include "base/random.h"

namespace tessera {
namespace {

using State = RequestReader::State;

struct Outcome {
  std::vector<HttpRequest> requests;
  State state = State::kHeader;
  int status = 0;
};

// Feeds `text` in pieces of `piece` bytes.
Outcome Read(std::string_view text, size_t piece = 1u << 20, const HttpLimits& limits = {}) {
  Outcome outcome;
  RequestReader reader(limits);
  for (size_t at = 0; at < text.size(); at += piece) {
    reader.Append(text.substr(at, piece));
    while (true) {
      const State before = reader.state();
      const State now = reader.Advance();
      if (now == State::kRefused) return {std::move(outcome.requests), now, reader.status()};
      if (now == State::kDone) {
        outcome.requests.push_back(reader.Take());
      } else if (now == before) {
        break;
      }
    }
  }
  outcome.state = reader.state();
  return outcome;
}

int StatusOf(std::string_view text) {
  const int whole = Read(text).status;
  EXPECT_EQ(Read(text, 1).status, whole) << text;
  return whole;
}

constexpr std::string_view kPost =
    "POST /v1/completions?x=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello";
constexpr std::string_view kChunked =
    "POST /p HTTP/1.1\r\nhost: a\r\nTransfer-Encoding: Chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n";

TEST(Http1Test, ReadsPipelinedRequestsInAnyCut) {
  const std::string text =
      std::string(kPost) + std::string(kChunked) + "GET /health HTTP/1.0\r\n\r\n" + std::string(kPost);
  for (size_t piece = 1; piece <= text.size(); ++piece) {
    const Outcome outcome = Read(text, piece);
    ASSERT_EQ(outcome.requests.size(), 4u) << piece;
    EXPECT_EQ(outcome.state, State::kHeader);
    EXPECT_EQ(outcome.requests[0].method, "POST");
    EXPECT_EQ(outcome.requests[0].path, "/v1/completions");
    EXPECT_EQ(outcome.requests[0].query, "x=1");
    EXPECT_EQ(outcome.requests[0].body, "hello");
    EXPECT_TRUE(outcome.requests[0].keep_alive);
    EXPECT_EQ(outcome.requests[1].body, "hello");
    EXPECT_EQ(outcome.requests[1].Header("transfer-encoding"), "Chunked");
    EXPECT_FALSE(outcome.requests[2].keep_alive);
    EXPECT_EQ(outcome.requests[2].body, "");
  }
}

TEST(Http1Test, KeepAliveFollowsVersionAndHeader) {
  EXPECT_FALSE(Read("GET / HTTP/1.1\r\nHost: a\r\nConnection: foo, Close\r\n\r\n").requests[0].keep_alive);
  EXPECT_TRUE(Read("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n").requests[0].keep_alive);
}

TEST(Http1Test, RefusesSmuggling) {
  const auto post = [](std::string_view fields) {
    return StatusOf("POST / HTTP/1.1\r\nHost: a\r\n" + std::string(fields) + "\r\n0\r\n\r\n");
  };
  EXPECT_EQ(post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), 400);
  EXPECT_EQ(post("Content-Length: 5\r\nContent-Length: 5\r\n"), 400);
  EXPECT_EQ(post("Content-Length: 5, 5\r\n"), 400);
  EXPECT_EQ(post("Content-Length: +5\r\n"), 400);
  EXPECT_EQ(post("Content-Length: -5\r\n"), 400);
  EXPECT_EQ(post("Content-Length: 0x5\r\n"), 400);
  EXPECT_EQ(post("Content-Length:\r\n"), 400);
  EXPECT_EQ(post("Content-Length: 99999999999999999999999\r\n"), 413);
  EXPECT_EQ(post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), 400);
  EXPECT_EQ(post("Transfer-Encoding: gzip, chunked\r\n"), 400);
  EXPECT_EQ(post("Transfer-Encoding: xchunked\r\n"), 400);
  EXPECT_EQ(post("Transfer-Encoding : chunked\r\n"), 400);
  EXPECT_EQ(post("X: a\r\n Transfer-Encoding: chunked\r\n"), 400);
  EXPECT_EQ(post("X: a\r\n\tb\r\n"), 400);
  EXPECT_EQ(post("X: a\nY: b\r\n"), 400);
  EXPECT_EQ(post("X: a\rb\r\n"), 400);
  EXPECT_EQ(post("Host: b\r\n"), 400);
  EXPECT_EQ(post("Authorization: a\r\nAuthorization: b\r\n"), 400);
  EXPECT_EQ(post("no colon\r\n"), 400);
  EXPECT_EQ(post(": x\r\n"), 400);
  EXPECT_EQ(StatusOf("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), 400);
}

TEST(Http1Test, RefusesBrokenRequestLines) {
  for (std::string_view line :
       {"GET /", "GET / HTTP/2.0", "GET / HTTP/1.2", "GET  / HTTP/1.1", " GET / HTTP/1.1", "G(T / HTTP/1.1",
        "GET /a b HTTP/1.1", "GET / HTTP/1.1 ", "GET / http/1.1", ""}) {
    EXPECT_EQ(StatusOf(std::string(line) + "\r\nHost: a\r\n\r\n"), 400) << line;
  }
  EXPECT_EQ(StatusOf("GET / HTTP/1.1\r\n\r\n"), 400);  // no Host
  EXPECT_EQ(StatusOf("\x16\x03\x01\x02\n"), 400);      // a TLS hello
  EXPECT_EQ(StatusOf("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 400);
}

TEST(Http1Test, RefusesBrokenChunks) {
  for (std::string_view body : {"-1\r\nx\r\n0\r\n\r\n", "fffffffffffffffff\r\nx", "x\r\n\r\n\r\n",
                                "3;a=b\r\nhel\r\n0\r\n\r\n", "3\nhel\r\n", "3\r\nhelX\r\n0\r\n\r\n",
                                "3 \r\nhel\r\n0\r\n\r\n", "\r\n\r\n0\r\n\r\n", "0;x\r\n\r\n"}) {
    EXPECT_EQ(
        StatusOf("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + std::string(body)), 400)
        << body;
  }
  const std::string chunked = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
  EXPECT_EQ(StatusOf(chunked + "3\r\nhel\r\n0\r\nContent-Length: 5\r\n\r\n"), 400);
  EXPECT_EQ(StatusOf(chunked + std::string(1022, '0') + "3\r\nhel\r\n0\r\n\r\n"), 0);
  EXPECT_EQ(StatusOf(chunked + std::string(1023, '0') + "3\r\nhel\r\n0\r\n\r\n"), 400);
  std::string endless = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n";
  for (int i = 0; i < 200; ++i) endless += "trailer: x\r\n";
  EXPECT_EQ(StatusOf(endless), 400);
}

TEST(Http1Test, Limits) {
  const HttpLimits limits{.max_header_bytes = 200, .max_headers = 3, .max_body_bytes = 10};
  EXPECT_EQ(Read("GET / HTTP/1.1\r\nHost: a\r\nX: " + std::string(300, 'x'), 7, limits).status, 431);
  EXPECT_EQ(Read("GET / HTTP/1.1\r\nHost: a\r\nA: a\r\nB: b\r\nC: c\r\n\r\n", 7, limits).status, 431);
  // Refused when the header is complete, before any byte of the body.
  EXPECT_EQ(Read("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 11\r\n\r\n", 7, limits).status, 413);
  EXPECT_EQ(Read("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
                 "6\r\nabcdef\r\n6\r\nabcdef\r\n0\r\n\r\n",
                 7, limits)
                .status,
            413);
  EXPECT_EQ(
      Read("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n0123456789", 7, limits).requests.size(),
      1u);
}

TEST(Http1Test, WhatLiesBeyondTheHeaderLimitIsNotLookedAt) {
  const HttpLimits limits{.max_header_bytes = 200, .max_headers = 3, .max_body_bytes = 10};
  const std::string text = "GET / HTTP/1.1\r\nX: " + std::string(200, 'x') + "\n\r\n\r\n";
  EXPECT_EQ(Read(text, 1000, limits).status, 431);
  EXPECT_EQ(Read(text, 1, limits).status, 431);
}

TEST(Http1Test, LimitBodyAppliesToTheRequestBeingRead) {
  RequestReader reader(HttpLimits{});
  reader.Append("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\nExpect: 100-continue\r\n\r\n");
  ASSERT_EQ(reader.Advance(), State::kBody);
  EXPECT_TRUE(reader.wants_continue());
  reader.LimitBody(10);
  EXPECT_EQ(reader.Advance(), State::kRefused);
  EXPECT_EQ(reader.status(), 413);
}

}  // namespace
}  // namespace tessera
