// The strict check of a header block, and the bridge onto Boost.Beast's parser. See http1.h.
#include "http/http1.h"

#include <algorithm>
#include <boost/beast/http/parser.hpp>
#include <boost/beast/http/string_body.hpp>
#include <functional>

#include "base/check.h"
#include "base/format.h"

namespace tessera {
namespace {

namespace beast_http = boost::beast::http;
using boost::beast::error_code;

// Buffered bytes while a chunk header is incomplete; far above any honest one.
constexpr size_t kMaxChunkHeaderBytes = 1024;
// The shortest end of a chunked body. Beast 1.81 asserts (n >= 5) when it meets a last chunk in smaller
// pieces, and at least this much always follows inside a chunked body.
constexpr size_t kMinChunkedBytes = 5;

bool IsTokenByte(uint8_t c) {
  if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return true;
  return c != 0 && std::string_view("!#$%&'*+-.^_`|~").find(static_cast<char>(c)) != std::string_view::npos;
}

std::string Lower(std::string_view text) {
  std::string lower(text);
  for (char& c : lower) {
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  }
  return lower;
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

// Whether a comma-separated header value names `token`, which is in lower case.
bool Names(std::string_view value, std::string_view token) {
  while (true) {
    const size_t comma = value.find(',');
    if (Lower(Trim(value.substr(0, comma))) == token) return true;
    if (comma == std::string_view::npos) return false;
    value.remove_prefix(comma + 1);
  }
}

// Whether the end of a chunked body, with the line end of the chunk before it, holds no trailer.
bool IsLastChunk(std::string_view end) {
  if (end.starts_with("\r\n")) end.remove_prefix(2);
  return end.substr(std::min(end.find("\r\n"), end.size())) == "\r\n\r\n";
}

bool IsRequestLine(std::string_view line) {
  const size_t first = line.find(' ');
  const size_t second = first == std::string_view::npos ? first : line.find(' ', first + 1);
  if (second == std::string_view::npos || first == 0 || second == first + 1) return false;
  if (!std::all_of(line.begin(), line.begin() + static_cast<std::ptrdiff_t>(first),
                   [](char c) { return IsTokenByte(static_cast<uint8_t>(c)); })) {
    return false;
  }
  const std::string_view target = line.substr(first + 1, second - first - 1);
  if (!std::all_of(target.begin(), target.end(), [](char c) { return c > ' ' && c != '\x7F'; })) return false;
  const std::string_view version = line.substr(second + 1);
  return version == "HTTP/1.1" || version == "HTTP/1.0";
}

}  // namespace

struct RequestReader::Parser {
  beast_http::request_parser<beast_http::string_body> beast;
  bool in_chunk_header = false;  // the last put() read one
  // Beast keeps a reference to the callback.
  std::function<void(uint64_t, boost::beast::string_view, error_code&)> on_chunk =
      [this](uint64_t, boost::beast::string_view extensions, error_code& error) {
        in_chunk_header = true;
        if (!extensions.empty()) error = beast_http::error::bad_chunk_extension;
      };
};

std::string_view HttpRequest::Header(std::string_view name) const {
  for (const auto& [key, value] : headers) {
    if (key == name) return value;
  }
  return {};
}

RequestReader::RequestReader(const HttpLimits& limits)
    : limits_(limits), max_body_bytes_(limits.max_body_bytes) {}
RequestReader::~RequestReader() = default;

void RequestReader::Append(std::string_view bytes) {
  DropConsumed();
  buffer_ += bytes;
}

void RequestReader::DropConsumed() {
  buffer_.erase(0, consumed_);
  consumed_ = 0;
  if (buffer_.empty() && buffer_.capacity() > 1024) std::string().swap(buffer_);
}

RequestReader::State RequestReader::Refuse(int status, std::string reason) {
  status_ = status;
  reason_ = std::move(reason);
  parser_.reset();
  return state_ = State::kRefused;
}

RequestReader::State RequestReader::Advance() {
  if (state_ == State::kHeader) return ReadHeader();
  if (state_ == State::kBody) return ReadBody();
  return state_;
}

RequestReader::State RequestReader::ReadHeader() {
  // A client may send empty lines after the body of the request before.
  std::string_view rest = std::string_view(buffer_).substr(consumed_);
  for (; scanned_ == 0 && rest.starts_with("\r\n"); rest.remove_prefix(2)) consumed_ += 2;
  if (scanned_ == 0 && rest == "\r") return state_;
  // No further than the limit, so that the verdict does not depend on how much has arrived.
  const size_t size = std::min(rest.size(), limits_.max_header_bytes);
  for (; scanned_ < size; ++scanned_) {
    const char c = rest[scanned_];
    if (c == '\0') return Refuse(400, "the header holds a NUL byte");
    if (c != '\n') continue;
    if (scanned_ == 0 || rest[scanned_ - 1] != '\r')
      return Refuse(400, "a header line ends with a bare line feed");
    if (scanned_ >= 3 && rest[scanned_ - 2] == '\n') break;
  }
  const bool complete = scanned_ < size;
  if (scanned_ >= limits_.max_header_bytes) {
    return Refuse(431, Format("the header is longer than {} bytes", limits_.max_header_bytes));
  }
  if (!complete) return state_;
  const std::string_view block = rest.substr(0, scanned_ + 1);
  if (StrictCheck(block) == State::kRefused) return state_;
  return TakeHeader(block);
}

RequestReader::State RequestReader::StrictCheck(std::string_view block) {
  request_ = HttpRequest();
  chunked_ = wants_continue_ = false;
  num_hosts_ = num_lengths_ = num_codings_ = 0;
  size_t end = block.find("\r\n");
  const std::string_view first = block.substr(0, end);
  if (!IsRequestLine(first)) return Refuse(400, "the request line is not METHOD TARGET HTTP/1.0 or HTTP/1.1");
  request_.minor_version = first.back() - '0';
  for (block.remove_prefix(end + 2); !block.starts_with("\r\n"); block.remove_prefix(end + 2)) {
    end = block.find("\r\n");
    if (request_.headers.size() >= limits_.max_headers) {
      return Refuse(431, Format("more than {} header fields", limits_.max_headers));
    }
    if (CheckField(block.substr(0, end)) == State::kRefused) return state_;
  }
  return CheckFraming();
}

RequestReader::State RequestReader::CheckField(std::string_view line) {
  if (line.front() == ' ' || line.front() == '\t') return Refuse(400, "a header field is folded over lines");
  const size_t colon = line.find(':');
  if (colon == std::string_view::npos || colon == 0) return Refuse(400, "a header line is not NAME: VALUE");
  for (size_t i = 0; i < colon; ++i) {
    if (!IsTokenByte(static_cast<uint8_t>(line[i]))) {
      return Refuse(400, "a header name holds a byte that is not allowed, such as a space before the colon");
    }
  }
  const std::string_view value = Trim(line.substr(colon + 1));
  for (char c : value) {
    if ((static_cast<uint8_t>(c) < 0x20 && c != '\t') || c == '\x7F') {
      return Refuse(400, "a header value holds a control character");
    }
  }
  std::string name = Lower(line.substr(0, colon));
  num_hosts_ += name == "host";
  num_lengths_ += name == "content-length";
  num_codings_ += name == "transfer-encoding";
  if (name == "authorization" && !request_.Header(name).empty()) {
    return Refuse(400, "the header Authorization occurs twice");
  }
  request_.headers.emplace_back(std::move(name), std::string(value));
  return state_;
}

RequestReader::State RequestReader::CheckFraming() {
  if (num_hosts_ > 1 || (num_hosts_ == 0 && request_.minor_version == 1)) {
    return Refuse(400, "HTTP/1.1 needs the header Host exactly once");
  }
  if (num_lengths_ > 1) return Refuse(400, "the header Content-Length occurs twice");
  if (num_lengths_ == 1 && num_codings_ > 0) {
    return Refuse(400, "the headers Content-Length and Transfer-Encoding exclude each other");
  }
  if (num_codings_ > 0) {
    chunked_ = num_codings_ == 1 && request_.minor_version == 1 &&
               Lower(request_.Header("transfer-encoding")) == "chunked";
    if (!chunked_) return Refuse(400, "Transfer-Encoding must be \"chunked\", once, in HTTP/1.1");
  }
  if (num_lengths_ == 1) {
    const std::string_view length = request_.Header("content-length");
    const bool digits =
        std::all_of(length.begin(), length.end(), [](char c) { return c >= '0' && c <= '9'; });
    if (length.empty() || !digits) return Refuse(400, "Content-Length is not a number");
    if (length.size() > 18) return Refuse(413, "Content-Length is too large");
    for (char c : length)
      request_.content_length = request_.content_length * 10 + static_cast<uint64_t>(c - '0');
  }
  const std::string_view connection = request_.Header("connection");
  request_.keep_alive =
      request_.minor_version == 1 ? !Names(connection, "close") : Names(connection, "keep-alive");
  const std::string_view expect = request_.Header("expect");
  if (!expect.empty() && Lower(expect) != "100-continue") return Refuse(417, "Expect must be 100-continue");
  wants_continue_ = !expect.empty() && request_.minor_version == 1;
  return state_;
}

RequestReader::State RequestReader::TakeHeader(std::string_view block) {
  parser_ = std::make_unique<Parser>();
  auto& beast = parser_->beast;
  beast.header_limit(static_cast<uint32_t>(limits_.max_header_bytes + 1024));
  beast.body_limit(boost::none);  // ours may still be lowered, see LimitBody
  beast.eager(false);
  beast.on_chunk_header(parser_->on_chunk);
  error_code error;
  beast.put(boost::asio::const_buffer(block.data(), block.size()), error);
  if (error || !beast.is_header_done()) {
    return Refuse(400, Format("the request header is malformed: {}", error.message()));
  }
  const std::string_view target(beast.get().target().data(), beast.get().target().size());
  const size_t mark = target.find('?');
  request_.method = std::string(beast.get().method_string());
  request_.path = target.substr(0, mark);
  if (mark != std::string_view::npos) request_.query = target.substr(mark + 1);
  consumed_ += block.size();
  scanned_ = 0;
  max_body_bytes_ = limits_.max_body_bytes;
  if (request_.content_length > max_body_bytes_) {
    return Refuse(413, Format("the request body has {} bytes, the limit is {}", request_.content_length,
                              max_body_bytes_));
  }
  if (!chunked_ && request_.content_length == 0) {
    parser_.reset();
    return state_ = State::kDone;
  }
  return state_ = State::kBody;
}

void RequestReader::LimitBody(size_t max_bytes) {
  max_body_bytes_ = std::min(max_body_bytes_, max_bytes);
}

RequestReader::State RequestReader::ReadBody() {
  auto& beast = parser_->beast;
  if (request_.content_length > max_body_bytes_) {
    return Refuse(413, Format("the request body has {} bytes, the limit is {}", request_.content_length,
                              max_body_bytes_));
  }
  while (!beast.is_done() && buffered_bytes() >= (chunked_ ? kMinChunkedBytes : 1)) {
    error_code error;
    const std::string_view rest = std::string_view(buffer_).substr(consumed_);
    parser_->in_chunk_header = false;
    const size_t used = beast.put(boost::asio::const_buffer(rest.data(), rest.size()), error);
    consumed_ += used;
    if (beast.get().body().size() > max_body_bytes_) {
      return Refuse(413, Format("the request body is longer than {} bytes", max_body_bytes_));
    }
    if (error == beast_http::error::need_more) {
      if (buffered_bytes() > kMaxChunkHeaderBytes)
        return Refuse(400, "a chunk header or trailer is too long");
      break;
    }
    if (error) return Refuse(400, Format("the request body is malformed: {}", error.message()));
    // Both as if the bytes had come one by one.
    if (parser_->in_chunk_header && used > kMaxChunkHeaderBytes + 1) {
      return Refuse(400, "a chunk header or trailer is too long");
    }
    if (chunked_ && beast.is_done() && !IsLastChunk(rest.substr(0, used))) {
      return Refuse(400, "the chunked body has trailer fields");
    }
  }
  if (!beast.is_done()) return state_;
  request_.body = std::move(beast.get().body());
  parser_.reset();
  return state_ = State::kDone;
}

HttpRequest RequestReader::Take() {
  CHECK(state_ == State::kDone);
  state_ = State::kHeader;
  DropConsumed();
  return std::exchange(request_, HttpRequest());
}

}  // namespace tessera
