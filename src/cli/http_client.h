// A small blocking HTTP/1.1 client for the commands that talk to a server: plain HTTP, keep-alive, chunked
// answers, server-sent events. No TLS, no redirects, no proxies.
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/error.h"

namespace tessera::cli {

struct Url {
  std::string host;
  int port = 80;
  std::string path;  // "/v1", or empty
};
// kInvalid for anything but http://host[:port][/path]. A path loses its last '/'.
Result<Url> ParseUrl(std::string_view text);

struct HttpAnswer {
  int status = 0;
  std::string content_type;
  std::string body;  // empty when a sink took it
};

// One connection, one thread. Every wait has the limit given to the constructor.
class HttpConnection {
 public:
  HttpConnection(Url url, std::chrono::milliseconds limit) : url_(std::move(url)), limit_(limit) {}
  HttpConnection(HttpConnection&& other) noexcept
      : url_(std::move(other.url_)),
        limit_(other.limit_),
        descriptor_(std::exchange(other.descriptor_, -1)) {}
  ~HttpConnection();

  const Url& url() const { return url_; }
  // Sends one request; connects where needed, and once more when a kept connection turns out to be closed.
  // `path` is appended to the URL's. Pieces of a 200 answer's body go to `sink`, where there is one, as they
  // come; when it gives false the connection is closed and the answer so far returned.
  Result<HttpAnswer> Send(std::string_view method, std::string_view path,
                          const std::vector<std::string>& headers, std::string_view body,
                          const std::function<bool(std::string_view)>& sink = nullptr);
  void Close();

 private:
  Status Connect();
  Status Write(std::string_view bytes);
  // Appends what has come to buffer_; false at the end of the connection.
  Result<bool> Fill();
  Result<HttpAnswer> Receive(const std::function<bool(std::string_view)>& sink);
  Result<std::string> TakeLine();
  // Moves `count` bytes, or all until the connection ends, to `take`.
  Status TakeBytes(size_t count, const std::function<bool(std::string_view)>& take);
  Status TakeChunks(const std::function<bool(std::string_view)>& take);

  const Url url_;
  const std::chrono::milliseconds limit_;
  int descriptor_ = -1;
  std::string buffer_;
  bool stopped_ = false;  // the sink said so
};

// Cuts a byte stream into events; calls `event` with each one's data.
class SseReader {
 public:
  // False as soon as `event` gives false.
  bool Push(std::string_view bytes, const std::function<bool(std::string_view)>& event);

 private:
  std::string buffer_;
};

}  // namespace tessera::cli
