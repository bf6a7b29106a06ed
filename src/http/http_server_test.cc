// Connections without an API behind them: deadlines, requests that come in pieces, and an orderly end.
#include "http/server.h"

#include <gtest/gtest.h>

#include "http/scripted_world.h"

namespace tessera {
namespace {

using test::Wire;

// Answers every request with its body; "/later" only when told.
class EchoServer {
 public:
  EchoServer() : server_(HttpServer::Listen(Options()).value()) {
    server_->Start({
        .admit = [](const HttpRequest&) { return std::optional<HttpResponse>(); },
        .handle =
            [this](HttpRequest request, std::shared_ptr<Exchange> exchange) {
              if (request.path != "/later") return exchange->Answer({.body = request.body});
              exchange->on_closed = [this] { closed_.Put(); };
              later_ = exchange;
              arrived_.Put();
            },
        .refuse = [](int status,
                     const std::string& reason) { return HttpResponse{.status = status, .body = reason}; },
        .finished = [](const ExchangeRecord&) {},
    });
  }
  ~EchoServer() { server_->Stop(); }

  // Counts, and can be waited for.
  class Signal {
   public:
    void Put() {
      std::lock_guard lock(mutex_);
      ++count_;
      changed_.notify_all();
    }
    bool Wait() {
      std::unique_lock lock(mutex_);
      return changed_.wait_for(lock, std::chrono::seconds(20), [this] { return count_ > 0; });
    }

   private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int count_ = 0;
  };

  HttpServer& server() { return *server_; }
  int port() const { return server_->port(); }
  Signal& arrived() { return arrived_; }
  Signal& closed() { return closed_; }
  void AnswerLater() {
    server_->Post([this] { later_->Answer({.body = "late"}); });
  }

 private:
  static ServerOptions Options() {
    ServerOptions options;
    options.header_deadline = options.body_deadline = options.idle_deadline = std::chrono::seconds(1);
    options.limits.max_body_bytes = 1 << 20;
    options.max_body_bytes_in_all = 3 << 20;
    return options;
  }
  Signal arrived_, closed_;
  std::shared_ptr<Exchange> later_;
  std::unique_ptr<HttpServer> server_;
};

TEST(HttpServerTest, AHeaderThatTricklesIsEnded) {
  EchoServer echo;
  Wire wire(echo.port());
  wire.Send("GET / HT");
  const auto answer = wire.Read();
  EXPECT_EQ(answer.status, 408);
  EXPECT_TRUE(wire.AtEnd());
}

TEST(HttpServerTest, ABodyThatNeverEndsIsEnded) {
  EchoServer echo;
  Wire wire(echo.port());
  wire.Send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc");
  EXPECT_EQ(wire.Read().status, 408);
  EXPECT_TRUE(wire.AtEnd());
}

TEST(HttpServerTest, SilentConnectionsAreClosedWithoutAWord) {
  EchoServer echo;
  Wire fresh(echo.port());
  Wire used(echo.port());
  used.Send("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\nab");
  EXPECT_EQ(used.Read().body, "ab");
  EXPECT_TRUE(fresh.AtEnd());
  EXPECT_TRUE(used.AtEnd());
}

TEST(HttpServerTest, ARequestByteByByteAndChunked) {
  EchoServer echo;
  Wire wire(echo.port());
  for (const char c : std::string_view("POST / HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n"
                                       "1\r\na\r\n2\r\nbc\r\n0\r\n\r\n")) {
    wire.Send({&c, 1});
  }
  EXPECT_EQ(wire.Read().body, "abc");
}

TEST(HttpServerTest, ALongWaitForAnAnswerIsNoIdleConnection) {
  EchoServer echo;
  Wire wire(echo.port());
  wire.Send("GET /later HTTP/1.1\r\nHost: t\r\n\r\n");
  ASSERT_TRUE(echo.arrived().Wait());
  Wire other(echo.port());  // is closed for its silence, which takes longer than any deadline of the first
  EXPECT_TRUE(other.AtEnd());
  echo.AnswerLater();
  EXPECT_EQ(wire.Read().body, "late");
}

TEST(HttpServerTest, AClientThatLeavesIsNoticedWhileItWaits) {
  EchoServer echo;
  Wire wire(echo.port());
  wire.Send("GET /later HTTP/1.1\r\nHost: t\r\n\r\n");
  ASSERT_TRUE(echo.arrived().Wait());
  wire.Close();
  EXPECT_TRUE(echo.closed().Wait());
  echo.AnswerLater();  // does nothing
  EXPECT_TRUE(echo.server().WaitUntilIdle(std::chrono::seconds(20)));
}

TEST(HttpServerTest, AClientMayFinishSendingBeforeItHasReadTheAnswer) {
  EchoServer echo;
  Wire wire(echo.port(), 4096);
  const std::string body(1000000, 'x');
  wire.Send(Format("POST / HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n{}", body.size(), body));
  ASSERT_TRUE(wire.ReadUntil("\r\n\r\n"));  // the answer is complete; most of it is not sent
  wire.FinishSending();
  const auto answer = wire.Read();
  EXPECT_TRUE(answer.complete);
  EXPECT_EQ(answer.body.size(), body.size());
}

TEST(HttpServerTest, BodiesInAllAreBounded) {
  EchoServer echo;
  std::vector<std::unique_ptr<Wire>> wires;
  const std::string head =
      "POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 1000000\r\nExpect: 100-continue\r\n\r\n";
  for (int i = 0; i < 3; ++i) {
    wires.push_back(std::make_unique<Wire>(echo.port()));
    wires.back()->Send(head);
    EXPECT_EQ(wires.back()->Read().status, 100);
  }
  Wire fourth(echo.port());
  fourth.Send(head);
  EXPECT_EQ(fourth.Read().status, 503);
  // What a client gives up is free again.
  wires.clear();
  for (int i = 0; i < 100; ++i) {
    Wire again(echo.port());
    again.Send(head);
    if (again.Read().status == 100) return;
  }
  FAIL() << "the bytes of closed connections stay reserved";
}

TEST(HttpServerTest, APortInUseIsAnError) {
  EchoServer echo;
  ServerOptions options;
  options.port = echo.port();
  const auto second = HttpServer::Listen(options);
  ASSERT_FALSE(second);
  EXPECT_NE(second.error().message.find(std::to_string(echo.port())), std::string::npos);
}

TEST(HttpServerTest, StopClosesWhatIsOpen) {
  EchoServer echo;
  Wire wire(echo.port());
  wire.Send("GET /later HTTP/1.1\r\nHost: t\r\n\r\n");
  ASSERT_TRUE(echo.arrived().Wait());
  echo.server().Stop();
  EXPECT_TRUE(echo.closed().Wait());
  EXPECT_TRUE(wire.AtEnd());
}

}  // namespace
}  // namespace tessera
