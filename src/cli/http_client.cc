// POSIX sockets under http_client.h.
#include "cli/http_client.h"

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include "base/format.h"

namespace tessera::cli {
namespace {

constexpr size_t kAll = SIZE_MAX;
constexpr size_t kMaxLine = 64 << 10;

std::string Lower(std::string_view text) {
  std::string lower(text);
  std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return std::tolower(c); });
  return lower;
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\r')) text.remove_suffix(1);
  return text;
}

bool WaitFor(int descriptor, short what, std::chrono::milliseconds limit) {
  pollfd wait = {descriptor, what, 0};
  return poll(&wait, 1, static_cast<int>(limit.count())) > 0;
}

}  // namespace

Result<Url> ParseUrl(std::string_view text) {
  const std::string_view whole = text;
  if (!text.starts_with("http://")) return Invalid("'{}' is not a URL that starts with http://", whole);
  text.remove_prefix(7);
  Url url;
  const size_t slash = std::min(text.find('/'), text.size());
  url.path = text.substr(slash);
  while (url.path.ends_with('/')) url.path.pop_back();
  std::string_view place = text.substr(0, slash);
  size_t colon = place.rfind(':');
  if (place.starts_with('[')) {  // an IPv6 address
    const size_t end = place.find(']');
    if (end == std::string_view::npos) return Invalid("'{}': no ']' behind the address", whole);
    url.host = place.substr(1, end - 1);
    if (colon < end) colon = std::string_view::npos;
  } else {
    url.host = place.substr(0, colon);
  }
  if (colon != std::string_view::npos) {
    const std::string_view digits = place.substr(colon + 1);
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), url.port);
    if (error != std::errc() || end != digits.data() + digits.size() || url.port < 1 || url.port > 65535) {
      return Invalid("'{}': '{}' is not a port", whole, digits);
    }
  }
  if (url.host.empty()) return Invalid("'{}' names no host", whole);
  return url;
}

HttpConnection::~HttpConnection() {
  Close();
}

void HttpConnection::Close() {
  if (descriptor_ >= 0) close(descriptor_);
  descriptor_ = -1;
  buffer_.clear();
}

Status HttpConnection::Connect() {
  Close();
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (const int error = getaddrinfo(url_.host.c_str(), std::to_string(url_.port).c_str(), &hints, &found);
      error != 0) {
    return Fail(ErrorKind::kUnavailable, "{}: {}", url_.host, gai_strerror(error));
  }
  int reason = 0;
  for (const addrinfo* place = found; place != nullptr && descriptor_ < 0; place = place->ai_next) {
    const int descriptor = socket(place->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (descriptor < 0) continue;
    reason = connect(descriptor, place->ai_addr, place->ai_addrlen) == 0 ? 0 : errno;
    if (reason == EINPROGRESS) {
      socklen_t length = sizeof reason;
      if (!WaitFor(descriptor, POLLOUT, limit_))
        reason = ETIMEDOUT;
      else
        getsockopt(descriptor, SOL_SOCKET, SO_ERROR, &reason, &length);
    }
    if (reason == 0)
      descriptor_ = descriptor;
    else
      close(descriptor);
  }
  freeaddrinfo(found);
  if (descriptor_ < 0) {
    return Fail(ErrorKind::kUnavailable, "no server at {}:{}: {}", url_.host, url_.port,
                std::strerror(reason));
  }
  const int on = 1;
  setsockopt(descriptor_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  return {};
}

Status HttpConnection::Write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t sent = send(descriptor_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (sent > 0) {
      bytes.remove_prefix(sent);
    } else if (errno != EAGAIN && errno != EINTR) {
      return Fail(ErrorKind::kUnavailable, "{}:{}: {}", url_.host, url_.port, std::strerror(errno));
    } else if (!WaitFor(descriptor_, POLLOUT, limit_)) {
      return Fail(ErrorKind::kDeadline, "{}:{} took nothing for {} ms", url_.host, url_.port, limit_.count());
    }
  }
  return {};
}

Result<bool> HttpConnection::Fill() {
  char bytes[16384];
  for (;;) {
    const ssize_t count = recv(descriptor_, bytes, sizeof bytes, 0);
    if (count > 0) {
      buffer_.append(bytes, count);
      return true;
    }
    if (count == 0) return false;
    if (errno != EAGAIN && errno != EINTR) {
      return Fail(ErrorKind::kUnavailable, "{}:{}: {}", url_.host, url_.port, std::strerror(errno));
    }
    if (!WaitFor(descriptor_, POLLIN, limit_)) {
      return Fail(ErrorKind::kDeadline, "{}:{} sent nothing for {} ms", url_.host, url_.port, limit_.count());
    }
  }
}

Result<std::string> HttpConnection::TakeLine() {
  size_t end = 0;
  while ((end = buffer_.find('\n')) == std::string::npos) {
    if (buffer_.size() > kMaxLine) return Invalid("a line of the answer is longer than {} bytes", kMaxLine);
    ASSIGN_OR_RETURN(const bool more, Fill());
    if (!more) return Fail(ErrorKind::kUnavailable, "{}:{} closed the connection", url_.host, url_.port);
  }
  std::string line(Trim(std::string_view(buffer_).substr(0, end)));
  buffer_.erase(0, end + 1);
  return line;
}

Status HttpConnection::TakeBytes(size_t count, const std::function<bool(std::string_view)>& take) {
  while (count > 0) {
    if (buffer_.empty()) {
      ASSIGN_OR_RETURN(const bool more, Fill());
      if (!more && count == kAll) return {};
      if (!more)
        return Fail(ErrorKind::kUnavailable, "{}:{} closed the connection within an answer", url_.host,
                    url_.port);
    }
    const size_t taken = std::min(count, buffer_.size());
    const bool go_on = take(std::string_view(buffer_).substr(0, taken));
    buffer_.erase(0, taken);
    if (count != kAll) count -= taken;
    if (!go_on) {
      stopped_ = true;
      return {};
    }
  }
  return {};
}

Status HttpConnection::TakeChunks(const std::function<bool(std::string_view)>& take) {
  for (;;) {
    ASSIGN_OR_RETURN(const std::string line, TakeLine());
    size_t size = 0;
    const auto [end, error] = std::from_chars(line.data(), line.data() + line.size(), size, 16);
    if (error != std::errc() || end == line.data()) return Invalid("'{}' is not the size of a chunk", line);
    if (size > 0) {
      RETURN_IF_ERROR(TakeBytes(size, take));
      if (stopped_) return {};
    }
    ASSIGN_OR_RETURN(const std::string empty, TakeLine());
    if (size == 0) return {};
  }
}

Result<HttpAnswer> HttpConnection::Receive(const std::function<bool(std::string_view)>& sink) {
  HttpAnswer answer;
  ASSIGN_OR_RETURN(const std::string first, TakeLine());
  if (!first.starts_with("HTTP/1.") || first.size() < 12)
    return Invalid("'{}' is not the start of an HTTP answer", first);
  std::from_chars(first.data() + 9, first.data() + 12, answer.status);
  bool chunked = false, keep = first[7] == '1';
  size_t length = kAll;
  for (;;) {
    ASSIGN_OR_RETURN(const std::string line, TakeLine());
    if (line.empty()) break;
    const size_t colon = std::min(line.find(':'), line.size());
    const std::string name = Lower(line.substr(0, colon));
    const std::string_view value = Trim(std::string_view(line).substr(std::min(colon + 1, line.size())));
    if (name == "content-length") std::from_chars(value.data(), value.data() + value.size(), length);
    if (name == "transfer-encoding") chunked = Lower(value) == "chunked";
    if (name == "connection") keep = Lower(value) != "close";
    if (name == "content-type") answer.content_type = value;
  }
  stopped_ = false;
  const bool streams = sink && answer.status == 200;
  const auto take = [&](std::string_view bytes) {
    if (streams) return sink(bytes);
    answer.body += bytes;
    return true;
  };
  const Status taken = chunked ? TakeChunks(take) : TakeBytes(length, take);
  if (!taken || stopped_ || !keep || (!chunked && length == kAll)) Close();
  if (!taken) return std::unexpected(taken.error());
  return answer;
}

Result<HttpAnswer> HttpConnection::Send(std::string_view method, std::string_view path,
                                        const std::vector<std::string>& headers, std::string_view body,
                                        const std::function<bool(std::string_view)>& sink) {
  std::string request =
      Format("{} {}{} HTTP/1.1\r\nHost: {}:{}\r\n", method, url_.path, path, url_.host, url_.port);
  for (const std::string& header : headers) request += header + "\r\n";
  if (!body.empty())
    request += Format("Content-Type: application/json\r\nContent-Length: {}\r\n", body.size());
  request += "\r\n";
  request += body;
  for (const bool kept = descriptor_ >= 0;; Close()) {
    const bool first_try = kept && descriptor_ >= 0;
    if (descriptor_ < 0) RETURN_IF_ERROR(Connect());
    if (const Status written = Write(request); !written) {
      if (first_try) continue;
      return std::unexpected(written.error());
    }
    if (first_try && buffer_.empty()) {
      const auto more = Fill();
      if (!more && more.error().kind == ErrorKind::kDeadline) return std::unexpected(more.error());
      if (!more || !*more) continue;  // closed while idle
    }
    auto answer = Receive(sink);
    if (!answer) Close();
    return answer;
  }
}

bool SseReader::Push(std::string_view bytes, const std::function<bool(std::string_view)>& event) {
  buffer_ += bytes;
  size_t begin = 0;
  bool go_on = true;
  for (size_t end = 0; go_on && (end = buffer_.find('\n', begin)) != std::string::npos; begin = end + 1) {
    const std::string_view line = Trim(std::string_view(buffer_).substr(begin, end - begin));
    if (line.starts_with("data:")) go_on = event(Trim(line.substr(5)));
  }
  buffer_.erase(0, begin);
  return go_on;
}

}  // namespace tessera::cli
