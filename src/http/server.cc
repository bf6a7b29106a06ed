// Connections on Boost.Asio, as state machines driven by "readable" and "writable": an idle or waiting
// connection owns no buffer at all. See server.h.
#include "http/server.h"

#include <sys/resource.h>
#include <time.h>

#include <array>
#include <atomic>
#include <boost/asio.hpp>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <unordered_map>

#include "base/check.h"
#include "base/format.h"
#include "base/log.h"

namespace tessera {
namespace {

namespace asio = boost::asio;
using asio::ip::tcp;
using boost::system::error_code;
using std::chrono::steady_clock;

// A refused request's body up to this size is read anyway, so that the connection can be kept.
constexpr size_t kMaxDiscardedBody = size_t{64} << 10;
constexpr size_t kMaxPipelinedBytes = size_t{64} << 10;  // requests that wait behind the one being answered
constexpr size_t kKeptBufferBytes = size_t{4} << 10;     // a larger empty buffer is given back
constexpr std::chrono::seconds kLingerDeadline{2};       // for the client to read the last answer

std::string_view ReasonPhrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 401:
      return "Unauthorized";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 408:
      return "Request Timeout";
    case 413:
      return "Payload Too Large";
    case 417:
      return "Expectation Failed";
    case 429:
      return "Too Many Requests";
    case 431:
      return "Request Header Fields Too Large";
    case 500:
      return "Internal Server Error";
    case 501:
      return "Not Implemented";
    case 503:
      return "Service Unavailable";
    default:
      return "Unknown";
  }
}

std::string HttpDate() {
  const time_t now = ::time(nullptr);
  tm utc;
  ::gmtime_r(&now, &utc);
  std::array<char, 40> text;
  return std::string(text.data(), ::strftime(text.data(), text.size(), "%a, %d %b %Y %H:%M:%S GMT", &utc));
}

rlim_t RaiseDescriptorLimit() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  if (::setrlimit(RLIMIT_NOFILE, &limit) != 0)
    LogWarning("RLIMIT_NOFILE cannot be raised to {}", limit.rlim_max);
  ::getrlimit(RLIMIT_NOFILE, &limit);
  return limit.rlim_cur;
}

class Connection;

}  // namespace

struct HttpServer::Content {
  explicit Content(const ServerOptions& the_options)
      : options(the_options), background(static_cast<size_t>(the_options.num_background_threads)) {}

  void Accept();
  void Sweep();
  void CloseAll();
  void SetBusy(int change);

  const ServerOptions options;
  ServerHooks hooks;
  asio::io_context io{1};
  tcp::acceptor acceptor{io};
  asio::steady_timer sweep_timer{io};
  asio::steady_timer accept_timer{io};
  asio::thread_pool background;
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> work;
  std::unordered_map<Connection*, std::shared_ptr<Connection>> connections;
  std::vector<char> scratch = std::vector<char>(size_t{64} << 10);  // every read goes through it
  size_t body_bytes_in_all = 0;
  size_t max_connections = 0;
  int bound_port = 0;
  std::thread thread;
  std::mutex idle_mutex;
  std::condition_variable idle;
  int num_busy = 0;  // guarded by idle_mutex
};

namespace {

class ConnectionExchange : public Exchange {
 public:
  ConnectionExchange(Connection* connection, const HttpRequest& request, size_t request_bytes)
      : connection_(connection), keep_alive_(request.keep_alive), chunked_(request.minor_version == 1) {
    record_.method = request.method;
    record_.path = request.path;
    record_.request_bytes = request_bytes;
  }
  void Answer(HttpResponse response) override;
  void BeginEvents(std::vector<std::pair<std::string, std::string>> headers) override;
  void Write(std::string_view events) override;
  void EndEvents(std::string_view last_events) override;
  bool open() const override { return connection_ != nullptr; }
  size_t unsent_bytes() const override;

  void CloseWhenDone() { keep_alive_ = false; }
  // The client is gone. The callback is returned, to be called later.
  std::function<void()> Detach() {
    connection_ = nullptr;
    on_drained = nullptr;
    return std::exchange(on_closed, nullptr);
  }
  const ExchangeRecord& record() const { return record_; }
  steady_clock::time_point start() const { return start_; }

 private:
  void AppendHead(std::string& out, int status, std::string_view content_type,
                  const std::vector<std::pair<std::string, std::string>>& headers);
  void AppendChunk(std::string_view events);
  void End();

  Connection* connection_;  // null when this exchange is over
  bool keep_alive_;
  const bool chunked_;
  ExchangeRecord record_;
  const steady_clock::time_point start_ = steady_clock::now();
};

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(HttpServer::Content* server, tcp::socket socket)
      : server_(server), socket_(std::move(socket)), reader_(server->options.limits) {}

  void Open() {
    SetDeadline(server_->options.header_deadline);
    WaitReadable();
  }
  void Close();
  void CheckDeadline(steady_clock::time_point now);
  // For the exchange.
  std::string& out() { return out_; }
  size_t unsent_bytes() const { return out_.size() - written_; }
  void Flush();
  void OnExchangeEnded(bool keep_alive);

 private:
  enum class Phase { kReading, kAnswering, kLingering, kClosed };

  void WaitReadable();
  void OnReadable(error_code error);
  void Advance();
  void OnHeader();
  void Dispatch();
  void RefuseBytes();
  void AnswerAndClose(HttpResponse response);
  void OnDrained(bool from_wait);
  void StartLinger();
  void UpdateBusy();
  void ReleaseBody();
  void SetDeadline(std::chrono::seconds wait) { deadline_ = steady_clock::now() + wait; }

  HttpServer::Content* const server_;  // outlives the connection
  tcp::socket socket_;
  RequestReader reader_;
  Phase phase_ = Phase::kReading;
  bool waiting_readable_ = false, waiting_writable_ = false;
  bool advancing_ = false;
  bool close_when_drained_ = false;
  bool counted_busy_ = false;
  bool mid_request_ = false;  // some bytes of the next request have come
  bool header_seen_ = false;  // the next request's header was admitted or refused
  size_t body_reserved_ = 0;
  std::optional<HttpResponse> early_answer_;
  std::string out_;
  size_t written_ = 0;  // bytes of out_ that the socket took
  steady_clock::time_point deadline_, stall_deadline_;
  std::shared_ptr<ConnectionExchange> exchange_;
};

void ConnectionExchange::AppendHead(std::string& out, int status, std::string_view content_type,
                                    const std::vector<std::pair<std::string, std::string>>& headers) {
  record_.status = status;
  out +=
      Format("HTTP/1.1 {} {}\r\nServer: tessera\r\nDate: {}\r\n", status, ReasonPhrase(status), HttpDate());
  if (!content_type.empty()) out += Format("Content-Type: {}\r\n", content_type);
  for (const auto& [name, value] : headers) out += Format("{}: {}\r\n", name, value);
  if (!keep_alive_) {
    out += "Connection: close\r\n";
  } else if (!chunked_) {
    out += "Connection: keep-alive\r\n";
  }
}

void ConnectionExchange::Answer(HttpResponse response) {
  if (!connection_) return;
  std::string& out = connection_->out();
  const size_t before = out.size();
  AppendHead(out, response.status, response.body.empty() ? "" : response.content_type, response.headers);
  out += Format("Content-Length: {}\r\n\r\n", response.body.size());
  if (record_.method != "HEAD") out += response.body;
  record_.response_bytes = out.size() - before;
  End();
}

void ConnectionExchange::BeginEvents(std::vector<std::pair<std::string, std::string>> headers) {
  if (!connection_) return;
  if (!chunked_) keep_alive_ = false;  // HTTP/1.0: the end of the connection ends the body
  headers.emplace_back("Cache-Control", "no-cache");
  if (chunked_) headers.emplace_back("Transfer-Encoding", "chunked");
  AppendHead(connection_->out(), 200, "text/event-stream; charset=utf-8", headers);
  connection_->out() += "\r\n";
}

void ConnectionExchange::AppendChunk(std::string_view events) {
  if (events.empty()) return;
  record_.response_bytes += events.size();
  std::string& out = connection_->out();
  if (!chunked_) {
    out += events;
    return;
  }
  fmt::format_to(std::back_inserter(out), "{:x}\r\n", events.size());
  out += events;
  out += "\r\n";
}

void ConnectionExchange::Write(std::string_view events) {
  if (!connection_) return;
  AppendChunk(events);
  connection_->Flush();
}

void ConnectionExchange::EndEvents(std::string_view last_events) {
  if (!connection_) return;
  AppendChunk(last_events);
  if (chunked_) connection_->out() += "0\r\n\r\n";
  End();
}

void ConnectionExchange::End() {
  record_.seconds = std::chrono::duration<double>(steady_clock::now() - start_).count();
  Connection* connection = std::exchange(connection_, nullptr);
  on_closed = nullptr;
  on_drained = nullptr;
  connection->OnExchangeEnded(keep_alive_);
}

size_t ConnectionExchange::unsent_bytes() const {
  return connection_ ? connection_->unsent_bytes() : 0;
}

void Connection::WaitReadable() {
  if (waiting_readable_ || phase_ == Phase::kClosed) return;
  waiting_readable_ = true;
  socket_.async_wait(tcp::socket::wait_read,
                     [self = shared_from_this()](error_code error) { self->OnReadable(error); });
}

void Connection::OnReadable(error_code error) {
  waiting_readable_ = false;
  if (phase_ == Phase::kClosed) return;
  if (error) return Close();
  const size_t size = socket_.read_some(asio::buffer(server_->scratch), error);
  if (error == asio::error::would_block) return WaitReadable();
  if (error == asio::error::eof && !exchange_ && unsent_bytes() > 0) {
    close_when_drained_ = true;  // it has asked all it wanted, and still reads the answer
    return;
  }
  if (error) return Close();  // the client left, or ended its side: nobody waits for an answer
  if (phase_ == Phase::kLingering || close_when_drained_) return WaitReadable();
  reader_.Append({server_->scratch.data(), size});
  Advance();
  // While a request is answered the wait only serves to notice that the client leaves; a client that sends
  // ever more requests without reading answers is not listened to until it does.
  if (reader_.buffered_bytes() < kMaxPipelinedBytes) WaitReadable();
}

void Connection::Advance() {
  if (advancing_) return;
  advancing_ = true;
  while (phase_ == Phase::kReading && !close_when_drained_ && unsent_bytes() < kMaxPipelinedBytes) {
    if (!mid_request_ && !reader_.idle()) {
      mid_request_ = true;
      SetDeadline(server_->options.header_deadline);
    }
    const RequestReader::State before = reader_.state();
    const RequestReader::State now = reader_.Advance();
    if (now == RequestReader::State::kRefused) {
      RefuseBytes();
    } else if (now == RequestReader::State::kDone) {
      Dispatch();
    } else if (now == RequestReader::State::kBody && before == RequestReader::State::kHeader) {
      OnHeader();
    } else {
      break;
    }
  }
  advancing_ = false;
}

void Connection::OnHeader() {
  header_seen_ = true;
  early_answer_ = server_->hooks.admit(reader_.header());
  const size_t body_bytes = std::max<size_t>(reader_.header().content_length, kMaxDiscardedBody);
  if (!early_answer_ && server_->body_bytes_in_all + body_bytes > server_->options.max_body_bytes_in_all) {
    early_answer_ = server_->hooks.refuse(503, "too many request bodies are being received");
  }
  SetDeadline(server_->options.body_deadline);
  if (early_answer_) return reader_.LimitBody(kMaxDiscardedBody);
  body_reserved_ = body_bytes;
  server_->body_bytes_in_all += body_bytes;
  if (reader_.wants_continue()) {
    out_ += "HTTP/1.1 100 Continue\r\n\r\n";
    Flush();
  }
}

void Connection::ReleaseBody() {
  server_->body_bytes_in_all -= std::exchange(body_reserved_, 0);
}

void Connection::Dispatch() {
  ReleaseBody();
  HttpRequest request = reader_.Take();
  if (!std::exchange(header_seen_, false)) early_answer_ = server_->hooks.admit(request);
  mid_request_ = false;
  phase_ = Phase::kAnswering;
  exchange_ = std::make_shared<ConnectionExchange>(this, request, request.body.size());
  UpdateBusy();
  const std::shared_ptr<ConnectionExchange> exchange = exchange_;
  if (early_answer_) {
    exchange->Answer(*std::exchange(early_answer_, std::nullopt));
  } else {
    server_->hooks.handle(std::move(request), exchange);
  }
}

void Connection::RefuseBytes() {
  ReleaseBody();
  // A body that was not going to be used and is too long to be skipped.
  if (reader_.status() == 413 && early_answer_)
    return AnswerAndClose(*std::exchange(early_answer_, std::nullopt));
  AnswerAndClose(server_->hooks.refuse(reader_.status(), reader_.reason()));
}

void Connection::AnswerAndClose(HttpResponse response) {
  phase_ = Phase::kAnswering;
  exchange_ = std::make_shared<ConnectionExchange>(this, reader_.header(), 0);
  exchange_->CloseWhenDone();
  UpdateBusy();
  const std::shared_ptr<ConnectionExchange> exchange = exchange_;
  exchange->Answer(std::move(response));
}

void Connection::OnExchangeEnded(bool keep_alive) {
  server_->hooks.finished(exchange_->record());
  exchange_.reset();
  phase_ = Phase::kReading;
  close_when_drained_ = !keep_alive;
  SetDeadline(server_->options.idle_deadline);
  Flush();
  // Requests that were pipelined behind this one; not from here, the caller may be in the middle of its work.
  if (phase_ == Phase::kReading && !close_when_drained_ && !advancing_ && !reader_.idle()) {
    asio::post(server_->io, [self = shared_from_this()] {
      self->Advance();
      self->WaitReadable();
    });
  }
}

void Connection::Flush() {
  if (phase_ == Phase::kClosed || waiting_writable_) return;
  while (unsent_bytes() > 0) {
    error_code error;
    written_ += socket_.write_some(asio::buffer(out_.data() + written_, unsent_bytes()), error);
    if (error == asio::error::would_block) {
      stall_deadline_ = steady_clock::now() + server_->options.stall_deadline;
      waiting_writable_ = true;
      socket_.async_wait(tcp::socket::wait_write, [self = shared_from_this()](error_code wait_error) {
        self->waiting_writable_ = false;
        if (self->phase_ == Phase::kClosed) return;
        if (wait_error) return self->Close();
        self->Flush();
        if (self->phase_ != Phase::kClosed && self->unsent_bytes() == 0) self->OnDrained(true);
      });
      // The sent part goes, so that a slow reader holds no more than what it has not read.
      out_.erase(0, std::exchange(written_, 0));
      return UpdateBusy();
    }
    if (error) return Close();
  }
  out_.clear();
  written_ = 0;
  if (out_.capacity() > kKeptBufferBytes) std::string().swap(out_);
  OnDrained(false);
}

void Connection::OnDrained(bool from_wait) {
  UpdateBusy();
  if (close_when_drained_ && phase_ == Phase::kReading) return StartLinger();
  if (!from_wait) return;
  if (exchange_) {
    // A copy: the callback may end the exchange and so drop itself.
    if (const auto on_drained = exchange_->on_drained) on_drained();
    return;
  }
  Advance();
  WaitReadable();
}

void Connection::StartLinger() {
  phase_ = Phase::kLingering;
  error_code ignored;
  socket_.shutdown(tcp::socket::shutdown_send, ignored);
  SetDeadline(kLingerDeadline);
  WaitReadable();
}

void Connection::UpdateBusy() {
  const bool busy = phase_ != Phase::kClosed && (exchange_ || unsent_bytes() > 0);
  if (busy == counted_busy_) return;
  counted_busy_ = busy;
  server_->SetBusy(busy ? 1 : -1);
}

void Connection::Close() {
  if (phase_ == Phase::kClosed) return;
  const std::shared_ptr<Connection> self = shared_from_this();
  phase_ = Phase::kClosed;
  ReleaseBody();
  error_code ignored;
  socket_.close(ignored);
  if (exchange_) {
    auto on_closed = exchange_->Detach();
    if (on_closed) asio::post(server_->io, std::move(on_closed));
    if (exchange_->record().status != 0) server_->hooks.finished(exchange_->record());
    exchange_.reset();
  }
  std::string().swap(out_);
  written_ = 0;
  UpdateBusy();
  server_->connections.erase(this);
}

void Connection::CheckDeadline(steady_clock::time_point now) {
  if (waiting_writable_ && now > stall_deadline_) return Close();
  if (phase_ == Phase::kAnswering || now <= deadline_) return;
  if (phase_ == Phase::kReading && mid_request_ && unsent_bytes() == 0) {
    ReleaseBody();
    return AnswerAndClose(server_->hooks.refuse(408, "the request did not arrive in time"));
  }
  if (unsent_bytes() == 0 || phase_ == Phase::kLingering) Close();
}

}  // namespace

void HttpServer::Content::SetBusy(int change) {
  {
    std::lock_guard lock(idle_mutex);
    num_busy += change;
    if (num_busy > 0) return;
  }
  idle.notify_all();
}

void HttpServer::Content::Accept() {
  acceptor.async_accept([this](error_code error, tcp::socket socket) {
    if (!acceptor.is_open()) return;
    if (error) {
      // Out of descriptors, most likely: connections end, then it works again.
      accept_timer.expires_after(std::chrono::milliseconds(100));
      accept_timer.async_wait([this](error_code cancelled) {
        if (!cancelled && acceptor.is_open()) Accept();
      });
      return;
    }
    if (connections.size() < max_connections) {
      error_code ignored;
      socket.non_blocking(true, ignored);
      socket.set_option(tcp::no_delay(true), ignored);
      auto connection = std::make_shared<Connection>(this, std::move(socket));
      connections.emplace(connection.get(), connection);
      connection->Open();
    }
    Accept();
  });
}

void HttpServer::Content::Sweep() {
  sweep_timer.expires_after(std::chrono::seconds(1));
  sweep_timer.async_wait([this](error_code cancelled) {
    // A timer that had expired before CloseAll cancelled it comes without an error.
    if (cancelled || !acceptor.is_open()) return;
    const auto now = steady_clock::now();
    std::vector<std::shared_ptr<Connection>> all;
    all.reserve(connections.size());
    for (const auto& [_, connection] : connections) all.push_back(connection);
    for (const auto& connection : all) connection->CheckDeadline(now);
    Sweep();
  });
}

void HttpServer::Content::CloseAll() {
  error_code ignored;
  acceptor.close(ignored);
  sweep_timer.cancel();
  accept_timer.cancel();
  std::vector<std::shared_ptr<Connection>> all;
  for (const auto& [_, connection] : connections) all.push_back(connection);
  for (const auto& connection : all) connection->Close();
  work.reset();
}

HttpServer::HttpServer(std::unique_ptr<Content> content) : content_(std::move(content)) {}
HttpServer::~HttpServer() {
  Stop();
}

Result<std::unique_ptr<HttpServer>> HttpServer::Listen(const ServerOptions& options) {
  auto content = std::make_unique<Content>(options);
  const rlim_t max_files = RaiseDescriptorLimit();
  content->max_connections = max_files > 256 ? static_cast<size_t>(max_files) - 128 : 128;
  error_code error;
  tcp::resolver resolver(content->io);
  const auto addresses = resolver.resolve(options.host, std::to_string(options.port),
                                          tcp::resolver::passive | tcp::resolver::numeric_service, error);
  if (error || addresses.empty()) {
    return Fail(ErrorKind::kUnavailable, "the host name {} cannot be resolved: {}", options.host,
                error.message());
  }
  const tcp::endpoint endpoint = addresses.begin()->endpoint();
  content->acceptor.open(endpoint.protocol(), error);
  if (!error) content->acceptor.set_option(tcp::acceptor::reuse_address(true), error);
  if (!error) content->acceptor.bind(endpoint, error);
  if (!error) content->acceptor.listen(4096, error);
  if (error) {
    return Fail(ErrorKind::kUnavailable, "cannot listen on {}:{}: {}", options.host, options.port,
                error.message());
  }
  content->bound_port = content->acceptor.local_endpoint(error).port();
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(content)));
}

void HttpServer::Start(ServerHooks hooks) {
  Content& content = *content_;
  content.hooks = std::move(hooks);
  content.work.emplace(content.io.get_executor());
  content.Accept();
  content.Sweep();
  content.thread = std::thread([&content] { content.io.run(); });
}

int HttpServer::port() const {
  return content_->bound_port;
}
const ServerOptions& HttpServer::options() const {
  return content_->options;
}
size_t HttpServer::num_connections() const {
  return content_->connections.size();
}
void HttpServer::Post(std::function<void()> job) {
  asio::post(content_->io, std::move(job));
}
void HttpServer::RunInBackground(std::function<void()> job) {
  asio::post(content_->background, std::move(job));
}

bool HttpServer::WaitUntilIdle(std::chrono::nanoseconds limit) {
  std::unique_lock lock(content_->idle_mutex);
  return content_->idle.wait_for(lock, limit, [this] { return content_->num_busy == 0; });
}

void HttpServer::Stop() {
  content_->background.join();
  if (!content_->thread.joinable()) return;
  asio::post(content_->io, [this] { content_->CloseAll(); });
  content_->thread.join();
}

}  // namespace tessera
