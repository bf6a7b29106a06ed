// Bytes of a connection -> HTTP/1.x requests. A pure state machine: no sockets, no clock; server.cc feeds it
// what arrived and the fuzzer feeds it anything. Stricter than the parser underneath (Boost.Beast, which
// stays in http1.cc): whatever two servers could read differently is refused, so no request can be smuggled
// past a proxy.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tessera {

struct HttpLimits {
  size_t max_header_bytes = size_t{64} << 10;
  size_t max_headers = 256;
  size_t max_body_bytes = size_t{64} << 20;
};

struct HttpRequest {
  std::string method;
  std::string path;                                          // without the query
  std::string query;                                         // after '?'
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case
  std::string body;
  int minor_version = 1;
  bool keep_alive = true;
  uint64_t content_length = 0;  // as declared; 0 where the body is chunked or absent

  // The value of a header, empty when it is absent. `name` in lower case.
  std::string_view Header(std::string_view name) const;
};

// Reads one request after the other. After kRefused the connection must be closed.
class RequestReader {
 public:
  enum class State {
    kHeader,   // more bytes are needed to complete the header
    kBody,     // the header is complete, see header(); more bytes are needed for the body
    kDone,     // Take() gives the request
    kRefused,  // see status() and reason()
  };
  explicit RequestReader(const HttpLimits& limits);
  ~RequestReader();

  // Appends bytes that arrived. They are parsed by Advance().
  void Append(std::string_view bytes);
  // Parses until the state changes from kHeader to kBody, the request is complete, or bytes run out.
  State Advance();
  State state() const { return state_; }
  // The request so far, without its body. In states kBody and kDone.
  const HttpRequest& header() const { return request_; }
  // The client waits for "100 Continue" before it sends the body. In state kBody.
  bool wants_continue() const { return wants_continue_; }
  // No more than this may follow as body; a longer one is refused with 413. In state kBody, before further
  // Advance().
  void LimitBody(size_t max_bytes);
  HttpRequest Take();  // in state kDone; the reader then starts with the next request

  // Bytes that have arrived and are not part of a taken request.
  size_t buffered_bytes() const { return buffer_.size() - consumed_; }
  // True before the first byte of a request.
  bool idle() const { return state_ == State::kHeader && buffered_bytes() == 0; }
  int status() const { return status_; }
  const std::string& reason() const { return reason_; }

 private:
  struct Parser;
  State Refuse(int status, std::string reason);
  State ReadHeader();
  State ReadBody();
  State StrictCheck(std::string_view block);
  State CheckField(std::string_view line);
  State CheckFraming();
  State TakeHeader(std::string_view block);
  void DropConsumed();

  const HttpLimits limits_;
  State state_ = State::kHeader;
  std::string buffer_;
  size_t consumed_ = 0;  // of buffer_
  size_t scanned_ = 0;   // bytes of the header that were searched for its end
  size_t max_body_bytes_;
  std::unique_ptr<Parser> parser_;  // while a body is read
  HttpRequest request_;
  bool wants_continue_ = false;
  bool chunked_ = false;
  int num_hosts_ = 0, num_lengths_ = 0, num_codings_ = 0;
  int status_ = 0;
  std::string reason_;
};

}  // namespace tessera
