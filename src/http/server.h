// HTTP/1.1 connections over TCP: limits, keep-alive, pipelining, deadlines, slow readers, server-sent events,
// and noticing that a client left. It knows no routes and no JSON; handlers.cc answers. Boost.Asio stays in
// server.cc. One thread (the "io thread") owns all connections; handlers run there and must not block.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "http/http1.h"

namespace tessera {

struct HttpResponse {
  int status = 200;
  std::string body = {};
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers = {};  // further ones
};

// What became of one request; for metrics.
struct ExchangeRecord {
  std::string method;
  std::string path;
  int status = 0;
  double seconds = 0;
  size_t request_bytes = 0;   // of the body
  size_t response_bytes = 0;  // head and body
};

// The answering side of one request. Used on the io thread only. Answer() or EndEvents() is called once;
// after either, or after the client left, everything does nothing.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual void Answer(HttpResponse response) = 0;
  // Status 200 and the head of an event stream; goes out with the first Write.
  virtual void BeginEvents(std::vector<std::pair<std::string, std::string>> headers) = 0;
  virtual void Write(std::string_view events) = 0;
  virtual void EndEvents(std::string_view last_events) = 0;
  // False once the answer is complete or the client left.
  virtual bool open() const = 0;
  // Bytes that the client has not taken yet. Writers stop at max_unsent_bytes until on_drained.
  virtual size_t unsent_bytes() const = 0;

  // Called on the io thread, never from within a call above. Dropped when the exchange ends.
  std::function<void()> on_closed;   // the client left before the answer was complete
  std::function<void()> on_drained;  // unsent_bytes() fell to 0 after it was not
};

struct ServerOptions {
  std::string host = "127.0.0.1";
  int port = 0;
  HttpLimits limits;
  size_t max_unsent_bytes = size_t{256} << 10;
  size_t max_body_bytes_in_all = size_t{1} << 30;  // declared bodies being read at the same time
  int num_background_threads = 2;
  std::chrono::seconds header_deadline{10};
  std::chrono::seconds body_deadline{120};
  std::chrono::seconds idle_deadline{120};   // between requests of one connection
  std::chrono::seconds stall_deadline{120};  // a client that takes no bytes
};

// All are called on the io thread.
struct ServerHooks {
  // Decides on a header before its body is read: an answer refuses the request.
  std::function<std::optional<HttpResponse>(const HttpRequest&)> admit;
  std::function<void(HttpRequest, std::shared_ptr<Exchange>)> handle;
  // The answer to bytes that are no acceptable HTTP.
  std::function<HttpResponse(int status, const std::string& reason)> refuse;
  std::function<void(const ExchangeRecord&)> finished;
};

class HttpServer {
 public:
  // Binds and listens; kUnavailable, naming the address, when it cannot. Raises RLIMIT_NOFILE to its maximum.
  static Result<std::unique_ptr<HttpServer>> Listen(const ServerOptions& options);
  ~HttpServer();

  void Start(ServerHooks hooks);  // once
  int port() const;
  const ServerOptions& options() const;
  // Any thread. `job` runs on the io thread; not at all when the server stops before.
  void Post(std::function<void()> job);
  // Any thread. `job` runs on one of the background threads.
  void RunInBackground(std::function<void()> job);
  // Waits until no request is being answered, at most `limit`.
  bool WaitUntilIdle(std::chrono::nanoseconds limit);
  // Closes all connections (on_closed is called) and ends the threads. Idempotent.
  void Stop();
  // On the io thread: connections that are open.
  size_t num_connections() const;

  struct Content;  // of server.cc alone

 private:
  explicit HttpServer(std::unique_ptr<Content> content);
  std::unique_ptr<Content> content_;
};

}  // namespace tessera
